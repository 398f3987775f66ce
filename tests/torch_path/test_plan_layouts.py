"""What is asked of parameters and gradients before every step, and what a plan expects of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from agc_triton import SGD_AGC, snapshot, validation
from agc_triton.snapshot import Layouts
from agc_triton.triton_path.gradients import Gradients
from tests.support.tensors import set_grads

OTHERS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda t: None,
    "sparse": lambda t: t.to_sparse(),
    "transposed": lambda t: t.t(),
    "narrowed": lambda t: t[:2],
    "of another rank": lambda t: t[None],
    "double": lambda t: t.double(),
    "on another device": lambda t: t.to("meta"),
    "negated lazily": lambda t: torch.complex(t, t).conj().imag,
}


def made_otherwise(*_tensors: Tensor) -> None:
    """Guards of another torch, which has other arguments."""


@pytest.fixture(params=["guards", "no guards", "other guards"])
def _guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no guards":
        monkeypatch.setattr(snapshot, "TensorGuards", None)
    elif request.param == "other guards":
        monkeypatch.setattr(snapshot, "TensorGuards", made_otherwise)
    else:
        assert snapshot.TensorGuards is not None, "torch has moved them: see snapshot.py"


def tensors() -> list[Tensor]:
    return [torch.randn(3, 3), torch.randn(3, 3).t(), torch.tensor(1.0)]


@pytest.mark.usefixtures("_guards")
@pytest.mark.parametrize("other", OTHERS)
def test_only_tensors_laid_out_alike_fit(other: str) -> None:
    kept = Layouts(tensors())
    for _ in range(2):  # the second time guards answer, where there are any
        assert kept.fit(tensors())
        changed = tensors()
        assert not kept.fit([OTHERS[other](changed[0]), *changed[1:]])


@pytest.mark.usefixtures("_guards")
def test_the_class_and_whether_a_gradient_is_wanted_do_not_matter() -> None:
    kept = Layouts(tensors())
    assert kept.fit(tensors())
    assert kept.fit([Parameter(t) for t in tensors()])
    assert kept.fit([t.requires_grad_() for t in tensors()])


@pytest.mark.usefixtures("_guards")
def test_no_tensor_is_kept_alive() -> None:
    given = tensors()
    kept = Layouts(given)
    assert kept.fit(given)
    seen = [weakref.ref(t) for t in given]
    del given
    gc.collect()
    assert not any(ref() is not None for ref in seen)


@pytest.mark.usefixtures("_guards")
def test_gradients_may_differ_where_a_size_is_one() -> None:
    param = Parameter(torch.randn(4, 1, 1, 1))
    gradients = Gradients([param], param.dtype)
    for _ in range(2):
        param.grad = torch.randn(4, 1, 1, 1).as_strided((4, 1, 1, 1), (1, 7, 7, 7))
        assert gradients.read([param]) == [param.grad.data_ptr()]
    param.grad = None
    assert gradients.read([param]) == [0]


@pytest.mark.usefixtures("_guards")
def test_gradients_laid_out_otherwise_are_copied_there_and_back() -> None:
    param, other = Parameter(torch.randn(3, 2)), Parameter(torch.randn(3))
    param.grad, other.grad = torch.randn(2, 3).t(), torch.randn(3)
    gradients = Gradients([param, other], param.dtype)
    addresses = gradients.read([param, other])
    assert addresses is not None
    assert addresses[0] not in (0, param.grad.data_ptr())
    assert addresses[1] == other.grad.data_ptr()
    before = param.grad.clone()
    gradients.write_back()
    assert torch.equal(param.grad, before)


@pytest.mark.parametrize("other", ["sparse", "narrowed", "double"])
def test_gradients_that_no_plan_takes(other: str) -> None:
    param = Parameter(torch.randn(3, 3))
    gradients = Gradients([param], param.dtype)
    changed = OTHERS[other](torch.randn(3, 3))
    assert changed is not None
    replaced = Parameter(changed.to_dense()) if other == "narrowed" else param
    if other == "double":
        replaced = Parameter(param.double())
    replaced.grad = changed
    assert gradients.read([replaced]) is None


@pytest.mark.usefixtures("_guards")
def test_gradients_negated_lazily_are_read_through_a_copy() -> None:
    param = Parameter(torch.randn(3, 3))
    for _ in range(2):
        grad = torch.randn(3, 3)
        param.grad = torch._neg_view(grad)
        (address,) = Gradients([param], param.dtype).read([param]) or [0]
        assert address not in (0, grad.data_ptr())


@pytest.mark.usefixtures("_guards")
def test_checks_are_made_again_only_when_something_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [Parameter(torch.ones(4, 3)), Parameter(torch.ones(5, dtype=torch.bfloat16))]
    optimizer = SGD_AGC(params, lr=0.1)
    checked: list[int] = []
    monkeypatch.setattr(validation, "check_grad", lambda *args: checked.append(1))

    def step_checks() -> int:
        checked.clear()
        optimizer.step()
        return len(checked)

    set_grads(params, 0)
    assert step_checks() == 2
    set_grads(params, 1)
    assert step_checks() == 0
    params[0].grad = torch.ones(3, 4).t()
    assert step_checks() == 2
    params[1].grad = None
    assert step_checks() == 1
    optimizer.param_groups[0]["unit_dim"] = 1
    optimizer.param_groups[0]["params"] = params[:1]
    assert step_checks() == 1
    assert step_checks() == 0
