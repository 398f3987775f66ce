"""Units of nothing and next to nothing, and what is not finite, in every mode of the torch path."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support.checks import check_steps, step_with
from tests.support.optimizers import CLIPPING, STATEFUL, build
from tests.support.places import Place
from tests.support.tensors import grads_like
from tests.torch_path.test_layouts import CASES

pytestmark = pytest.mark.usefixtures("either_block")

all_cases = pytest.mark.parametrize(("name", "mode"), CASES)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@all_cases
def test_a_gradient_that_is_not_finite_stays_in_its_unit(
    name: str, mode: str, value: float, torch_place: Place
) -> None:
    options = {**STATEFUL[name], "clipping": CLIPPING, "backend": "torch"}

    def run(value: float | None) -> list[Tensor]:
        params = torch_place.weights(((4, 3), (3, 2, 2, 2), (5,), (3, 1, 1, 1), (6,)))
        optimizer = build(name, params, options, mode)
        for step in range(2):
            grads = grads_like(params, step)
            if value is not None:
                grads[0][1, 2] = grads[1][2, 1, 1, 0] = grads[2][3] = grads[3][1] = value
            step_with(optimizer, params, grads)
        return params

    (a, b, c, d, e), finite = run(value), run(None)
    assert not a[1].isfinite().all()
    assert not b[2].isfinite().all()
    assert not c.isfinite().all()
    assert not d.isfinite().all()
    assert torch.equal(a[[0, 2, 3]], finite[0][[0, 2, 3]])
    assert torch.equal(b[:2], finite[1][:2])
    assert torch.equal(e, finite[4])


ZEROS = ((4, 3), (3, 2, 2), (5,), (3, 1, 1), ())


@all_cases
def test_zero_weights_train(name: str, mode: str, torch_place: Place) -> None:
    params = [torch.zeros(shape, device=torch_place.device) for shape in ZEROS]
    check_steps(name, mode, params)
    assert all((p != 0).all() for p in params)


@all_cases
def test_zero_gradients(name: str, mode: str, torch_place: Place) -> None:
    params = torch_place.weights(ZEROS)
    check_steps(
        name,
        mode,
        params,
        lambda params, step: [torch.zeros_like(p) for p in params],
    )


@all_cases
def test_a_limit_of_zero(name: str, mode: str, torch_place: Place) -> None:
    params = [torch.zeros(shape, device=torch_place.device) for shape in ZEROS]
    check_steps(name, mode, params, agc_eps=0.0)
    assert not any(p.any() for p in params)


@all_cases
def test_gradients_under_the_smallest_norm_divided_by(
    name: str, mode: str, torch_place: Place
) -> None:
    """Limits of 5e-8; of the norms from 1e-8 to 1e-5 those up to 1e-6 are taken for 1e-6."""

    def grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
        (param,) = params
        return [torch.full_like(param, 1e-8).mul_(10.0 ** torch.arange(4).to(param)[:, None])]

    check_steps(name, mode, [torch.zeros(4, 2, device=torch_place.device)], grads, agc_eps=1e-6)
