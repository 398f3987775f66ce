"""examples/train_sharded.py trains alike however it is sharded, and goes on on other ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(ranks: int, *arguments: str) -> list[str]:
    """What the example prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "examples.train_sharded", *arguments]
    # On the CPU, where there are as many ranks as are asked for.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("epoch")]


def test_goes_on_elsewhere_as_if_nothing_had_happened(tmp_path: Path) -> None:
    folder = ("--checkpoint", str(tmp_path))
    first = run(2, "--parallel", "fsdp2", "--epochs", "1", *folder)
    then = run(1, "--parallel", "hsdp", "--epochs", "2", *folder)
    whole = run(2, "--parallel", "tp", "--epochs", "2")
    assert len(whole) == 2
    assert [*first, *then] == whole


@pytest.mark.soak
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "hsdp", "tp"])
def test_every_way_and_precision(parallel: str, amp: str, tmp_path: Path) -> None:
    options = ("--parallel", parallel, "--amp", amp, "--checkpoint", str(tmp_path))
    run(4 if parallel == "hsdp" else 2, "--epochs", "1", *options)
    (second,) = run(2, "--epochs", "2", *options)
    assert float(second.split()[-1]) < 1.5
