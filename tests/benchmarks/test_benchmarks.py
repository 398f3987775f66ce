"""The benchmarks compare what they say they compare; nothing here is timed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from agc_triton.torch_path import blocks
from benchmarks import digits, host_cost, kernel_report, scaling, shapes, throughput, torch_path
from benchmarks.providers import (
    OPTIMIZERS,
    Provider,
    adaptive_clip_grad,
    providers,
    timm_adaptive_clip_grad,
)
from benchmarks.rotation import Rotation
from benchmarks.runner import COLUMNS
from tests.support.helpers import write_shapes

# Millions of parameters, as timm's results tables give them.
PUBLISHED = {
    "dm_nfnet_f0": 71.49,
    "dm_nfnet_f1": 132.63,
    "dm_nfnet_f2": 193.78,
    "dm_nfnet_f3": 254.92,
    "dm_nfnet_f4": 316.07,
    "dm_nfnet_f5": 377.21,
    "dm_nfnet_f6": 438.36,
    "nf_resnet50": 25.56,
    "resnet50": 25.56,
    "eca_nfnet_l0": 24.14,
    "convnext_base": 88.59,
    "vit_base_patch16_224": 86.57,
    "vit_large_patch16_224": 304.33,
}

SHAPES = [(4, 3, 3, 3), (4, 1, 1, 1), (4,), (5, 6), (1, 7), ()]

ALL = [
    pytest.param(optimizer, provider, id=f"{optimizer}-{provider.implementation}")
    for optimizer in OPTIMIZERS
    for provider in providers(optimizer)
]


def test_every_table_has_the_published_number_of_parameters() -> None:
    counted = {
        path.stem: sum(torch.Size(shape).numel() for shape in shapes.load_shapes(path.stem)) / 1e6
        for path in shapes.TABLES.glob("*.csv")
    }
    assert {model: round(count, 2) for model, count in counted.items()} == PUBLISHED


def test_half_of_the_units_are_over_their_limit() -> None:
    workload = shapes.random_workload("nf_resnet50")
    share = shapes.share_of_units_clipped(workload.params, workload.grads)
    assert share == pytest.approx(0.5, abs=0.01)


def test_share_of_units_clipped_counts_units() -> None:
    # Limits: 0.02 for each row of four ones, 0.01 * 1e-3 for the zero bias.
    params = [torch.ones(3, 4), torch.zeros(2)]
    grads = [torch.tensor([0.02, 0.0, 0.005]).unsqueeze(1).expand(3, 4), torch.full((2,), 1e-6)]
    assert shapes.share_of_units_clipped(params, grads) == 0.25


def test_workload_depends_on_the_seed_only(tiny_model: str) -> None:
    first, again, other = (shapes.random_workload(tiny_model, seed=s) for s in (0, 0, 1))
    for a, b, c in zip(first.grads, again.grads, other.grads, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize(("optimizer", "provider"), ALL)
def test_provider_makes_the_step_it_names(
    optimizer: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS[optimizer].options, "lr", 0.1)
    whole = {"ours": squeezed_vector, "wrapper": squeezed_vector, "peer": vector}
    expected = three_steps(oracle(optimizer, whole.get(provider.role)), torch.float64)
    actual = three_steps(provider.build, torch.float32)
    torch.testing.assert_close(actual, [p.float() for p in expected])

    # The other definitions of a unit would have been told apart.
    for other in {None, squeezed_vector, vector} - {whole.get(provider.role)}:
        wrong = three_steps(oracle(optimizer, other), torch.float64)
        assert max((p - w).abs().max() for p, w in zip(expected, wrong, strict=True)) > 1e-3


def squeezed_vector(tensor: Tensor) -> bool:
    """Whether the paper has one unit here; gains shaped (C, 1, 1, 1) are one."""
    return tensor.squeeze().ndim <= 1


def vector(tensor: Tensor) -> bool:
    """Whether timm has one unit here."""
    return tensor.ndim <= 1


def oracle(
    optimizer: str, one_unit: Callable[[Tensor], bool] | None
) -> Callable[[list[Tensor]], Callable[[], object]]:
    """Clip unit by unit in a plain loop, then torch.optim; without ``one_unit``: do not clip."""
    torch_class, options = OPTIMIZERS[optimizer].torch_class, OPTIMIZERS[optimizer].options

    def build(params: list[Tensor]) -> Callable[[], object]:
        base = torch_class(params, **options)

        def step() -> None:
            for p in params if one_unit else []:
                assert p.grad is not None
                together = one_unit is not None and one_unit(p)
                for w, g in [(p, p.grad)] if together else zip(p, p.grad, strict=True):
                    limit = 0.01 * max(float(w.detach().norm()), 1e-3)
                    g *= min(1.0, limit / float(g.norm()))
            base.step()

        return step

    return build


def three_steps(
    build: Callable[[list[Tensor]], Callable[[], object]], dtype: torch.dtype
) -> list[Tensor]:
    """Parameters after three steps; gradients grow, so that clipping changes what Adam does."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> list[Tensor]:
        return [scale * torch.randn(s, generator=generator).to(dtype) for s in SHAPES]

    params: list[Tensor] = [Parameter(p) for p in draw(1.0)]
    step = build(params)
    for scale in (1e-3, 1e-2, 1.0):
        for p, g in zip(params, draw(scale), strict=True):
            p.grad = g
        step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(("optimizer", "provider"), ALL)
