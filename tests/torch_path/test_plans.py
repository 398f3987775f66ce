"""The torch path keeps its blocks from step to step, and nothing that it should not keep."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions
from torch.nn import Parameter

from agc_triton.optim import OPTIMIZERS
from agc_triton.torch_path.plan import BlockPlan
from tests.support.optimizers import ADAMW, NAMES, STATEFUL, TORCHS, build
from tests.support.tensors import parameters, weight
from tests.support.training import Training, train

# Small ones share a block, the last two are cut: rows, and one unit.
SHAPES = ((4,), (2, 3), (), (8, 5), (37,))


pytestmark = pytest.mark.usefixtures("small_blocks")


def make_training(name: str = "AdamW", **options: Any) -> Training:
    params = [weight(shape, seed=i) for i, shape in enumerate(SHAPES)]
    return Training(name, params, **{**STATEFUL[name], **options}, backend="torch")


def plans_of(optimizer: Any) -> dict[tuple[int, ...], BlockPlan]:
    return {at: cached.plan for at, cached in optimizer._paths.torch.blocks.items() if cached.plan}


@pytest.mark.parametrize("name", NAMES)
def test_kept_while_gradients_and_values_change(name: str) -> None:
    training = make_training(name)
    training.train(2)
    plans = plans_of(training.optimizer)
    assert plans
    training.groups[0].update(lr=0.25, clipping=0.5, agc_eps=0.1, maximize=True)
    training.train(2)
    assert plans_of(training.optimizer) == plans


def test_dropped_where_nothing_is_stepped() -> None:
    training = make_training("SGD")
    training.train()
    assert list(plans_of(training.optimizer)) == [(0, 0)]  # momentum buffers that start
    training.train()
    assert list(plans_of(training.optimizer)) == [(0, 1)]
    training.optimizer.zero_grad()
    training.optimizer.step()
    assert not plans_of(training.optimizer)


def test_made_anew_for_other_units() -> None:
    training = make_training()
    training.train()
    plans = plans_of(training.optimizer)
    training.groups[0].update(unit_dim=-1)
    training.train()
    assert plans_of(training.optimizer) != plans


@pytest.mark.parametrize("others", [(), ((3, 2),)], ids=["alone", "beside another"])
def test_what_had_holes_goes_in_blocks_once_it_is_dense(
    others: tuple[tuple[int, ...], ...],
) -> None:
    # Else it would be rounded otherwise than by an optimizer that meets it dense.
    base, rest = weight((4, 6), torch.bfloat16), [weight(s, torch.bfloat16) for s in others]
    params = [Parameter(p) for p in (base[:, ::2], *rest)]
    optimizer = build("AdamW", params, ADAMW)
    train(optimizer, params, range(2))
    plans = plans_of(optimizer)
    assert [plan.whole for plan in plans.values()] == [[0]]
    train(optimizer, params, range(2, 4))
    assert plans_of(optimizer) == plans
    params[0].data = params[0].detach().contiguous()
    copies = copy.deepcopy(params)
    fresh = build("AdamW", copies, ADAMW)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_params in ((optimizer, params), (fresh, copies)):
        train(each, its_params, range(4, 8))
        assert [plan.whole for plan in plans_of(each).values()] == [[]]
    assert all(map(torch.equal, params, copies))


def test_what_was_there_twice_goes_in_blocks_once_it_is_not() -> None:
    one, other = parameters([(4, 3), (4, 3)])
    optimizer = build("SGD", [one, other], {"lr": 0.1})
    optimizer.param_groups[0]["params"] = [one, one]
    train(optimizer, [one, other], range(2))
    assert [plan.whole for plan in plans_of(optimizer).values()] == [[0, 1]]
    optimizer.param_groups[0]["params"] = [one, other]
    train(optimizer, [one, other], range(2))
    assert [plan.whole for plan in plans_of(optimizer).values()] == [[]]


@pytest.mark.parametrize("layout", ["alike", "transposed"])
def test_no_gradient_is_kept(layout: str) -> None:
    params = [weight((4, 6)), weight((3, 2))]
    optimizer = build("AdamW", params, ADAMW)
    for _ in range(2):
        grads: list[Tensor] = [weight(p.shape, seed=9) for p in params]
        if layout == "transposed":
            grads = [g.t().contiguous().t() for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        kept = [weakref.ref(g) for g in grads]
        del grads, p, g
        optimizer.zero_grad()
        assert [ref() for ref in kept] == [None, None]


def both(name: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """An AGC class that clips nothing and torch's own, as that has it updated."""
    options = STATEFUL[name]
    foreach = OPTIMIZERS[name].rule.foreach or None
    return (
        lambda params: build(name, params, {**options, "clipping": 1e6}),
        lambda params: getattr(torch.optim, name)(params, **options, foreach=foreach),
    )


NO_LONGER: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0, "nesterov": False},
    "AdamW": {"amsgrad": False},
    "RMSprop": {"momentum": 0},
}


