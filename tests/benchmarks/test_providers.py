"""The implementations make the steps that they name; nothing here is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib import workloads
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.providers import ALGORITHMS, Provider, providers
from benchmarks.lib.rotation import Rotation
from tests.benchmarks.tiny import SHAPES

ALL = [
    pytest.param(optimizer, provider, id=f"{optimizer}-{provider.implementation}")
    for optimizer in OPTIMIZERS
    for provider in providers(optimizer)
]


# Steps so large that clipping shows in them: Adadelta's are tiny at first, Rprop's are limited.
LARGE: dict[str, dict[str, Any]] = {
    **{name: {"lr": 0.1} for name in OPTIMIZERS},
    "adadelta": {"lr": 1.0},
    "rprop": {"lr": 0.1, "step_sizes": (1e-6, 50.0)},
}


@pytest.mark.parametrize(("optimizer", "provider"), ALL)
def test_provider_makes_the_step_it_names(
    optimizer: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option, value in LARGE[optimizer].items():
        monkeypatch.setitem(OPTIMIZERS[optimizer].options, option, value)
    whole = {"ours": squeezed_vector, "wrapper": squeezed_vector, "peer": vector}
    expected = three_steps(oracle(optimizer, whole.get(provider.role)), torch.float64)
    actual = three_steps(provider.build, torch.float32)
    torch.testing.assert_close(actual, [p.float() for p in expected])

    # The other definitions of a unit would have been told apart, but by signs, which all keep.
    for other in {None, squeezed_vector, vector} - {whole.get(provider.role)}:
        wrong = three_steps(oracle(optimizer, other), torch.float64)
        off = max(float((p - w).abs().max()) for p, w in zip(expected, wrong, strict=True))
        assert off == 0.0 if optimizer == "rprop" else off > 1e-3


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
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every graph that torch.compile would have compiled; they run as they are."""
    found: list[Any] = []

    def keep(graph: Any, _inputs: Any) -> Any:
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    with torch._dynamo.config.patch(recompile_limit=3):  # of 8; more groups would show the same
        yield found


def compiled_steps(count: int) -> Iterator[None]:
    """Two steps of every compiled implementation over so many workloads, one after the other."""
    compared = [
        p for p in providers("adamw", compiled=ALGORITHMS) if "torch.compile" in p.implementation
    ]
    assert len(compared) == 2
    for _ in range(count):
        workload = workloads.workload_of("tiny", [(3, 2)])
        rotation = Rotation(compared, workload, 1)
        for (step,) in rotation.steps:
            step()
            step()
        yield


# What torch imports to compile uses what torch deprecates.
deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.soak  # Inductor
@deprecated
def test_every_group_is_compiled(graphs: list[Any]) -> None:
    seen = [0]
    for _ in compiled_steps(5):
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
        list(compiled_steps(5))


def test_16_bit_sgd_is_not_compared_with_a_kernel_that_is_wrong() -> None:
    names = [p.implementation for p in providers("sgd", "cpu", torch.bfloat16)]
    assert not any("fused" in name for name in names)
    assert any("fused" in p.implementation for p in providers("sgd", "cuda", torch.bfloat16))
