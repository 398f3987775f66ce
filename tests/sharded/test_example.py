"""examples/train_sharded.py trains alike however it is sharded, and goes on on other ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.support.ranks import on_ranks

ROOT = Path(__file__).parents[2]


# torch's GradScaler refuses what tensor parallelism of a part of the network gives it.
WAYS = [
    (parallel, amp)
    for parallel in ("ddp", "fsdp2", "hsdp", "tp")
    for amp in ("off", "bf16", "fp16")
    if (parallel, amp) != ("tp", "fp16")
]


def test_what_gradscaler_refuses_is_refused_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.train_sharded import arguments

    with pytest.raises(SystemExit):
        arguments(["--parallel", "tp", "--amp", "fp16"])
    assert "use --amp bf16" in capsys.readouterr().err


def trained(arguments: list[str], _rank: int) -> list[float]:
    from examples.train_sharded import arguments as parsed
    from examples.train_sharded import train

    return train(parsed(arguments), "cpu")


def test_goes_on_elsewhere_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def run(ranks: int, *arguments: str) -> list[float]:
        folder = tmp_path / "-".join(arguments)
        folder.mkdir()
        given = [*arguments, "--checkpoint", str(tmp_path / "checkpoint")]
        losses, *others = on_ranks(partial(trained, given), folder, ranks)
        assert all(other == losses for other in others)
        return list(losses)

    first = run(2, "--parallel", "fsdp2", "--epochs", "1")
    second = run(1, "--parallel", "hsdp", "--epochs", "2")
    third = run(2, "--parallel", "tp", "--epochs", "3")
    (tmp_path / "checkpoint").rename(tmp_path / "kept")
    whole = run(2, "--parallel", "ddp", "--epochs", "3", "--amp", "off")
    assert len(whole) == 3
    assert [*first, *second, *third] == pytest.approx(whole, rel=1e-4)
    assert whole[-1] < whole[0] / 2


@pytest.mark.soak
@pytest.mark.parametrize(("parallel", "amp"), WAYS)
def test_torchrun_in_every_way_and_precision(parallel: str, amp: str, tmp_path: Path) -> None:
    def run(ranks: int, epochs: int) -> list[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "examples.train_sharded"]
        command += ["--parallel", parallel, "--amp", amp, "--epochs", str(epochs)]
        # On the CPU, where there are as many ranks as are asked for.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--checkpoint", str(tmp_path)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("epoch")]

    run(4 if parallel == "hsdp" else 2, epochs=1)
    (second,) = run(2, epochs=2)
    assert float(second.split()[-1]) < 1.5
