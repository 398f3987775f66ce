"""What fails in the middle: kernels, memory, interrupts, checkpoints that do not fit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import agc_triton.triton_path.launches
from tests.support.checks import nothing_changes
from tests.support.disk import on_disk
from tests.support.optimizers import EACH_WAY, NAMES, STATEFUL, WAY_CASES, build
from tests.support.places import DEVICE
from tests.support.soak import soaked
from tests.support.tensors import parameters, same, set_grads, weight
from tests.support.training import on_backend, train, with_states

BACKENDS = ("torch", "triton")
every_name = pytest.mark.parametrize("name", EACH_WAY)
NAME_AND_BACKEND = soaked(
    itertools.product(EACH_WAY, BACKENDS),
    lambda name, backend: backend == "torch" or name in ("SGD", "AdamW"),
)
name_and_backend = pytest.mark.parametrize(("name", "backend"), NAME_AND_BACKEND)
# Adagrad has its states from the start.
creating = pytest.mark.parametrize(
    ("name", "backend"), [case for case in NAME_AND_BACKEND if case.values[0] != "Adagrad"]
)


class Failing:
    """Calls another function, but raises on one call; afterwards it only calls."""

    def __init__(self, function: Callable[..., Any], call: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, call, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("kernel", ["begin", "step"])
def test_a_kernel_that_does_not_compile_is_named(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = on_backend("triton")
    optimizer = with_states("AdamW", params, "triton")
    set_grads(params, 0)

    class Broken:
        __name__ = kernel
        arg_names = getattr(agc_triton.triton_path.launches, kernel).arg_names

        def __getitem__(self, grid: Any) -> Any:
            raise OSError("ptxas: no such file")

    monkeypatch.setattr(agc_triton.triton_path.launches, kernel, Broken())
    before = copy.deepcopy(params)
    monkeypatch.setattr(agc_triton.triton_path.launches, "interpreted", lambda: True)
    with pytest.raises(RuntimeError, match=f"kernel '{kernel}'.*OSError: ptxas") as caught:
        optimizer.step()
    assert "backend='torch'" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert same(params, before)


@pytest.mark.parametrize("call", [1, 2, 4])
@creating
def test_out_of_memory_while_states_are_created(
    name: str, backend: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, others = on_backend(backend), on_backend(backend)
    # One to three states per parameter: each group's creation fails in some case, halfway or not.
    optimizer, expected = (
        with_states(name, [{"params": p[:1], "clipping": 0.2}, {"params": p[1:]}], backend)
        for p in (params, others)
    )
    set_grads(params, 0)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", Failing(torch.zeros_like, call, error))
        with nothing_changes(params, optimizer), pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    for each, tensors in ((optimizer, params), (expected, others)):
        train(each, tensors, range(2))
    assert same(params, others)
    assert same(optimizer.state_dict(), expected.state_dict())


def test_out_of_memory_on_the_torch_path_beside_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The kernels take no empty parameters.
    params = [weight((3, 4), torch.float64, DEVICE), torch.zeros(0, 3, device=DEVICE)]
    optimizer = with_states("SGD", params, "triton")
    set_grads(params, 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", Failing(torch.zeros_like, 2, MemoryError()))
        with nothing_changes(params, optimizer), pytest.raises(MemoryError):
            optimizer.step()
    optimizer.step()
    assert len(optimizer.state) == 2


@creating
def test_a_failure_at_a_later_first_gradient_keeps_the_states_there_are(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = on_backend(backend)
    optimizer = with_states(name, params, backend)
    train(optimizer, params[:3], range(2))
    set_grads(params, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", Failing(torch.zeros_like, 2, MemoryError()))
        with nothing_changes(params, optimizer), pytest.raises(MemoryError):
            optimizer.step()
    optimizer.step()
    assert len(optimizer.state) == len(params)


def interrupt(patch: pytest.MonkeyPatch, backend: str, call: int) -> None:
    """Interrupt one of three launches, or norm 1, 2 or 3: the third is the second parameter's."""
    if backend == "torch":
        norm = Failing(torch.linalg.vector_norm, call, KeyboardInterrupt())
        patch.setattr(torch.linalg, "vector_norm", norm)
    else:
        fire = Failing(agc_triton.triton_path.launches.Launch.fire, call, KeyboardInterrupt())
        patch.setattr(agc_triton.triton_path.launches.Launch, "fire", lambda *args: fire(*args))


