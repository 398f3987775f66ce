"""Plans of clipping alone follow parameters, gradients and options, and outlive neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton import adaptive_clip_grad_
from agc_triton.triton_path.launches import Launch
from tests.support.checks import check_clipped
from tests.support.optimizers import CLIPPING
from tests.support.places import DEVICE, few_weights
from tests.support.tensors import grad_like, moved, unaligned, weight

pytestmark = pytest.mark.usefixtures("poisoned_scratch")


def clip_and_check(params: list[Tensor]) -> None:
    before = [None if p.grad is None else p.grad.clone() for p in params]
    adaptive_clip_grad_(params, clipping=CLIPPING, backend="triton")
    for p, grad in zip(params, before, strict=True):
        if grad is not None:
            check_clipped(p, grad, p.grad)


def test_clipping_alone_follows_gradients_and_parameters() -> None:
    params = few_weights()
    unused = []
    for seed in range(3):
        for i, p in enumerate(params):
            unused.append(p.grad)
            p.grad = grad_like(p, seed + i)
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


def test_an_interrupted_clip_leaves_nothing_to_be_written_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    param = weight((3, 20), device=DEVICE)
    first = param.grad = grad_like(param.t().contiguous()).t()  # laid out unlike its parameter
    before = first.clone()

    def interrupted(_launch: Launch, *_varying: Any) -> None:
        raise KeyboardInterrupt

    adaptive_clip_grad_(param, clipping=1e9, backend="triton")  # the plan is made
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "fire", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adaptive_clip_grad_(param, clipping=CLIPPING, backend="triton")
    first.fill_(7.0)
    param.grad = before.contiguous()
    clip_and_check([param])
    assert (first == 7.0).all()


def test_clipping_alone_forgets_parameters_that_are_gone() -> None:
    for seed in range(4):  # ids and addresses come again
        param = weight((3, 20), device=DEVICE, seed=seed)
        param.grad = grad_like(param, seed)
        clip_and_check([param])
        del param


def test_clipping_alone_follows_its_options() -> None:
    param = weight((4, 4), device=DEVICE)
    grad = grad_like(param)
    changes: list[dict[str, Any]] = [{}, {"unit_dim": 1}, {"agc_eps": 10.0}, {"clipping": 0.5}]
    results = []
    for change in changes:
        param.grad = grad.clone()
        options = {"clipping": CLIPPING, **change}
        adaptive_clip_grad_([param], **options, backend="triton")
        check_clipped(param, grad, param.grad, **options)
        results.append(tuple(param.grad.flatten().tolist()))
    assert len(set(results)) == len(changes)


def test_clipping_alone_writes_gradients_laid_out_unlike_their_parameters() -> None:
    layouts = (torch.channels_last, torch.contiguous_format)
    params = [
        weight((4, 3, 2, 2), device=DEVICE, seed=i).contiguous(memory_format=layout)
        for i, layout in enumerate(layouts)
    ]
    for step in range(2):
        for i, (p, layout) in enumerate(zip(params, layouts[::-1], strict=True)):
            grad = grad_like(p, 2 * step + i)
            p.grad = grad.contiguous(memory_format=layout)
        clip_and_check(params)


@pytest.mark.parametrize("view", [torch.t, lambda t: t.view(2, 8)], ids=["transposed", "reshaped"])
def test_clipping_alone_follows_shapes(view: Callable[[Tensor], Tensor]) -> None:
    param = weight((4, 4), device=DEVICE)
    param.grad = grad_like(param)
    clip_and_check([param])
    grad, param.grad = param.grad.mul_(100.0), None
    param.data = view(param.data)
    param.grad = view(grad)
    clip_and_check([param])


def test_the_backend_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    fired: list[Launch] = []
    monkeypatch.setattr(Launch, "fire", lambda launch, *varying: fired.append(launch))
    param = weight((3, 20), device=DEVICE)
    param.grad = grad_like(param)
    for backend, launches in (("torch", 0), ("triton", 2), ("torch", 0), ("triton", 2)):
        fired.clear()
        adaptive_clip_grad_([param], clipping=CLIPPING, backend=backend)
        assert len(fired) == launches
