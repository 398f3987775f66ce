"""What the command lines of the benchmarks check before anything is measured."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from benchmarks.lib.data.catalog import NAMES


def parser_of(command: str, description: str | None) -> ArgumentParser:
    """A parser for ``python -m benchmarks.COMMAND``, which is described by its docstring."""
    return ArgumentParser(
        prog=f"python -m benchmarks.{command}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def named_folder(text: str) -> tuple[str, Path | None]:
    """Data and where they lie."""
    name, _, folder = text.partition("=")
    if name not in NAMES:
        raise ArgumentTypeError(f"{name} is none of {', '.join(NAMES)}")
    return name, Path(folder) if folder else None


def device(text: str) -> str:
    """A device that is there."""
    if text == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("torch finds no GPU")
    return text


def add_device(parser: ArgumentParser) -> None:
    """``--device``, by default a GPU where there is one."""
    parser.add_argument(
        "--device",
        type=device,
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )


def check_file(parser: ArgumentParser, out: Path) -> None:
    """Make the folder of a file that will be written; a message where that cannot be."""
    if out.is_dir():
        parser.error(f"argument --out: {out} is a folder")
    check_folder(parser, out.parent)


def check_folder(parser: ArgumentParser, out: Path) -> None:
    """Make a folder that will be written to; a message where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    if not os.access(out, os.W_OK):
        parser.error(f"argument --out: {out} cannot be written to")
