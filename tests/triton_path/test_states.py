"""Optimizer states on the Triton path: loaded, moved, replaced, copied, and of the wrong kind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checks import nothing_changes, oracle_for, states_of
from tests.support.guards import Guarded
from tests.support.optimizers import ADAMW, EACH_WAY, MOMENTUM, PAIRS, STATEFUL
from tests.support.places import DEVICE, KERNELS, few_weights
from tests.support.tensors import grad_like, moved, same, weight
from tests.support.training import Training

pytestmark = pytest.mark.usefixtures("poisoned_scratch")


@pytest.mark.parametrize("name", EACH_WAY)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch.optim's"])
def test_state_is_loaded(name: str, ours: bool) -> None:
    options = STATEFUL[name]
    training = Training(name, few_weights(), **options)
    training.train()
    before = copy.deepcopy(training.optimizer.state_dict())
    kept = [
        value
        for state in states_of(training.optimizer, training.params)
        for value in state.values()
    ]
    values = copy.deepcopy(kept)
    if ours:
        other = Training(name, few_weights(seed=5), **options).optimizer
    else:
        other = {ours.__name__: cls for cls, ours in PAIRS.items()}[f"{name}_AGC"](
            few_weights(seed=5), **options
        )
    for group in other.param_groups:
        for i, p in enumerate(group["params"]):
            p.grad = grad_like(p, 50 + i)
    for _ in range(2):
        other.step()
    training.optimizer.load_state_dict(other.state_dict())
    assert not same(training.optimizer.state_dict(), before)
    training.train()
    assert same(kept, values)


def test_state_goes_back_to_torch_optim() -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    training.train(2)
    params = [p.detach().clone() for p in training.params]
    theirs = torch.optim.AdamW(params, **ADAMW)
    theirs.load_state_dict(training.optimizer.state_dict())
    training.groups[0]["clipping"] = 0
    training.move_grads()
    oracle = oracle_for("AdamW", params, KERNELS, **ADAMW, clipping=0)
    oracle.load(params, states_of(theirs, params))
    grads = [p.grad for p in training.params]
    oracle.step(grads)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    theirs.step()
    oracle.check(params, states_of(theirs, params))


def test_a_loaded_momentum_is_not_taken_for_a_first_one() -> None:
    trained = Training("SGD", few_weights(), **MOMENTUM)
    trained.train()
    training = Training("SGD", few_weights(), **MOMENTUM)
    training.move_grads()
    training.optimizer.found_inf = torch.ones((), device=DEVICE)
    training.optimizer.step()  # skipped: still before the first step
    del training.optimizer.found_inf
    training.optimizer.load_state_dict(trained.optimizer.state_dict())
    training.step()


def test_a_first_step_after_loading_an_untrained_state() -> None:
    training = Training("SGD", few_weights(), **MOMENTUM)
    fresh = copy.deepcopy(training.optimizer.state_dict())
    training.train(2)
    training.optimizer.load_state_dict(fresh)
    training.train(2)


def move_data(entry: dict[str, Any]) -> None:
    for value in entry.values():
        value.data = moved(value)


STATE_MOVES: dict[str, Callable[[dict[str, Any]], None]] = {
    "replaced": lambda entry: entry.update({k: moved(v) for k, v in entry.items()}),
    "one replaced": lambda entry: entry.update(exp_avg_sq=moved(entry["exp_avg_sq"])),
    "other data": lambda entry: setattr(entry["exp_avg"], "data", moved(entry["exp_avg"])),
    "other storage": lambda entry: entry["exp_avg_sq"].set_(moved(entry["exp_avg_sq"])),
    "all other data": move_data,
    "step's other data": lambda entry: setattr(entry["step"], "data", torch.tensor(40.0)),
    "step replaced": lambda entry: entry.update(step=torch.tensor(40.0)),
    "step set": lambda entry: entry["step"].fill_(40.0),
}


@pytest.mark.parametrize("move", STATE_MOVES)
def test_states_move_to_other_memory(move: str) -> None:
    training = Training("AdamW", [*few_weights(), weight((1,), device=DEVICE)], **ADAMW)
    training.train()
    left = [x.detach() for s in states_of(training.optimizer, training.params) for x in s.values()]
    before = [x.data_ptr() for x in left]
    values = copy.deepcopy(left)
    for entry in training.optimizer.state.values():
        STATE_MOVES[move](entry)
    training.train()
    stays = [x.data_ptr() for s in training.optimizer.state.values() for x in s.values()]
    for address, now, tensor, value in zip(before, stays, left, values, strict=True):
        assert address == now or same(tensor, value)


def test_entries_of_the_state_are_replaced() -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    training.train()
    for p in training.params:
        training.optimizer.state[p] = copy.deepcopy(training.optimizer.state[p])
    training.train()


def test_the_state_is_cleared() -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    training.train()
    training.optimizer.state.clear()
    training.train(2)
    training.optimizer.state.pop(training.params[1])
    training.train(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_and_states_change_dtype(dtype: torch.dtype) -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    training.train()
    saved = copy.deepcopy(training.optimizer.state_dict())
    for p in training.params:
        p.grad = None
        p.data = p.data.to(dtype)
    training.optimizer.load_state_dict(saved)
    training.train(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_states_left_in_another_dtype_are_refused(dtype: torch.dtype) -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    training.train()
    guards = []
    for p in training.params:
        entry = training.optimizer.state[p]
        for key in ("exp_avg", "exp_avg_sq"):
            guards.append(Guarded(entry[key]))
            entry[key] = guards[-1].tensor
        p.grad = None
        p.data = p.data.to(dtype)
    training.move_grads()
    with (
        nothing_changes(training.params, training.optimizer),
        pytest.raises(RuntimeError, match="dtype"),
    ):
        training.optimizer.step()
    for guard in guards:
        guard.assert_intact()


@pytest.mark.parametrize("shape", [(3, 10), (3, 40), (60,)], ids=str)
def test_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    training.train()
    guard = Guarded(torch.zeros(shape))
    training.optimizer.state[training.params[0]]["exp_avg"] = guard.tensor
    with (
        nothing_changes(training.params, training.optimizer),
        pytest.raises(RuntimeError, match=r"shape|size"),
    ):
        training.optimizer.step()
    guard.assert_intact()


def roundtrip(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("name", EACH_WAY)
@pytest.mark.parametrize("relaid", [lambda t: t.t_(), lambda t: setattr(t, "data", t.data.t())])
def test_states_are_transposed_in_place(name: str, relaid: Callable[[Tensor], Any]) -> None:
    training = Training(name, [weight((5, 5), device=DEVICE)], **STATEFUL[name])
    training.train()
    for state in states_of(training.optimizer, training.params)[0].values():
        if state.dim() == 2:
            relaid(state)
    training.train(2)


@pytest.mark.parametrize("copied", [copy.deepcopy, roundtrip], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", EACH_WAY)
def test_copies_leave_the_original_alone(name: str, copied: Callable[[Any], Any]) -> None:
    training = Training(name, few_weights(), **STATEFUL[name])
    training.train()
    with nothing_changes(training.params, training.optimizer):
        other = Training(name, few_weights())
        other.optimizer = copied(training.optimizer)
        other.train(2)
    training.train()


def test_parameters_of_one_element_keep_their_states_apart() -> None:
    # Equal values are no sign of the same tensor.
    params = [torch.ones(1, device=DEVICE) for _ in range(2)]
    training = Training("SGD", params, **MOMENTUM)
    training.train()
    entry = training.optimizer.state[params[0]]
    left, entry["momentum_buffer"] = entry["momentum_buffer"], moved(entry["momentum_buffer"])
    value = left.clone()
    training.train()
    assert torch.equal(left, value)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_groups_of_adamw_that_do_not_say_how_to_decay(backend: str) -> None:
    """As those of torch 2.6."""
    optimizers: list[Any] = [
        PAIRS[torch.optim.AdamW](few_weights(), lr=0.1, weight_decay=0.5, backend=backend)
        for _ in range(2)
    ]
    for group in optimizers[0].param_groups:
        group.pop("decoupled_weight_decay", None)
    for optimizer in optimizers:
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            p.grad = grad_like(p, i)
        optimizer.step()
    silent, known = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    assert same(silent, known)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("name", EACH_WAY[1:])
def test_steps_counted_in_another_dtype(name: str, dtype: torch.dtype) -> None:
    training = Training(name, few_weights(), **STATEFUL[name])
    training.train()
    for entry in training.optimizer.state.values():
        entry["step"] = entry["step"].to(dtype)
    training.train(2)
    steps = [entry["step"] for entry in training.optimizer.state.values()]
    assert [(float(step), step.dtype) for step in steps] == [(3.0, torch.float32)] * len(steps)
