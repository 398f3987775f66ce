"""The option ``nonfinite``: "raise", "propagate", copies of optimizers, bad values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import agc_triton
from tests.optim.test_nonfinite import INF, NAN, OPTIONS, every_name, placed, tensors_of
from tests.support.checks import nothing_changes, step_with
from tests.support.optimizers import OURS, build
from tests.support.tensors import SHAPES, grads_like, parameters, same, set_grads, weight
from tests.support.training import train

every_backend = pytest.mark.parametrize("backend", ["torch", "triton"])

# numpy, which the interpreter computes with, warns of inf * 0.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")


def raising(name: str, backend: str, **options: Any) -> tuple[Any, list[Tensor]]:
    params = placed([weight((3, 4)), weight((5,))], backend)
    names = list(zip(("weight", "bias"), params, strict=True))
    groups = [{"params": names[:1]}, {"params": names[1:]}]
    given = {**OPTIONS[name], "backend": backend, "nonfinite": "raise", **options}
    return build(name, groups, given), params


@every_backend
@every_name
@pytest.mark.parametrize(("value", "found"), [(NAN, "NaN"), (INF, "inf"), (-INF, "inf")])
@pytest.mark.parametrize("clipping", [0.05, 0])
def test_raise_names_the_place_and_changes_nothing(
    name: str, backend: str, value: float, found: str, clipping: float
) -> None:
    optimizer, params = raising(name, backend, clipping=clipping)
    for seed in range(2):  # before there is a state, and after
        set_grads(params, seed)
        good = params[1].grad
        assert good is not None
        params[1].grad = good.clone()
        params[1].grad[3] = value
        with nothing_changes(params, optimizer), pytest.raises(RuntimeError) as caught:
            optimizer.step()
        for part in (found, "parameter 0 ('bias') of group 1", "raise", "skip_unit"):
            assert part in str(caught.value)
        params[1].grad = good
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)
    assert optimizer.skipped_units == 0


@every_backend
def test_raise_looks_at_elements_and_leaves_overflows_to_grad_scaler(backend: str) -> None:
    optimizer, params = raising("SGD", backend, lr=0.0, weight_decay=0.0)
    set_grads(params, 0)
    assert params[0].grad is not None
    params[0].grad[0] = 3e38
    optimizer.step()
    params[0].grad[0] = INF
    optimizer.found_inf = torch.ones((), device=params[0].device)
    with nothing_changes(params, optimizer):
        optimizer.step()
    optimizer.found_inf.zero_()
    with nothing_changes(params, optimizer), pytest.raises(RuntimeError, match="inf"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["sparse", "complex", "empty"])
def test_raise_with_gradients_of_other_kinds(kind: str) -> None:
    dtype = torch.complex64 if kind == "complex" else torch.float32
    params = [Parameter(weight((4, 3), dtype)), Parameter(weight((0, 3)))]
    optimizer = build("SGD", params, {"clipping": 0, "nonfinite": "raise"})
    for value, ok in ((3e38, True), (NAN, False)):
        grad = torch.ones(4, 3, dtype=dtype)
        (torch.view_as_real(grad) if kind == "complex" else grad)[1, 1] = value
        params[0].grad = None if kind == "empty" else grad
        if kind == "sparse":
            params[0].grad = grad.to_sparse(1)
        params[1].grad = torch.zeros(0, 3)
        if ok or kind == "empty":
            optimizer.step()
        else:
            with nothing_changes(params, optimizer), pytest.raises(RuntimeError, match="NaN"):
                optimizer.step()


def test_raise_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = raising("SGD", "torch")
    set_grads(params, 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph.*skip_unit"):
        optimizer.step()


@every_backend
@every_name
def test_propagate_is_the_default_and_lets_everything_through(name: str, backend: str) -> None:
    results = []
    for given in ({}, {"nonfinite": "propagate"}):
        params = placed([weight((3, 4)), weight((5,))], backend)
        optimizer: Any = build(name, params, {**OPTIONS[name], "backend": backend, **given})
        for step in range(2):
            grads = [g.to(p.device) for p, g in zip(params, grads_like(params, step), strict=True)]
            grads[0][1, 2] = NAN
            step_with(optimizer, params, grads)
        assert optimizer.nonfinite == "propagate"
        assert optimizer.skipped_units == 0
        results.append(tensors_of(optimizer, params))
    assert same(*results)
    assert results[0][0]["p"].isnan().any(dim=1).tolist() == [False, True, False]


@every_backend
@pytest.mark.parametrize("nonfinite", ["propagate", "skip_unit", "raise"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_the_option(copier: Callable[[Any], Any], nonfinite: str, backend: str) -> None:
    params = placed(parameters(), backend)
    optimizer = agc_triton.AdamW_AGC(params, nonfinite=nonfinite, backend=backend)
    train(optimizer, params, range(1))
    if nonfinite == "skip_unit":
        params[0].grad = torch.full_like(params[0], NAN)
        optimizer.step()
        assert optimizer.skipped_units == SHAPES[0][0]
    copied, other = copier((params, optimizer))
    assert other.nonfinite == nonfinite
    assert other.skipped_units == 0
    for each, tensors in ((optimizer, params), (other, copied)):
        each.load_state_dict(each.state_dict())
        assert each.nonfinite == nonfinite
        train(each, tensors, range(1, 2))
    assert same(copied, params)
    assert same(other.state_dict(), optimizer.state_dict())
    assert "nonfinite" not in str(optimizer.state_dict())


def test_objects_pickled_before_there_was_the_option() -> None:
    optimizer = agc_triton.SGD_AGC(parameters())
    state = optimizer.__getstate__()
    del state["nonfinite"]
    loaded = agc_triton.SGD_AGC.__new__(agc_triton.SGD_AGC)
    loaded.__setstate__(state)
    assert (loaded.nonfinite, loaded.skipped_units) == ("propagate", 0)


@pytest.mark.parametrize("value", ["skip", "", None, True])
@pytest.mark.parametrize("cls", OURS)
def test_bad_values_are_refused(cls: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="propagate, skip_unit, raise") as caught:
        cls(parameters(), nonfinite=value)
    assert repr(value) in str(caught.value)
