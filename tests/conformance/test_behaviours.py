"""What PyTorch tests of its own optimizers beyond numbers: hooks that act, old and odd checkpoints.

Both paths beside torch.optim; that each hook fires at all is in test_features.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing._internal.common_optimizers import optim_db

from agc_triton import adaptive_clip_grad_
from tests.support.optimizers import PAIRS
from tests.support.places import DEVICE
from tests.support.tensors import parameters, same, set_grads
from tests.support.training import train

SHAPES = ((6, 5), (6,))
STATE: dict[Any, dict[str, Any]] = {
    SGD: {"lr": 0.1, "momentum": 0.9},
    Adam: {"lr": 0.1, "amsgrad": True},
    AdamW: {"lr": 0.1, "weight_decay": 0.1},
    RMSprop: {"lr": 0.1, "momentum": 0.9, "centered": True},
}

every_class = pytest.mark.parametrize("cls", PAIRS)
both_paths = pytest.mark.parametrize("backend", ["torch", "triton"])


def ours(cls: Any, params: Any, backend: str, **options: Any) -> Any:
    return PAIRS[cls](params, **STATE[cls], backend=backend, **options)


def tensors(seed: int = 0) -> list[Any]:
    return [p.detach().to(DEVICE) for p in parameters(SHAPES, seed=seed)]


def states(optimizer: Any, params: list[Tensor]) -> list[Any]:
    return [optimizer.state[p] for p in params]


def test_hooks_run_in_torchs_order() -> None:
    # Those of the class before those of an instance, prepended ones first, loads and saves too.
    def log_of(optimizer: Any, params: Sequence[Tensor]) -> list[str]:
        log: list[str] = []

        def note(what: str) -> Any:
            return lambda *_: log.append(what)

        handles = [
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
        ]
        optimizer.register_step_pre_hook(note("pre"))
        optimizer.register_step_post_hook(note("post"))
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre"):
            register = getattr(optimizer, f"register_{kind}_hook")
            register(note(kind))
            register(note(f"prepended {kind}"), prepend=True)
        optimizer.register_load_state_dict_post_hook(note("loaded"))
        try:
            train(optimizer, params, range(2))
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            for handle in handles:
                handle.remove()
        return log

    for cls in PAIRS:
        params = parameters(SHAPES)
        expected = log_of(cls(params), params)
        assert len(expected) == 15
        for backend in ("torch", "triton"):
            copies = tensors()
            assert log_of(ours(cls, copies, backend), copies) == expected


@both_paths
@every_class
def test_hooks_change_what_is_saved_and_loaded(cls: Any, backend: str) -> None:
    params, copied = tensors(), tensors()
    optimizer, other = ours(cls, params, backend), ours(cls, copied, backend)

    def mark(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "written by": cls.__name__}

    def double_lr(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 2 * group["lr"]} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_state_dict_post_hook(mark)
    other.register_load_state_dict_pre_hook(double_lr)
    train(optimizer, params, range(1))
    train(other, copied, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["written by"] == cls.__name__
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.2
    optimizer.param_groups[0]["lr"] = 0.2
    train(optimizer, params, range(1, 3))
    train(other, copied, range(1, 3))
    assert same(params, copied)
    assert same(states(optimizer, params), states(other, copied))


@both_paths
@every_class
def test_step_hooks_may_change_gradients_and_parameters(cls: Any, backend: str) -> None:
    params, copied = tensors(), tensors()
    optimizer, other = ours(cls, params, backend), ours(cls, copied, backend)

    def negate(hooked: Any, *_: Any) -> None:
        for p in hooked.param_groups[0]["params"]:
            p.grad = -p.grad  # in new memory

    def shrink(hooked: Any, *_: Any) -> None:
        for p in hooked.param_groups[0]["params"]:
            p.data = p.data / 2

    optimizer.register_step_pre_hook(negate)
    optimizer.register_step_post_hook(shrink)
    train(optimizer, params, range(2))
    for seed in range(2):
        set_grads(copied, seed)
        for p in copied:
            assert p.grad is not None
            p.grad.neg_()
        other.step()
        for p in copied:
            p.div_(2)
    assert same(params, copied)
    assert same(states(optimizer, params), states(other, copied))


@both_paths
@every_class
def test_a_checkpoint_of_parameters_in_another_order(cls: Any, backend: str) -> None:
    # torch's own recipe: a pre-hook that puts a checkpoint in order by its names.
    params, copied = tensors(), tensors()
    optimizer = ours(cls, list(zip("ab", params, strict=True)), backend)
    other = ours(cls, list(zip("ba", copied[::-1], strict=True)), backend)

    def by_name(loading: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        (saved,), (group,) = state_dict["param_groups"], loading.param_groups
        place = dict(zip(saved["param_names"], saved["params"], strict=True))
        order = [place[name] for name in group["param_names"]]
        moved = {new: state_dict["state"][old] for new, old in enumerate(order)}
        named = {**saved, "param_names": group["param_names"]}
        return {"state": moved, "param_groups": [named]}

    other.register_load_state_dict_pre_hook(by_name)
    train(optimizer, params, range(2))
    with torch.no_grad():
        for p, value in zip(copied, params, strict=True):
            p.copy_(value)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == ["b", "a"]
    train(optimizer, params, range(2, 4))
    train(other, copied, range(2, 4))
    assert same(params, copied)
    assert same(states(optimizer, params), states(other, copied))


LATER_FLAGS = {info.optim_cls: info.not_og_supported_flags for info in optim_db}


@both_paths
@every_class
def test_pickles_from_before_an_option_existed(cls: Any, backend: str) -> None:
    later = {*LATER_FLAGS[cls], "fused", "capturable", "differentiable", "foreach", "maximize"}
    params = tensors()
    optimizer = ours(cls, params, backend, clipping=0.05)
    train(optimizer, params, range(2))
    old_params, old = copy.deepcopy((params, optimizer))
    for group in old.param_groups:
        for flag in later & group.keys():
            del group[flag]
    old_params, old = pickle.loads(pickle.dumps((old_params, old)))
    (group,), (expected,) = old.param_groups, optimizer.param_groups
    assert {**group, "params": None} == {**expected, "params": None}
    train(optimizer, params, range(2, 4))
    train(old, old_params, range(2, 4))
    assert same(params, old_params)
    assert same(states(optimizer, params), states(old, old_params))


@both_paths
@every_class
def test_averages_of_a_model_and_their_learning_rate(cls: Any, backend: str) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1))
    start = start.to(DEVICE, torch.float64)
    data = torch.randn(8, 4, device=DEVICE, dtype=torch.float64)
    decaying: Any = get_ema_multi_avg_fn  # untyped

    def averages(make: Any) -> list[Any]:
        model = copy.deepcopy(start)
        optimizer = make(model.parameters())
        swa: Any = AveragedModel(model)
        ema: Any = AveragedModel(model, multi_avg_fn=decaying(0.5))
        scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for _ in range(4):
            optimizer.zero_grad()
            (model(data) ** 2).mean().backward()
            optimizer.step()
            swa.update_parameters(model)
            ema.update_parameters(model)
            scheduler.step()
        update_bn([data], swa)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
        return [*swa.state_dict().values(), *ema.state_dict().values()]

    expected = averages(lambda params: cls(params, **STATE[cls]))
    actual = averages(lambda params: ours(cls, params, backend, clipping=1e6))
    # Nothing is clipped; scalars are rounded differently.
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@every_class
def test_a_compiled_training_step_on_the_triton_path(cls: Any) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(DEVICE)
    inputs = torch.randn(5, 4, device=DEVICE)

    def run(compiled: bool) -> list[Any]:
        model = copy.deepcopy(start)
        optimizer = ours(cls, model.parameters(), "triton")

        def training_step() -> None:
            optimizer.zero_grad()
            (model(inputs) ** 2).sum().backward()
            optimizer.step()

        step = torch.compile(training_step, backend="eager") if compiled else training_step
        for _ in range(3):
            step()
        return [*model.parameters(), *states(optimizer, list(model.parameters()))]

    assert same(run(compiled=True), run(compiled=False))


# Without a state the first step; torch.optim's states can be written to where they were made only.
IN_INFERENCE_MODE = [(SGD, {"lr": 0.1}, 0), *((cls, options, 1) for cls, options in STATE.items())]


@pytest.mark.usefixtures("either_block")
@pytest.mark.parametrize("nonfinite", ["propagate", "skip_unit"])
@pytest.mark.parametrize(("cls", "options", "step"), IN_INFERENCE_MODE)
def test_a_step_in_inference_mode_between_others(
    cls: Any, options: dict[str, Any], step: int, nonfinite: str
) -> None:
    def run(make: Any) -> list[Any]:
        params = parameters(SHAPES)
        optimizer = make(params, **options)
        for seed in range(4):
            if seed == step:  # so that the plan is made anew
                for p in params:
                    p.data = p.data.clone()
            set_grads(params, seed)
            with torch.inference_mode(seed == step):
                optimizer.step()
        return [p.detach() for p in params]

    def ours(params: Any, **options: Any) -> Any:
        return PAIRS[cls](params, **options, clipping=1e6, nonfinite=nonfinite)

    torch.testing.assert_close(run(ours), run(cls))


def torch_starts_under(default: str, cls: Any) -> bool:
    """Whether a first step succeeds; Adam of torch 2.11 keeps its count on the default device."""
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    try:
        with torch.device(default):
            cls([param], foreach=False).step()
    except RuntimeError:
        return False
    return True


@pytest.mark.usefixtures("either_block")
@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, STATE], ids=["plain", "stateful"])
@every_class
def test_the_default_device_is_no_matter(
    cls: Any, options: dict[Any, Any], dtype: torch.dtype, backend: str
) -> None:
    starts = torch_starts_under("meta", cls)

    def stepped(default: str) -> list[Any]:
        params: list[Any] = [t.detach().to(DEVICE) for t in parameters([(6, 5)], dtype)]
        chosen = options.get(cls, {"lr": 0.1})
        optimizer = PAIRS[cls](params, **chosen, backend=backend)
        for seed in range(2):
            set_grads(params, seed)
            with torch.device(default if seed or starts else "cpu"):
                optimizer.step()
        return [*params, *states(optimizer, params)]

    assert same(stepped("meta"), stepped("cpu"))


class OnGPU(Tensor):
    """A step count that says it is on one, as after training there."""

    device = property(lambda self: torch.device("cuda:0"))
    is_cpu = property(lambda self: False)

    def to(self, device: torch.device) -> Tensor:  # type: ignore[override]  # as it is called
        """Its value, on a CPU."""
        assert device.type == "cpu"
        return self.as_subclass(Tensor).clone()


@pytest.mark.parametrize("mode", [{}, {"foreach": True}, {"clipping": 0}], ids=str)
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_step_counts_follow_their_parameters_to_the_cpu(cls: Any, mode: dict[str, Any]) -> None:
    def run(between: Any) -> list[Any]:
        params: list[Any] = parameters()
        optimizer = PAIRS[cls](params, lr=0.1, **mode)
        for seed in range(2):
            set_grads(params, seed)
            optimizer.step()
            for state in optimizer.state.values():
                state["step"] = between(state["step"])
        set_grads(params, 2)
        optimizer.step()
        assert all(type(state["step"]) is Tensor for state in optimizer.state.values())
        return [*params, *states(optimizer, params)]

    assert same(run(lambda step: step.as_subclass(OnGPU)), run(lambda step: step))


@every_class
def test_a_process_forked_after_cuda_was_used_steps_on_the_cpu(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> bool:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    params = [p.detach().cpu() for p in parameters()]
    optimizer = PAIRS[cls](params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    adaptive_clip_grad_(params)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_a_step_count_elsewhere_is_never_read_as_host_memory(cls: Any) -> None:
    params = parameters()
    optimizer = ours(cls, params, "torch")
    set_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy(params)
    for state in optimizer.state.values():
        state["step"] = state["step"].to("meta")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        optimizer.step()
    assert same(params, before)


@both_paths
@every_class
def test_a_backward_pass_over_weights_that_have_changed_raises(cls: Any, backend: str) -> None:
    # As after torch.optim's own steps but the fused ones; silently wrong otherwise.
    params = [p.detach().to(DEVICE).requires_grad_() for p in parameters(SHAPES)]
    optimizer = ours(cls, params, backend)
    for _ in range(2):
        loss = torch.stack([(p * p).sum() for p in params]).sum()
        torch.autograd.backward(loss, retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(loss)


@both_paths
def test_parameters_made_in_inference_mode_have_no_versions_to_count(backend: str) -> None:
    with torch.inference_mode():
        params = [torch.ones(3, 4, device=DEVICE)]
        params[0].grad = torch.ones(3, 4, device=DEVICE)
        ours(SGD, params, backend).step()
    assert bool((params[0] != 1).all())
