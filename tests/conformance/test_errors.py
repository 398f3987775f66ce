"""Whatever torch.optim refuses, the AGC classes refuse with torch's type and message."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from tests.support.checks import nothing_changes
from tests.support.optimizers import PAIRS
from tests.support.tensors import parameters
from tests.support.training import train

# What torch only warns of has to be warned of here too.
pytestmark = pytest.mark.filterwarnings("error:optimizer contains a parameter group with duplicate")


def error_of(make: Callable[[], Any]) -> tuple[type[BaseException], str]:
    """What torch or we raise, warnings included."""
    with pytest.raises((TypeError, ValueError, RuntimeError, UserWarning, FutureWarning)) as caught:
        make()
    return caught.type, str(caught.value)


def leaf() -> Parameter:
    return Parameter(torch.ones(2, 3))


BAD_ARGUMENTS: list[tuple[Any, dict[str, Any]]] = [
    *((cls, {"lr": -1.0}) for cls in PAIRS),
    *((cls, {"weight_decay": -0.5}) for cls in PAIRS),
    *((cls, {"no_such_option": 1}) for cls in PAIRS),
    *((cls, {"lr": torch.ones(2)}) for cls in PAIRS),
    *((cls, {"eps": -1e-8}) for cls in PAIRS if cls is not SGD),
    *((cls, {"fused": True, "foreach": True}) for cls in PAIRS),
    *((cls, {"fused": True, "differentiable": True}) for cls in PAIRS),
    (SGD, {"momentum": -0.5}),
    (SGD, {"nesterov": True}),
    (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    (Adam, {"betas": (0.9, 1.0)}),
    (Adam, {"lr": torch.tensor(0.1), "foreach": True}),
    (RMSprop, {"alpha": -0.1}),
    (RMSprop, {"momentum": -0.1}),
]


@pytest.mark.parametrize(("cls", "options"), BAD_ARGUMENTS)
def test_bad_arguments_get_torchs_message(cls: Any, options: dict[str, Any]) -> None:
    theirs = error_of(lambda: cls([leaf()], **options))
    assert error_of(lambda: PAIRS[cls]([leaf()], **options)) == theirs


BAD_PARAMS: list[Callable[[], Any]] = [
    leaf,
    list,
    lambda: [leaf() * 2],
    lambda: ["weight"],
    lambda: [{"params": {leaf()}}],
    lambda: [{"lr": 0.1}],
    lambda: [leaf(), {"params": [leaf()]}],
    lambda: [{"params": [leaf()]}, [leaf()]],
    lambda: [("a", leaf()), leaf()],
    lambda: [{"params": [("a", leaf())]}, {"params": [leaf()]}],
    lambda: [{"params": [p]} for p in [leaf()] * 2],
    lambda: [leaf()] * 2,
]


@pytest.mark.parametrize("params", BAD_PARAMS)
@pytest.mark.parametrize("cls", PAIRS)
def test_bad_parameters_get_torchs_message(cls: Any, params: Callable[[], Any]) -> None:
    def outcome(make: Any) -> Any:
        try:
            make(params())
        except (TypeError, ValueError, KeyError, UserWarning) as error:
            return type(error), str(error)
        return None

    assert outcome(PAIRS[cls]) == outcome(cls) is not None


TORCHS_ERROR_INPUTS: list[Any] = [
    pytest.param(info.optim_cls, case, id=f"{info.name}-{case.optimizer_error_input.desc}")
    for info in optim_db
    if info.optim_cls in PAIRS
    for case in info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("cls", "case"), TORCHS_ERROR_INPUTS)
def test_torchs_own_error_inputs(cls: Any, case: Any) -> None:
    given = case.optimizer_error_input
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = [leaf()] if given.params is None else given.params
    with pytest.raises(case.error_type, match=case.error_regex) as caught:
        PAIRS[cls](copy.deepcopy(params), **given.kwargs)
    theirs = error_of(lambda: cls(copy.deepcopy(params), **given.kwargs))
    assert (caught.type, str(caught.value)) == theirs


@pytest.mark.parametrize("cls", PAIRS)
def test_groups_and_checkpoints_that_do_not_fit_get_torchs_message(cls: Any) -> None:
    params = parameters([(4, 3), (2,)])
    ours, theirs = PAIRS[cls](params), cls(parameters([(4, 3), (2,)]))
    train(ours, params, range(1))
    saved: dict[str, Any] = cls([leaf()]).state_dict()
    bad: list[Callable[[Optimizer], Any]] = [
        lambda o: o.add_param_group([leaf()]),  # type: ignore[arg-type]  # wrong on purpose
        lambda o: o.add_param_group({"params": [o.param_groups[0]["params"][1]]}),
        lambda o: o.add_param_group({"params": [("name", leaf())]}),
        lambda o: o.add_param_group({"params": [leaf() * 2]}),
        lambda o: o.load_state_dict(saved),
        lambda o: o.load_state_dict({**saved, "param_groups": saved["param_groups"] * 2}),
    ]
    for act in bad:
        expected = error_of(lambda act=act: act(theirs))  # type: ignore[misc]  # binds it now
        with nothing_changes(params, ours):
            assert error_of(lambda act=act: act(ours)) == expected  # type: ignore[misc]  # likewise
