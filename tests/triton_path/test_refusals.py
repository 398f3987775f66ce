"""What the Triton path refuses before any number has moved."""

from __future__ import annotations

import pytest
import torch

from tests.support.optimizers import TRITON, build
from tests.support.places import DEVICE, few_weights
from tests.support.tensors import grad_like, same, weight
from tests.support.training import Training


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_a_hyperparameter_on_the_device_of_another_dtype(name: str) -> None:
    params = few_weights()
    for p in params:
        p.grad = grad_like(p)
    before = [p.clone() for p in params]
    rate = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    optimizer = build(name, params, {"lr": rate, "capturable": True, **TRITON})
    with pytest.raises(RuntimeError, match=r"must be float32, not torch\.float64, in .*group 0"):
        optimizer.step()
    assert same(params, before)
    optimizer.param_groups[0]["lr"] = rate.float()
    optimizer.step()
    assert not same(params, before)


def test_a_parameter_that_loses_rows_where_it_is() -> None:
    # Its strides and address are what they were; what is left of it is not dense.
    training = Training("SGD", [weight((3, 4), device=DEVICE).t()], lr=0.5)
    training.train()
    (param,) = training.params
    whole = param.data
    before = whole.clone()
    param.data = whole[:1]
    with pytest.raises(RuntimeError, match="shape"):
        training.optimizer.step()
    assert torch.equal(whole, before)


def test_a_parameter_that_is_in_its_group_twice() -> None:
    # Two programs would update it at once.
    param = weight((3, 4), device=DEVICE)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = build("SGD", [param, param], {"lr": 0.5, **TRITON})
    param.grad = grad_like(param)
    before = param.clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*twice"):
        optimizer.step()
    assert torch.equal(param, before)
