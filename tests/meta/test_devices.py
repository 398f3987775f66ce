"""No tensor is made without saying where: the default device is not the parameter's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "agc_triton").rglob("*.py"))
# torch's functions that make a tensor from no other; torch.from_numpy and *_like know where.
FACTORIES = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def made_anywhere(source: str) -> list[int]:
    """Lines that make a tensor without a device."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and not {"device", "out", None} & {keyword.arg for keyword in node.keywords}
    ]


def test_a_call_without_a_device_is_seen() -> None:
    source = "a = torch.zeros(3)\nb = torch.zeros(3, device=d)\nc = torch.zeros_like(a)\n"
    assert made_anywhere(source + "d = torch.randn(*shape, generator=rng)\n") == [1, 4]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_tensor_says_where_it_is_made(file: Path) -> None:
    assert not made_anywhere(file.read_text())
