"""Steps beside an oracle, and what they must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.support.kernel_oracle import KernelOracle, kernel_tolerance
from tests.support.optimizers import CLIPPING, STATEFUL, Kwargs, build, low_precision
from tests.support.oracle import Oracle, clip
from tests.support.places import KERNELS, Place
from tests.support.rounded import as_float64, exact
from tests.support.tensors import grads_like, same
from tests.support.tolerances import TOLERANCES


def clipped(
    weight: Tensor, grad: Tensor, clipping: float, agc_eps: float = 1e-3, unit_dim: int = 0
) -> Tensor:
    """Equation 3 of Brock et al. 2021 (arXiv 2102.06171), one unit after the other."""
    out = grad.clone()
    one_unit = sum(size != 1 for size in weight.shape) <= 1
    units = (weight,) if one_unit else weight.unbind(unit_dim)
    for w, g in zip(units, (out,) if one_unit else out.unbind(unit_dim), strict=True):
        limit = clipping * max(float(torch.linalg.norm(w)), agc_eps)
        norm = float(torch.linalg.norm(g))
        if norm > limit:
            g.mul_(limit / max(norm, 1e-6))
    return out


def tolerance_key(dtype: torch.dtype, name: str, options: Kwargs, mode: str) -> str:
    """The entry of the tolerance table that says how the torch path rounds."""
    kind = str(dtype.to_real()).removeprefix("torch.")
    if kind in ("float32", "float64"):
        on_device = mode == "differentiable" or isinstance(options.get("lr"), Tensor)
        # These compute nothing of lr, or of steps, alone.
        on_device = on_device and name not in ("SGD", "RMSprop")
        on_device = on_device or (name, mode) == ("ASGD", "foreach")
        return f"{kind}, scalars on the device" if on_device else kind
    # Most have no fused kernel; SGD's is wrong for 16 bits up to torch 2.13 (pytorch#191763), and
    # Adagrad's rounds a gradient with weight decay.
    fused = mode in ("default", "fused") and name in ("Adam", "AdamW")
    return kind if fused else f"{kind}, operation by operation"


def oracle_for(
    name: str, params: Sequence[Tensor], place: Place, mode: str = "default", **options: Any
) -> Oracle:
    """An oracle with the tolerance of what steps these parameters."""
    if place.backend == "triton":
        return KernelOracle(name, params, place.interpreted, **options)
    known = {key: value for key, value in options.items() if key != "backend"}
    key = tolerance_key(params[0].dtype, name, options, mode)
    return Oracle(name, params, TOLERANCES[key], **known)


def states_of(optimizer: Any, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The state of each parameter, empty where there is none."""
    return [optimizer.state.get(param, {}) for param in params]


def values_of(optimizer: Any, params: Sequence[Tensor]) -> list[Any]:
    """Parameters and their states, to be compared."""
    return [[p.detach() for p in params], states_of(optimizer, params)]


def step_with(
    optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> None:
    """One step; gradients must stay what they are, bit for bit and in place."""
    kept = [None if grad is None else (grad.clone(), grad.data_ptr()) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    for param, grad, before in zip(params, grads, kept, strict=True):
        assert param.grad is grad
        if grad is not None and before is not None:
            assert same(grad, before[0])
            assert grad.data_ptr() == before[1]


def step_and_check(
    optimizer: Optimizer, oracle: Oracle, params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> None:
    """One step of both, compared."""
    oracle.step(grads)
    step_with(optimizer, params, grads)
    oracle.check(params, states_of(optimizer, params))


def check_steps(
    name: str,
    mode: str,
    params: Sequence[Tensor],
    grads: Callable[[Sequence[Tensor], int], Sequence[Tensor]] = grads_like,
    between: Callable[[Any], None] = lambda optimizer: None,
    rounds_as: str | None = None,
    **agc: Any,
) -> None:
    """Two steps on the torch path against the oracle; parameters of one dtype, every state.

    ``between`` is called with the optimizer after each. ``rounds_as`` is the mode that has to be
    fallen back to where ``mode`` itself cannot do it.
    """
    dtype, place = params[0].dtype, Place("torch", params[0].device.type)
    options: Kwargs = {**STATEFUL[name], "clipping": CLIPPING, **agc}
    if dtype.itemsize == 2:
        options = low_precision(name, options)
    optimizer = build(name, params, {**options, "backend": place.backend}, mode)
    oracle = oracle_for(name, params, place, rounds_as or mode, **options)
    for step in range(2):
        if dtype.itemsize == 2:  # from the same rounded values, so that the bound is of one step
            oracle.load(params, states_of(optimizer, params))
        step_and_check(optimizer, oracle, params, grads(params, step))
        between(optimizer)


def check_clipped(
    weight: Tensor,
    before: Tensor,
    after: Tensor | None,
    place: Place = KERNELS,
    **options: float | None,
) -> None:
    """Assert that a gradient has been clipped against its weight; it may be on its limit."""
    assert after is not None
    if place.backend == "triton":
        entry = kernel_tolerance(weight.dtype, place.interpreted)
        dtypes = weight.dtype, before.dtype, entry.rule
        margin = max(kernel_tolerance(dtype, place.interpreted).margin for dtype in dtypes)
    else:
        entry = TOLERANCES[str(weight.dtype.to_real()).removeprefix("torch.")]
        margin = entry.margin
    p, g = exact(as_float64(weight), entry.stored).to(entry.norms), as_float64(before)
    options = {"clipping": CLIPPING, "agc_eps": 1e-3, "unit_dim": None, **options}
    of_grad = before.dtype.to_real()
    expected = clip(p, exact(g, of_grad), weight.shape, options, of_grad)
    # The error is 0 where a unit is under its limit, which keeps its bits.
    assert np.all(np.abs(as_float64(after) - expected.value) <= margin * expected.error)


@contextmanager
def nothing_changes(params: Sequence[Tensor], optimizer: Optimizer | None = None) -> Iterator[None]:
    """Neither a bit of the parameters and gradients nor an optimizer's groups, state, defaults."""

    def snapshot() -> Any:
        tensors = [(p.detach(), p.grad) for p in params]
        kept = (optimizer.state_dict(), optimizer.defaults) if optimizer else None
        return copy.deepcopy((tensors, kept)), [id(p.grad) for p in params]

    before, grads = snapshot()
    yield
    after, grads_after = snapshot()
    assert same(before, after)
    assert grads == grads_after