@pytest.mark.parametrize("mode", ["default", "foreach", "not clipped"])
@pytest.mark.parametrize("name", NO_LONGER)
def test_a_state_is_no_longer_used(name: str, mode: str) -> None:
    options = {**STATEFUL[name], "foreach": True if mode == "foreach" else None}
    clipping = 0 if mode == "not clipped" else 1e6

    def run(make: Callable[..., Any], **ours: Any) -> list[Tensor]:
        params = parameters([(4, 3), (4,)])
        optimizer = make(params, **options, **ours)
        train(optimizer, params, range(2))
        optimizer.param_groups[0].update(NO_LONGER[name])
        train(optimizer, params, range(2, 4))
        return [p.detach() for p in params]

    torch.testing.assert_close(
        run(OPTIMIZERS[name], clipping=clipping, backend="torch"), run(TORCHS[name])
    )


@pytest.mark.parametrize("shape", [(4, 3), (4,)])
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_that_takes_over_anothers_memory_is_updated_there(
    name: str, shape: tuple[int, ...]
) -> None:
    def run(make: Callable[[Any], Any]) -> list[Tensor]:
        (old,) = parameters([shape])
        optimizer = make([old])
        train(optimizer, [old], range(2))
        new = Parameter(old.data)
        optimizer.param_groups[0]["params"] = [new]
        optimizer.state[new] = optimizer.state.pop(old)
        old.data = torch.zeros(shape)
        train(optimizer, [new], range(2, 4))
        return [old.detach(), new.detach()]

    torch.testing.assert_close(*map(run, both(name)))


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_has_moved_from_under_the_blocks_is_noticed(name: str) -> None:
    # As after resize_(0), where the parameter's next memory may be what has just been freed.
    def run(moves: bool) -> Tensor:
        memory = bytearray(48)
        (param,) = parameters([(4, 3)])
        param.data = torch.frombuffer(memory, dtype=torch.float32).view(4, 3).copy_(param.detach())
        optimizer = build(name, [param], STATEFUL[name])
        train(optimizer, [param], range(2))
        if moves:
            before = param.untyped_storage()
            param.data = torch.frombuffer(memory, dtype=torch.float32).view(4, 3)
            before.share_memory_()
        train(optimizer, [param], range(2, 4))
        return param.detach()

    assert torch.equal(run(moves=True), run(moves=False))


@pytest.fixture
def conversion_swaps() -> Iterator[None]:
    """Module.to() and the like swap parameters for converted ones."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("conversion_swaps")
@pytest.mark.parametrize("name", NAMES)
def test_parameters_can_be_swapped_after_a_step(name: str) -> None:
    def run(make: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(36, 2))
        params = list(model.parameters())
        optimizer = make(params)
        train(optimizer, params, range(1, 2))
        model.double()
        for state in optimizer.state.values():
            state.update({key: s.double() for key, s in state.items() if key != "step"})
        train(optimizer, params, range(3, 5))
        return [p.detach() for p in params]

    torch.testing.assert_close(*map(run, both(name)))


def memory_of(tensors: Iterable[Tensor]) -> list[Any]:
    """Weak references to memory: its Python objects come and go."""
    watch: Any = reductions.StorageWeakRef
    return [watch(t.untyped_storage()) for t in tensors]


def test_states_replaced_by_a_checkpoint_are_not_kept() -> None:
    training = make_training()
    training.train()
    memory = memory_of(x for state in training.optimizer.state.values() for x in state.values())
    checkpoint = copy.deepcopy(training.optimizer.state_dict())
    assert not any(one.expired() for one in memory)
    training.optimizer.load_state_dict(checkpoint)
    assert all(one.expired() for one in memory)
    training.train()


def test_parameters_replaced_are_not_kept_after_the_next_step() -> None:
    training = make_training()
    training.train()
    memory = memory_of(training.params)
    for p in training.params:
        p.data = p.detach().clone()
    del p
    training.train()
    assert all(one.expired() for one in memory)


def test_a_copy_and_a_pickle_have_plans_of_their_own() -> None:
    training = make_training()
    training.train()
    again = copy.deepcopy(training.optimizer)
    assert not plans_of(again)
    assert again._paths.torch.blocks is not training.optimizer._paths.torch.blocks


def test_gradients_of_other_strides_are_copied_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = make_training()
    alive: list[int] = []
    copies: list[weakref.ref[Tensor]] = []
    empty_like = torch.empty_like

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        alive.append(sum(ref() is not None for ref in copies))
        copies.append(weakref.ref(made := empty_like(*args, **kwargs)))
        return made

    def turned(values: Tensor) -> Tensor:
        return values.t().contiguous().t() if values.dim() == 2 else values

    training.train()
    training.move_grads(place=turned)
    monkeypatch.setattr(torch, "empty_like", counted)
    training.optimizer.step()
    assert alive == [0, 0]