def test_provider_runs_torch_in_the_mode_it_names(optimizer: str, provider: Provider) -> None:
    named = [mode for mode in OPTIMIZERS[optimizer].modes if mode in provider.implementation]
    if provider.role in ("ours", "wrapper"):
        assert named == []
        return
    param = Parameter(torch.ones(4, 3))
    step = provider.build([param])
    param.grad = torch.ones(4, 3)
    step()
    with OperationNames() as called:
        step()
    fused = any("_fused_" in name for name in called.names)
    foreach = any("_foreach_" in name for name in called.names)
    assert named == ["fused" if fused else "foreach" if foreach else "for-loop"]


class OperationNames(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Collects the names of the operations called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is untyped
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every graph that torch.compile would have compiled; they run as they are."""
    found: list[Any] = []

    def keep(graph: Any, _inputs: Any) -> Any:
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    return found


def compiled_steps(count: int) -> Iterator[None]:
    """Two steps of every compiled implementation over so many workloads, one after the other."""
    compared = [p for p in providers("adamw", compiled=True) if "torch.compile" in p.implementation]
    assert len(compared) == 2
    for _ in range(count):
        workload = shapes.workload_of("tiny", [(3, 2)])
        rotation = Rotation(compared, workload, 1)
        for (step,) in rotation.steps:
            step()
            step()
        yield


# What torch imports to compile uses what torch deprecates.
deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@deprecated
def test_every_group_is_compiled(graphs: list[Any]) -> None:
    seen = [0]
    for _ in compiled_steps(10):
        seen.append(len(graphs))
    new = [after - before for before, after in pairwise(seen)]
    assert len(set(new)) == 1
    assert new[0] > 0


@deprecated
def test_steps_that_are_no_longer_compiled_are_an_error(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    with pytest.raises(Exception, match="recompile_limit"):
        list(compiled_steps(10))


def test_installed_timm_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, utils, agc = (ModuleType(name) for name in ("timm", "timm.utils", "timm.utils.agc"))
    timm.__version__ = "9.9"  # type: ignore[attr-defined]  # a stand-in module
    agc.adaptive_clip_grad = print  # type: ignore[attr-defined]  # a stand-in module
    for module in (timm, utils, agc):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert timm_adaptive_clip_grad() == (print, "timm 9.9")

    monkeypatch.setitem(sys.modules, "timm.utils.agc", None)
    assert timm_adaptive_clip_grad()[0] is adaptive_clip_grad


def test_a_package_that_fails_on_import_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.warns(UserWarning, match=r"timm.utils.agc is installed but left out: operator"):
        assert timm_adaptive_clip_grad()[0] is adaptive_clip_grad


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A small model in place of NFNet-F0, and the thread count as it was afterwards."""
    threads = torch.get_num_threads()
    write_shapes(tmp_path / "tiny.csv", SHAPES)
    monkeypatch.setattr(shapes, "TABLES", tmp_path)
    monkeypatch.setattr(torch_path, "MODEL", "tiny")
    yield "tiny"
    torch.set_num_threads(threads)


@pytest.mark.parametrize("quick", [False, True])
def test_torch_path_writes_one_row_per_implementation(
    quick: bool, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "rows.csv"
    torch_path.main(["--out", str(out), *(["--quick"] if quick else [])])
    table = pd.read_csv(out)
    assert list(table.columns) == COLUMNS
    expected = [
        (optimizer, p.implementation)
        for optimizer in torch_path.DEFAULT
        for p in providers(optimizer)
        if p.quick or not quick
    ]
    assert list(zip(table["optimizer"], table["implementation"], strict=True)) == expected
    assert set(table["model"]) == {tiny_model}
    assert set(table["tensors"]) == {len(SHAPES)}
    assert set(table["parameters"]) == {sum(torch.Size(s).numel() for s in SHAPES)}
    assert set(table["threads"]) == {torch_path.THREADS}

    printed = capsys.readouterr().out
    assert str(out) in printed
    for optimizer, rows in table.groupby("optimizer"):
        medians = rows.set_index("implementation")["median_ms"]
        peer = rows.loc[rows["role"] == "peer", "median_ms"].min()
        floor = medians[medians.index.str.endswith("unclipped")].min()
        ours = rows[rows["role"] == "ours"].iloc[0]
        assert ours["ratio_to_best_peer"] == pytest.approx(peer / ours["median_ms"])
        assert ours["ratio_to_unclipped"] == pytest.approx(ours["median_ms"] / floor)
        assert f"{optimizer}: agc_triton, torch path takes" in printed
        assert f"{ours['ratio_to_best_peer']:.2f} times as fast as" in printed


def test_sweep_writes_one_row_per_block_size(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    torch_path.main(["--sweep", "--quick", "--optimizers", "adamw", "--out", str(out)])
    table = pd.read_csv(out)
    assert list(table.columns) == [*COLUMNS, "block"]
    assert list(table["block"].dropna()) == torch_path.BLOCKS
    assert f"blocks.py has {blocks.BLOCK}" in capsys.readouterr().out


REPORTS: list[Any] = [digits, host_cost, kernel_report, scaling, throughput, torch_path]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.__name__)
def test_where_rows_go_is_checked_before_anything_is_measured(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    under_a_file = tmp_path / "file" / "rows.csv"
    read_only = tmp_path / "new" / "rows.csv"
    monkeypatch.setattr(os, "access", lambda path, mode: path == read_only and mode != os.W_OK)
    places = {under_a_file: "argument --out: [Errno", read_only: "cannot be written to"}
    if report is not digits:  # which writes to a folder
        places[tmp_path] = f"argument --out: {tmp_path} is a folder"
    for out, message in places.items():
        with pytest.raises(SystemExit):
            report.main(["--out", str(out)])
        assert message in capsys.readouterr().err
    assert read_only.parent.is_dir()


@pytest.mark.parametrize(
    ("report", "arguments", "message"),
    [
        (throughput, "--threads 0", "--threads: 0 is no whole number above 0"),
        (throughput, "--threads two", "--threads: two is no whole number above 0"),
        (throughput, "--device cuda", "--device: torch finds no GPU"),
        (scaling, "--device cuda", "--device: torch finds no GPU"),
        (scaling, "--max-elements nan", "--max-elements: nan is no number from 10,000 on"),
        (scaling, "--max-elements inf", "--max-elements: inf is no number from 10,000 on"),
        (scaling, "--max-elements many", "--max-elements: invalid elements value: 'many'"),
        (digits, "--epochs 0", "--epochs: 0 is no whole number above 0"),
        (digits, "--seeds -1", "--seeds: -1 is no whole number above 0"),
        (kernel_report, "--arch 91x", "--arch: invalid choice: '91x' (choose from"),
        (host_cost, "--calls 0", "--calls: 0 is no whole number above 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    report: Any,
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        report.main([*arguments.split(), "--out", str(tmp_path / "rows.csv")])
    assert f"error: argument {message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_block_size_holds_during_the_step_only() -> None:
    seen: list[int] = []

    def build(_: list[Tensor]) -> Callable[[], object]:
        return lambda: seen.append(blocks.BLOCK)

    before = blocks.BLOCK
    provider = Provider("agc_triton", "", "ours", True, build)
    torch_path.with_block(provider, 2 * before).build([])()
    assert [*seen, blocks.BLOCK] == [2 * before, before]
