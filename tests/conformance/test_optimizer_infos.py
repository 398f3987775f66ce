"""The configurations that torch tests its own optimizers with, where no unit is over its limit.

The torch path without clipping, and its modes with, are in test_parity, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from tests.support.checks import oracle_for, step_and_check, tolerance_key
from tests.support.optimizers import EACH_WAY, NAMES, PAIRS, build
from tests.support.oracle import Oracle
from tests.support.places import KERNELS, on_device
from tests.support.tensors import grads_like, weights
from tests.support.tolerances import TOLERANCES

# What torch only warns of has to be warned of here too.
pytestmark = pytest.mark.filterwarnings("error:optimizer contains a parameter group with duplicate")

INFOS: dict[str, Any] = {info.name: info for info in optim_db if info.name in NAMES}
SHAPES = ((4, 24), (7,), (), (2, 3, 2))
FEW = SHAPES[:2]  # in the interpreter
STEPS = 2
UNREACHED: dict[str, Any] = {"clipping": 1e4}  # gradients are at most twenty times their weights

# torch lists capturable for CUDA only; the kernels take it wherever they run.
CONFIGURATIONS = [
    (name, given) for name, info in INFOS.items() for given in info.optim_inputs_func(device="cuda")
]
INPUTS = [
    pytest.param(name, given.kwargs, id=f"{name}: {given.desc}") for name, given in CONFIGURATIONS
]
# The others' flags are in tests/kernels/test_rules.py.
IN_KERNELS = [
    pytest.param(
        name,
        given.kwargs,
        id=f"{name}: {given.desc}",
        marks=() if name in EACH_WAY or given.desc == "default" else pytest.mark.soak,
    )
    for name, given in CONFIGURATIONS
]


def check_steps(oracle: Oracle, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    """Steps on one sequence of gradients, whoever takes them."""
    for step in range(STEPS):
        step_and_check(optimizer, oracle, params, grads_like(params, step))


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize(("name", "options"), INPUTS)
def test_nothing_is_clipped_and_torchs_numbers_come_out(name: str, options: dict[str, Any]) -> None:
    known = {key: value for key, value in options.items() if key != "capturable"}
    # One float64 oracle that knows no clipping for torch.optim and for the torch path.
    tolerance = TOLERANCES[tolerance_key(torch.float32, name, known, "default")]
    theirs, ours = weights(SHAPES), weights(SHAPES)
    expected = getattr(torch.optim, name)(theirs, **copy.deepcopy(known))
    check_steps(Oracle(name, theirs, tolerance, **known, clipping=None), expected, theirs)
    optimizer = build(name, ours, copy.deepcopy({**known, **UNREACHED}))
    check_steps(Oracle(name, ours, tolerance, **known, clipping=None), optimizer, ours)


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize(("name", "options"), IN_KERNELS)
def test_nothing_is_clipped_by_the_kernels(name: str, options: dict[str, Any]) -> None:
    known = {key: value for key, value in options.items() if key != "capturable"}
    kernels = KERNELS.weights(FEW)
    given = {**on_device(copy.deepcopy(options)), **UNREACHED, "backend": "triton"}
    oracle = oracle_for(name, kernels, KERNELS, **known, clipping=None)
    check_steps(oracle, build(name, kernels, given), kernels)


ERROR_INPUTS = [
    pytest.param(name, case, id=f"{name}: {case.optimizer_error_input.desc}")
    for name, info in INFOS.items()
    for case in info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "case"), ERROR_INPUTS)
def test_backend_triton_raises_torchs_errors(name: str, case: Any) -> None:
    # backend="auto" is in test_errors.
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = case.optimizer_error_input
    params = [Parameter(torch.ones(2, 3))] if given.params is None else given.params
    cls = getattr(torch.optim, name)
    with pytest.raises(case.error_type, match=case.error_regex):
        PAIRS[cls](copy.deepcopy(params), **given.kwargs, backend="triton")