@pytest.mark.parametrize(
    ("name", "backend", "call"),
    soaked(
        itertools.product(EACH_WAY, BACKENDS, (1, 2, 3)),
        lambda name, backend, call: name == "AdamW" or (call == 2 and backend == "torch"),
    ),
)
def test_after_an_interrupt_a_checkpoint_goes_on_exactly(
    name: str, backend: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A merged plan has one bucket for shapes as small as these.
    monkeypatch.setattr(agc_triton.triton_path.buckets, "LAUNCH_ELEMENTS", -float("inf"))
    shapes = ((2, 20), (3, 300))
    params, others = ([weight(s, device=DEVICE) for s in shapes] for _ in range(2))
    optimizer, expected = (with_states(name, tensors, backend) for tensors in (params, others))
    train(optimizer, params, range(2))
    train(expected, others, range(4))
    saved = on_disk([p.detach() for p in params]), on_disk(optimizer.state_dict())
    set_grads(params, 7)
    with monkeypatch.context() as patch:
        interrupt(patch, backend, call)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    for p, value in zip(params, saved[0], strict=True):
        p.copy_(value)
    optimizer.load_state_dict(saved[1])
    train(optimizer, params, range(2, 4))
    assert same(params, others)
    assert same(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("mode", [{}, {"foreach": True}, {"nonfinite": "skip_unit"}], ids=str)
@every_name
def test_what_interrupts_the_first_norms_changes_nothing(
    name: str, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = on_backend("torch")
    optimizer = with_states(name, params, "torch", **mode)
    train(optimizer, params, range(2))
    set_grads(params, 7)
    for call in (1, 2):
        with monkeypatch.context() as patch, nothing_changes(params, optimizer):
            interrupt(patch, "torch", call)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_hyperparameter_that_is_none_changes_nothing(name: str) -> None:
    others_own = {"SGD": "dampening", "ASGD": "alpha", "Rprop": "etas", "Adadelta": "rho"}
    others_own |= {"RMSprop": "eps", "Adagrad": "eps"}
    key = others_own.get(name, "betas")
    params, others = parameters(), parameters()
    optimizer, expected = (
        with_states(name, [{"params": p[:2]}, {"params": p[2:]}]) for p in (params, others)
    )
    set_grads(params, 0)
    optimizer.param_groups[1][key] = None
    with nothing_changes(params, optimizer), pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[1][key] = optimizer.param_groups[0][key]
    train(optimizer, params, range(2))
    train(expected, others, range(2))
    assert same(params, others)
    assert same(optimizer.state_dict(), expected.state_dict())


@name_and_backend
def test_after_an_exception_in_a_closure_the_next_step_is_as_ever(name: str, backend: str) -> None:
    params, others = on_backend(backend), on_backend(backend)
    optimizer, expected = (with_states(name, tensors, backend) for tensors in (params, others))
    train(optimizer, params, range(1))
    train(expected, others, range(3))

    def closure() -> float:
        set_grads(params[:2], 7)
        raise ValueError("a bad batch")

    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="a bad batch"):
        optimizer.step(closure)
    assert same([p.detach() for p in params], before)
    train(optimizer, params, range(1, 3))
    assert same(params, others)
    assert same(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("clipping", [0.01, 0.0])
@pytest.mark.parametrize(("name", "mode"), WAY_CASES)
def test_a_misshapen_state_of_the_last_group_is_refused(
    name: str, mode: str, clipping: float
) -> None:
    params = [p.data for p in parameters([(6, 5), (4, 3)])]
    groups = [{"params": params[:1]}, {"params": params[1:], "clipping": clipping}]
    optimizer = build(name, groups, STATEFUL[name], mode)
    train(optimizer, params, range(2))
    key = next(key for key, value in optimizer.state[params[1]].items() if value.dim())
    optimizer.state[params[1]][key] = torch.ones(4, 5)
    set_grads(params, seed=2)
    with nothing_changes(params, optimizer), pytest.raises(RuntimeError, match=f"{key}'s shape"):
        optimizer.step()
