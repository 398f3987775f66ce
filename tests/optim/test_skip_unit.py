"""nonfinite="skip_unit" beside plans, autograd, sparse gradients, and without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from tests.support.checks import nothing_changes
from tests.support.optimizers import (
    EACH_WAY,
    MODES,
    OURS,
    STATEFUL,
    Kwargs,
    build,
    takes,
)
from tests.support.places import on_device
from tests.support.tensors import weight

# numpy, which the interpreter computes with, warns of inf * 0 and of squares that overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

OPTIONS: dict[str, Kwargs] = {
    name: {**STATEFUL[name], "weight_decay": 0.1, "clipping": 0.05} for name in EACH_WAY
}


every_name = pytest.mark.parametrize("name", EACH_WAY)


def test_counts_outlive_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    params = on_device([weight((3, 4)), weight((40, 30)), weight((5,))])
    optimizer: Any = build("SGD", params, {"backend": "triton", "nonfinite": "skip_unit"})
    expected = 0
    for step, without in enumerate((1, 0, None, 2)):
        for i, p in enumerate(params):
            p.grad = None if i == without else torch.full_like(p, torch.nan)
            expected += 0 if i == without else (3, 40, 1)[i]
        optimizer.step()
        if step % 2:
            optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_units == expected


@pytest.mark.parametrize("mode", ["foreach", "not fused"])
@every_name
def test_a_step_does_not_wait_for_the_device(name: str, mode: str) -> None:
    # Nothing can be read back from the meta device.
    params = [torch.zeros(3, 4, device="meta"), torch.zeros(5, device="meta")]
    options = {**OPTIONS[name], **MODES[mode], "nonfinite": "skip_unit"}
    if not takes(name, "fused"):
        options["foreach"] = mode == "foreach"
        options.pop("fused", None)
    optimizer: Any = build(name, params, options)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        print(optimizer.skipped_units)


def test_derivatives_go_past_skipped_units() -> None:
    param = weight((3, 4)).requires_grad_()
    value = param * 1.0
    optimizer: Any = build(
        "AdamW", [value.detach()], {**OPTIONS["AdamW"], "nonfinite": "skip_unit"}, "differentiable"
    )
    optimizer.param_groups[0]["params"] = [value]
    value.grad = weight((3, 4), seed=1)
    value.grad[1, 2] = torch.nan
    optimizer.step()
    (derivative,) = torch.autograd.grad(value.sum(), param)
    assert torch.equal(derivative[1], torch.ones(4))
    assert bool(derivative.isfinite().all())


@pytest.mark.parametrize("cls", OURS)
def test_sparse_gradients_cannot_be_skipped(cls: Any) -> None:
    param = Parameter(weight((4, 3)))
    optimizer = cls([param], clipping=0, nonfinite="skip_unit")
    param.grad = torch.ones(4, 3).to_sparse(1)
    with nothing_changes([param], optimizer), pytest.raises(RuntimeError, match="propagate"):
        optimizer.step()
