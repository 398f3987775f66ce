"""Plans are kept across steps, and refreshed when anything they depend on changes.

Every step is checked against the float64 oracle. Gradients that are no longer used are kept and
filled with NaN, so that a stale address shows in the numbers.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from agc_triton import AdamW_AGC, adaptive_clip_grad_
from agc_triton.fused import Tables
from tests.cases import NAMES, STATEFUL, build
from tests.helpers import PAIRS, nothing_changes, same
from tests.oracle import AGC, RULES
from tests.triton_cases import (
    CLIPPING,
    DEVICE,
    TRITON,
    Guarded,
    KernelOracle,
    check_clipped,
    make_grad,
    make_weight,
    plan_of,
    states_of,
    tile_shapes,
)

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

SHAPES = ((3, 20), (6,), (2, 12))
ADAMW: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1}
MOMENTUM: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "dampening": 0.4}


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    return [make_weight(s, seed=seed + i).to(DEVICE, dtype) for i, s in enumerate(SHAPES)]


class Training:
    """An optimizer on the Triton path; `step` compares every parameter with an oracle."""

    def __init__(self, name: str, params: Any, **options: Any) -> None:
        self.name = name
        self.optimizer: Any = build(name, params, {**TRITON, **options})
        self._unused: list[Tensor] = []
        self._seed = 0

    @property
    def groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    def move_grads(
        self, without: Iterable[int] = (), place: Callable[[Tensor], Tensor] = torch.clone
    ) -> None:
        """New gradients in new memory, but for some parameters."""
        for i, p in enumerate(self.params):
            if p.grad is not None:
                self._unused.append(p.grad.fill_(torch.nan))
            values = make_grad(p.shape, seed=self._seed + i).to(DEVICE, p.dtype)
            p.grad = None if i in without else place(values)
        self._seed += 1

    def step(self) -> None:
        """A step on the gradients there are."""
        expected = []
        for group in self.groups:
            options = {key: group[key] for key in (*RULES[self.name][1], *AGC) if key in group}
            for p in group["params"]:
                oracle = KernelOracle(self.name, [p], **options)
                oracle.load([p], states_of(self.optimizer, [p]))
                oracle.step([p.grad])
                expected.append((oracle, p))
        self.optimizer.step()
        for oracle, p in expected:
            oracle.check([p], states_of(self.optimizer, [p]))

    def train(self, steps: int = 1) -> None:
        """Steps on gradients for all parameters."""
        for _ in range(steps):
            self.move_grads()
            self.step()


def moved(tensor: Tensor) -> Tensor:
    """A copy in other memory; what is left behind must not be written to."""
    return tensor.detach().clone()


def test_kept_while_gradients_and_values_change() -> None:
    training = Training("AdamW", make_params(), **ADAMW)
    training.train()
    plan = plan_of(training.optimizer)
    training.train()
    for without in ([1], [0, 2], []):
        training.move_grads(without)
        training.step()
    training.groups[0].update(lr=0.25, betas=(0.8, 0.9), clipping=0.5, maximize=True)
    training.train()
    training.groups[0].update(clipping=0)
    training.train()
    assert plan_of(training.optimizer) is plan


@pytest.mark.parametrize("without", [[], [1]], ids=["all", "some"])
def test_tables_are_copied_only_when_they_change(
    without: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[bool] = []
    upload = Tables.upload

    def counted(self: Tables, capturing: bool) -> None:
        uploads.append(capturing)
        upload(self, capturing)

    monkeypatch.setattr(Tables, "upload", counted)
    training = Training("AdamW", make_params(), **ADAMW)
    for changes, expected in [({}, 1), ({}, 0), ({"lr": 0.25}, 1), ({}, 0)]:
        uploads.clear()
        training.groups[0].update(changes)
        if not training.optimizer.state:
            training.move_grads(without)
        training.step()
        assert len(uploads) == expected


@pytest.mark.parametrize("name", NAMES)
def test_gradients_come_and_go(name: str) -> None:
    training = Training(name, make_params(), **STATEFUL[name])
    for without in ([0, 1, 2], [1, 2], [0, 2], [0, 1, 2], [1], []):
        training.move_grads(without)
        training.step()


VALUES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 0.125}),
    ("AdamW", {"betas": (0.5, 0.75)}),
    ("AdamW", {"eps": 0.1}),
    ("AdamW", {"weight_decay": 0.5}),
    ("AdamW", {"maximize": True}),
    ("AdamW", {"clipping": 0.5}),
    ("AdamW", {"clipping": 0}),
    ("AdamW", {"clipping": None}),
    ("AdamW", {"agc_eps": 100.0}),
    ("AdamW", {"unit_dim": 1}),
    ("AdamW", {"capturable": True}),
    ("SGD", {"momentum": 0.0}),
    ("SGD", {"momentum": 0.5}),
    ("SGD", {"dampening": 0.0, "nesterov": True}),
    ("RMSprop", {"alpha": 0.5}),
    ("RMSprop", {"momentum": 0.5}),
]


@pytest.mark.parametrize(("name", "change"), VALUES, ids=str)
def test_options_change(name: str, change: dict[str, Any]) -> None:
    options = {"SGD": MOMENTUM, "RMSprop": STATEFUL["RMSprop"]}.get(name, ADAMW)
    training = Training(name, make_params(), **options)
    training.train()
    training.groups[0].update(change)
    training.train()


def test_momentum_is_switched_on() -> None:
    training = Training("SGD", make_params(), lr=0.5, dampening=0.4)
    training.train(2)
    training.groups[0]["momentum"] = 0.9
    training.train(2)


CHANGED_IN_PLACE: list[tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]] = [
    ({"lr": torch.tensor(0.5)}, lambda group: group["lr"].fill_(0.125)),
    ({"lr": torch.tensor([0.5])}, lambda group: group["lr"].mul_(0.25)),
    (
        {"lr": torch.tensor(0.5), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
        lambda group: group["betas"][0].fill_(0.5),
    ),
]


@pytest.mark.parametrize(
    ("options", "change"), CHANGED_IN_PLACE, ids=["lr", "lr of shape (1,)", "betas"]
)
def test_options_change_in_place(
    options: dict[str, Any], change: Callable[[dict[str, Any]], Any]
) -> None:
    training = Training("AdamW", make_params(), **{**ADAMW, **copy.deepcopy(options)})
    training.train()
    change(training.groups[0])
    training.train()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch.optim's"])
def test_state_is_loaded(name: str, ours: bool) -> None:
    options = STATEFUL[name]
    training = Training(name, make_params(), **options)
    training.train()
    before = copy.deepcopy(training.optimizer.state_dict())
    kept = [
        value
        for state in states_of(training.optimizer, training.params)
        for value in state.values()
    ]
    values = copy.deepcopy(kept)
    if ours:
        other = Training(name, make_params(seed=5), **options).optimizer
    else:
        other = {ours.__name__: cls for cls, ours in PAIRS.items()}[f"{name}_AGC"](
            make_params(seed=5), **options
        )
    for group in other.param_groups:
        for i, p in enumerate(group["params"]):
            p.grad = make_grad(p.shape, seed=50 + i).float().to(DEVICE)
    for _ in range(3):
        other.step()
    training.optimizer.load_state_dict(other.state_dict())
    assert not same(training.optimizer.state_dict(), before)
    training.train(2)
    assert same(kept, values)


def test_state_goes_back_to_torch_optim() -> None:
    training = Training("AdamW", make_params(), **ADAMW)
    training.train(2)
    params = [p.detach().clone() for p in training.params]
    theirs = torch.optim.AdamW(params, **ADAMW)
    theirs.load_state_dict(training.optimizer.state_dict())
    training.groups[0]["clipping"] = 0
    training.move_grads()
    oracle = KernelOracle("AdamW", params, **ADAMW, clipping=0)
    oracle.load(params, states_of(theirs, params))
    grads = [p.grad for p in training.params]
    oracle.step(grads)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    theirs.step()
    oracle.check(params, states_of(theirs, params))


def test_a_loaded_momentum_is_not_taken_for_a_first_one() -> None:
    trained = Training("SGD", make_params(), **MOMENTUM)
    trained.train()
    training = Training("SGD", make_params(), **MOMENTUM)
    training.move_grads()
    training.optimizer.found_inf = torch.ones((), device=DEVICE)
    training.optimizer.step()  # skipped: still before the first step
    del training.optimizer.found_inf
    training.optimizer.load_state_dict(trained.optimizer.state_dict())
    training.step()


def test_a_first_step_after_loading_an_untrained_state() -> None:
    training = Training("SGD", make_params(), **MOMENTUM)
    fresh = copy.deepcopy(training.optimizer.state_dict())
    training.train(2)
    training.optimizer.load_state_dict(fresh)
    training.train(2)


def test_groups_are_added() -> None:
    training = Training("AdamW", make_params(), **ADAMW)
    training.train()
    more = make_params(seed=7)
    training.optimizer.add_param_group({"params": more[:2], "lr": 0.25, "clipping": 0.5})
    training.train()
    training.optimizer.add_param_group({"params": more[2:], "maximize": True})
    training.train(2)


def test_parameters_move_to_other_memory() -> None:
    training = Training("AdamW", make_params(), **ADAMW)
    training.train()
    left = [p.detach() for p in training.params]
    values = copy.deepcopy(left)
    for p in training.params:
        p.data = moved(p)
    training.train()
    assert same(left, values)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    "view",
    [lambda t: t.t(), lambda t: t.view(2, 8), lambda t: t.view(-1)],
    ids=["transposed", "reshaped", "flattened"],
)
def test_parameters_change_shape_where_they_are(
    name: str, view: Callable[[Tensor], Tensor]
) -> None:
    training = Training(name, [make_weight((4, 4)).float().to(DEVICE)], lr=0.5)
    training.train()
    (param,) = training.params
    assert param.grad is not None
    grad, param.grad = param.grad, None
    param.data = view(param.data)
    # Where the gradient was, as it would be after a view of it.
    param.grad = view(grad)
    for state in states_of(training.optimizer, [param]):
        state.update({key: view(x) for key, x in state.items() if key != "step"})
    training.step()


def test_parameters_change_dtype_where_they_are() -> None:
    training = Training("SGD", make_params(torch.float16), lr=0.5)
    training.train()
    for p in training.params:
        assert p.grad is not None
        grad, p.grad = p.grad, None
        values, grads = p.to(torch.bfloat16), grad.to(torch.bfloat16)
        p.data = p.data.view(torch.bfloat16).copy_(values)
        p.grad = grad.view(torch.bfloat16).copy_(grads)
    training.step()


STATE_MOVES: dict[str, Callable[[dict[str, Any]], None]] = {
    "replaced": lambda entry: entry.update({k: moved(v) for k, v in entry.items()}),
    "one replaced": lambda entry: entry.update(exp_avg_sq=moved(entry["exp_avg_sq"])),
    "other data": lambda entry: setattr(entry["exp_avg"], "data", moved(entry["exp_avg"])),
    "other storage": lambda entry: entry["exp_avg_sq"].set_(moved(entry["exp_avg_sq"])),
    "step replaced": lambda entry: entry.update(step=torch.tensor(40.0)),
    "step set": lambda entry: entry["step"].fill_(40.0),
}


@pytest.mark.parametrize("move", STATE_MOVES)
def test_states_move_to_other_memory(move: str) -> None:
    training = Training("AdamW", [*make_params(), make_weight((1,)).float().to(DEVICE)], **ADAMW)
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
    training = Training("AdamW", make_params(), **ADAMW)
    training.train()
    for p in training.params:
        training.optimizer.state[p] = copy.deepcopy(training.optimizer.state[p])
    training.train()


def test_the_state_is_cleared() -> None:
    training = Training("AdamW", make_params(), **ADAMW)
    training.train()
    training.optimizer.state.clear()
    training.train(2)
    training.optimizer.state.pop(training.params[1])
    training.train(2)


def test_parameters_are_frozen_and_thawed() -> None:
    training = Training("AdamW", [Parameter(p) for p in make_params()], **ADAMW)
    training.train()
    training.params[1].requires_grad_(False)
    before = training.params[1].detach().clone()
    training.move_grads(without=[1])
    training.step()
    assert torch.equal(training.params[1], before)
    training.params[1].requires_grad_(True)
    training.train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_and_states_change_dtype(dtype: torch.dtype) -> None:
    training = Training("AdamW", make_params(), **ADAMW)
    training.train()
    saved = copy.deepcopy(training.optimizer.state_dict())
    for p in training.params:
        p.grad = None
        p.data = p.data.to(dtype)
    training.optimizer.load_state_dict(saved)
    training.train(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_states_left_in_another_dtype_are_refused(dtype: torch.dtype) -> None:
    training = Training("AdamW", make_params(), **ADAMW)
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
    training = Training("AdamW", make_params(), **ADAMW)
    training.train()
    guard = Guarded(torch.zeros(shape))
    training.optimizer.state[training.params[0]]["exp_avg"] = guard.tensor
    with (
        nothing_changes(training.params, training.optimizer),
        pytest.raises(RuntimeError, match=r"shape|size"),
    ):
        training.optimizer.step()
    guard.assert_intact()


@pytest.mark.parametrize("clipping", [0, CLIPPING])
def test_gradients_of_another_shape_are_refused(clipping: float) -> None:
    training = Training("AdamW", make_params(), **ADAMW, clipping=clipping)
    training.train()
    param = training.params[0]
    assert param.grad is not None
    param.grad = Guarded(param.grad).tensor
    param.data = make_weight((6, 20)).float().to(DEVICE)
    training.optimizer.state.pop(param)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"shape|size"):
        training.optimizer.step()
    assert torch.equal(param, before)


def unaligned(tensor: Tensor) -> Tensor:
    buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return buffer[1:].view(tensor.shape).copy_(tensor)


def vectors(training: Training) -> set[int]:
    return {shape.vector for shape in tile_shapes(training.optimizer)}


def test_gradients_lose_and_regain_alignment() -> None:
    training = Training("AdamW", make_params()[::2], **ADAMW)
    training.train()
    assert vectors(training) == {4}
    training.move_grads(place=unaligned)
    training.step()
    assert vectors(training) == {1}
    training.train()


def test_parameters_and_states_lose_alignment() -> None:
    training = Training("AdamW", make_params()[::2], **ADAMW)
    training.train()
    for p in training.params:
        p.data = unaligned(p.data)
    training.train()
    assert vectors(training) == {1}
    for p in training.params:
        p.data = moved(p)
    training.train()
    assert vectors(training) == {4}
    for p in training.params:
        training.optimizer.state[p]["exp_avg"] = unaligned(training.optimizer.state[p]["exp_avg"])
    training.train()
    assert vectors(training) == {1}


def test_gradients_change_layout() -> None:
    weight = make_weight((4, 3, 2, 2)).float().to(DEVICE)
    training = Training("AdamW", [weight], **ADAMW)
    training.train()
    for layout in (torch.channels_last, torch.contiguous_format):
        training.move_grads(place=partial(torch.clone, memory_format=layout))
        training.step()
    weight.data = weight.data.to(memory_format=torch.channels_last)
    training.train()


def exchange(groups: list[dict[str, Any]]) -> None:
    first, second = (group["params"] for group in groups)
    first[0], second[0] = second[0], first[0]


def replace(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"][0] = make_weight((3, 20), seed=9).float().to(DEVICE)


REGROUPED: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "exchanged": exchange,
    "replaced": replace,
    "reversed": lambda groups: groups.reverse(),
    "removed": lambda groups: groups.pop(),
}


@pytest.mark.parametrize("change", REGROUPED)
def test_parameters_change_groups(change: str) -> None:
    first, second = make_params(), make_params(seed=5)
    groups = [{"params": first}, {"params": second, "lr": 0.125, "clipping": 0.5}]
    training = Training("SGD", groups, **MOMENTUM)
    training.train()
    REGROUPED[change](training.groups)
    before = {p: p.detach().clone() for p in (*first, *second)}
    training.train()
    present = set(training.params)
    for p in before:
        assert (p in present) != torch.equal(p, before[p])


@pytest.mark.parametrize("option", [{"foreach": True}, {"differentiable": True}, {"fused": False}])
def test_an_option_that_means_the_torch_path_is_refused(option: dict[str, Any]) -> None:
    training = Training("AdamW", make_params(), **ADAMW)
    training.train()
    training.groups[0].update(option)
    training.move_grads()
    with (
        nothing_changes(training.params),
        pytest.raises((ValueError, RuntimeError), match="triton"),
    ):
        training.optimizer.step()


def roundtrip(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, roundtrip], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_leave_the_original_alone(name: str, copied: Callable[[Any], Any]) -> None:
    training = Training(name, make_params(), **STATEFUL[name])
    training.train()
    with nothing_changes(training.params, training.optimizer):
        other = Training(name, make_params())
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


def clip_and_check(params: list[Tensor]) -> None:
    before = [None if p.grad is None else p.grad.clone() for p in params]
    adaptive_clip_grad_(params, CLIPPING, backend="triton")
    for p, grad in zip(params, before, strict=True):
        if grad is not None:
            check_clipped(p, grad, p.grad)


def test_clipping_alone_follows_gradients_and_parameters() -> None:
    params = make_params()
    unused = []
    for seed in range(3):
        for i, p in enumerate(params):
            unused.append(p.grad)
            p.grad = make_grad(p.shape, seed=seed + i).float().to(DEVICE)
        params[1].grad = params[1].grad if seed != 1 else None
        clip_and_check(params)
    for p in params:
        p.data = moved(p) * 0.5
        assert p.grad is not None
        p.grad.mul_(100.0)
    clip_and_check(params)
    for p in params:
        assert p.grad is not None
        p.grad = unaligned(p.grad * 100.0)
    clip_and_check(params)


def test_clipping_alone_forgets_parameters_that_are_gone() -> None:
    for seed in range(4):  # ids and addresses come again
        param = make_weight((3, 20), seed=seed).float().to(DEVICE)
        param.grad = make_grad((3, 20), seed=seed).float().to(DEVICE)
        clip_and_check([param])
        del param


def test_clipping_alone_follows_its_options() -> None:
    param = make_weight((4, 4)).float().to(DEVICE)
    grad = make_grad((4, 4)).float().to(DEVICE)
    changes: list[dict[str, Any]] = [{}, {"unit_dim": 1}, {"agc_eps": 10.0}, {"clipping": 0.5}]
    results = []
    for change in changes:
        options = {"clipping": CLIPPING, **change}
        for backend in ("triton", "torch"):
            param.grad = grad.clone()
            adaptive_clip_grad_([param], **options, backend=backend)
            results.append(param.grad)
        torch.testing.assert_close(results[-2], results[-1])
    assert len({tuple(r.flatten().tolist()) for r in results[::2]}) == len(changes)


def test_one_plan_for_one_optimizer() -> None:
    # Two optimizers over the same parameters do not share tables.
    params = make_params()
    first, second = Training("AdamW", params, **ADAMW), Training("AdamW", params, **ADAMW)
    first.train()
    second.train()
    first.step()
    assert isinstance(first.optimizer, AdamW_AGC)
    assert plan_of(first.optimizer) is not plan_of(second.optimizer)
