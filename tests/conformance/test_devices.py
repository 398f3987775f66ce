"""Step counts and defaults on other devices, forked processes, inference mode."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD

from agc_triton import adaptive_clip_grad_
from tests.conformance.pairs import STATE, ours
from tests.support.checks import states_of
from tests.support.optimizers import EACH_WAY, PAIRS
from tests.support.places import DEVICE
from tests.support.soak import soaked
from tests.support.tensors import parameters, same, set_grads

SHAPES = ((6, 5), (6,))


every_class = pytest.mark.parametrize("cls", PAIRS)


both_paths = pytest.mark.parametrize("backend", ["torch", "triton"])


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


def quick(cls: Any, backend: str, kind: str, dtype: torch.dtype) -> bool:
    if backend == "triton" and cls.__name__ not in EACH_WAY:
        return False
    return (kind, dtype) in (("plain", torch.bfloat16), ("stateful", torch.float32))


@pytest.mark.usefixtures("either_block")
@pytest.mark.parametrize(
    ("cls", "backend", "kind", "dtype"),
    soaked(
        [
            case
            for case in itertools.product(
                PAIRS, ("torch", "triton"), ("plain", "stateful"), (torch.float32, torch.bfloat16)
            )
            # Every step of torch's own ASGD makes an eta on the default device.
            if case[:2] != (ASGD, "torch")
        ],
        quick,
    ),
    ids=str,
)
def test_the_default_device_is_no_matter(
    cls: Any, backend: str, kind: str, dtype: torch.dtype
) -> None:
    starts = torch_starts_under("meta", cls)

    def stepped(default: str) -> list[Any]:
        params: list[Any] = [t.detach().to(DEVICE) for t in parameters([(6, 5)], dtype)]
        chosen = STATE[cls] if kind == "stateful" else {"lr": 0.1}
        optimizer = PAIRS[cls](params, **chosen, backend=backend)
        for seed in range(2):
            set_grads(params, seed)
            with torch.device(default if seed or starts else "cpu"):
                optimizer.step()
        return [*params, *states_of(optimizer, params)]

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
        return [*params, *states_of(optimizer, params)]

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
    before = [p.clone() for p in params]
    optimizer = PAIRS[cls](params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(map(torch.equal, params, before))
    adaptive_clip_grad_(params)
    assert all(p.grad is not None and bool((p.grad < 1).all()) for p in params)


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
def test_parameters_made_in_inference_mode_have_no_versions_to_count(backend: str) -> None:
    with torch.inference_mode():
        params = [torch.ones(3, 4, device=DEVICE)]
        params[0].grad = torch.ones(3, 4, device=DEVICE)
        ours(SGD, params, backend).step()
    assert bool((params[0] != 1).all())
