"""Small errors in each option of the torch path are outside the oracle's bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.checks import step_and_check
from tests.support.formulas import defaults
from tests.support.optimizers import CLIPPING, NAMES, build
from tests.support.optimizers import STEPS as RULE_STEPS
from tests.support.oracle import Oracle
from tests.support.tolerances import TOLERANCES
from tests.torch_path.test_rules import STEPS, make_grads, make_params

# Options of the test below, each with its part in the rule; and small errors in all of them, one by
# one, that the bounds must not hide.
SLIP_OPTIONS: dict[str, Any] = {
    **{"lr": 0.5, "weight_decay": 0.1, "eps": 1e-3, "momentum": 0.9, "dampening": 0.4},
    **{"betas": (0.9, 0.999), "alpha": 0.99, "rho": 0.9, "lr_decay": 0.5},
    **{"initial_accumulator_value": 0.5, "momentum_decay": 0.5, "lambd": 0.1, "t0": 1.0},
    **{"etas": (0.7, 1.05), "step_sizes": (0.3, 0.55)},
}
# Where eps is seen: beside large roots, and where much is rectified on the sixth step.
SLIP_OPTIONS_OF: dict[str, dict[str, Any]] = {
    "Adagrad": {"eps": 0.1},
    "RAdam": {"eps": 0.1, "betas": (0.9, 0.9)},
}


def slips(key: str, value: Any) -> list[Any]:
    if isinstance(value, tuple):
        first, second = value
        return [*((off, second) for off in slips(key, first)), (first, second * (1 - 1e-4))]
    return [value * (1 + (1e-4 if key in ("weight_decay", "eps") else 1e-5))]


def slip_options(name: str) -> dict[str, Any]:
    given = {**SLIP_OPTIONS, **SLIP_OPTIONS_OF.get(name, {})}
    return {key: value for key, value in given.items() if key in defaults(name)}


SLIPS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"clipping": CLIPPING * (1 + 1e-5)}) for name in NAMES),
    *((name, {"unit_dim": 1}) for name in NAMES),
    *((name, {"maximize": True}) for name in NAMES),
    *(
        (name, {key: slip})
        for name in NAMES
        for key, value in slip_options(name).items()
        for slip in slips(key, value)
    ),
    # 1 - 0.999 in fp32
    *((name, {"betas": (0.9, 0.999 + 1.3e-8)}) for name in ("Adam", "AdamW")),
    ("RMSprop", {"alpha": 0.99 + 1e-7}),
]


@pytest.mark.parametrize(("name", "slip"), SLIPS, ids=str)
def test_bounds_are_narrow_enough_to_see(name: str, slip: dict[str, Any]) -> None:
    options = {**slip_options(name), "clipping": CLIPPING}
    params = make_params(torch.float32)
    optimizer = build(name, params, {**options, **slip})
    oracle = Oracle(name, params, TOLERANCES["float32"], **options)
    with pytest.raises(AssertionError, match="are wrong"):  # noqa: PT012  # any of the steps
        for step in range(RULE_STEPS.get(name, STEPS)):
            step_and_check(optimizer, oracle, params, make_grads(params, step))
