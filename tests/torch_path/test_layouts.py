"""Shapes, strides and dtypes against the float64 oracle, which knows of no strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checks import check_steps, oracle_for, states_of, step_with
from tests.support.optimizers import CLIPPING, STATEFUL, WAY_CASES, build
from tests.support.oracle import Oracle
from tests.support.places import Place
from tests.support.soak import packed_blocks, soaked
from tests.support.tensors import GRAD_LAYOUTS, grads_like, in_order
from tests.support.tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("either_block")

# Adam's tensors go the way of AdamW's, and fused=True goes the default way.
CASES = [
    (name, mode)
    for name, mode in WAY_CASES
    if name != "Adam" and mode in ("default", "foreach", "not fused")
]
all_cases = pytest.mark.parametrize(("name", "mode"), CASES)


DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


def with_dtypes(*dtypes: torch.dtype) -> list[tuple[str, str, torch.dtype]]:
    """torch.optim takes no complex parameters with fused=True."""
    return [
        (*case, dtype)
        for case in CASES
        for dtype in dtypes
        if not (dtype.is_complex and "fused" in case)
    ]


# Rank 0 to 5, gains, and tensors that are one unit or none at all.
SHAPES = [
    *((), (5,), (4, 3), (3, 4, 2), (3, 2, 2, 2), (3, 2, 2, 2, 2)),
    *((4, 1, 1, 1), (1,), (1, 1), (1, 5), (1, 1, 6), (5, 1, 2)),
    *((0,), (0, 3), (3, 0), (2, 0, 2)),
]


@all_cases
def test_shapes(name: str, mode: str, torch_place: Place) -> None:
    check_steps(name, mode, torch_place.weights(SHAPES))


# As ConvTranspose1d, 2d and 3d store their weights (in, out, ...), and beyond.
@pytest.mark.parametrize(
    ("name", "mode", "unit_dim"),
    soaked(
        [(*case, unit_dim) for case in CASES for unit_dim in (1, -1, -2, 2)],
        lambda name, mode, unit_dim: name == "AdamW" or unit_dim == 1,
    ),
)
def test_unit_dims(name: str, mode: str, unit_dim: int, torch_place: Place) -> None:
    shapes = ((3, 4, 2), (3, 4, 2, 2), (2, 3, 1, 2, 2), (1, 3, 4), (4, 1, 1, 1), (6,), ())
    params = torch_place.weights(shapes)
    check_steps(name, mode, params, unit_dim=unit_dim)


# Memory orders of a dense parameter: transposed, channels_last, channels_last_3d, with sizes 1.
ORDERS = [
    ((4, 3), (1, 0)),
    ((2, 3, 4), (2, 0, 1)),
    ((2, 3, 4), (1, 0, 2)),
    ((4, 1, 3), (2, 0, 1)),
    ((4, 3, 2, 2), (0, 2, 3, 1)),
    ((3, 2, 2, 2, 2), (0, 2, 3, 4, 1)),
    ((1, 4, 1, 3), (3, 0, 1, 2)),
]


def permuted(place: Place, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    params = place.weights([shape for shape, _ in ORDERS], dtype)
    return [in_order(p, order) for p, (_, order) in zip(params, ORDERS, strict=True)]


@pytest.mark.parametrize("unit_dim", [0, 1])
@all_cases
def test_dense_parameters_of_any_memory_order(
    name: str, mode: str, unit_dim: int, torch_place: Place
) -> None:
    params = permuted(torch_place)
    assert params[4].is_contiguous(memory_format=torch.channels_last)
    assert params[5].is_contiguous(memory_format=torch.channels_last_3d)
    check_steps(name, mode, params, unit_dim=unit_dim)


@pytest.mark.parametrize(
    ("name", "mode", "layout"),
    soaked(
        [(*case, layout) for case in CASES for layout in GRAD_LAYOUTS],
        lambda name, mode, layout: name in ("SGD", "AdamW") or layout == "transposed",
    ),
)
def test_gradients_with_strides_of_their_own(
    name: str, mode: str, layout: str, torch_place: Place
) -> None:
    def grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
        return [GRAD_LAYOUTS[layout](g) for g in grads_like(params, step)]

    params = [
        *permuted(torch_place),
        *torch_place.weights(((4, 3), (3, 2, 2), (6,), (3, 1, 1))),
    ]
    check_steps(name, mode, params, grads)


SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "every second column": lambda x: x[:, ::2],
    "transposed columns": lambda x: x[:, 1:4].t(),
    "a column": lambda x: x[:, 2],
    "a block": lambda x: x.view(4, 2, 3)[:, :1, :2],
}
HOLES = [
    *((*case, cut, torch.float32) for case in CASES for cut in SLICES),
    *(
        (name, mode, "a block", dtype)
        for name, mode, dtype in with_dtypes(torch.bfloat16, torch.complex64)
    ),
]


@pytest.mark.parametrize(("name", "mode", "cut", "dtype"), HOLES, ids=str)
def test_parameters_with_holes(
    name: str, mode: str, cut: str, dtype: torch.dtype, torch_place: Place
) -> None:
    base = torch_place.weight((4, 6), dtype)
    before, inside = base.clone(), torch.zeros_like(base, dtype=torch.bool)
    SLICES[cut](inside).fill_(True)
    check_steps(name, mode, [SLICES[cut](base)], rounds_as="not fused")
    assert torch.equal(base[~inside], before[~inside])


@pytest.mark.parametrize("loaded", [True, False])
@all_cases
def test_states_with_strides_of_their_own(
    name: str, mode: str, loaded: bool, torch_place: Place
) -> None:
    def restride(optimizer: Any) -> None:
        saved = optimizer.state_dict()  # it shares the states themselves
        for state in saved["state"].values():
            for key, value in state.items():
                state[key] = in_order(value, range(value.dim())[::-1])
        if loaded:
            optimizer.load_state_dict(saved)

    params = [
        torch_place.weight((4, 3)),
        torch_place.weight((3, 2, 2)),
        in_order(torch_place.weight((3, 4, 2, 2)), (0, 2, 3, 1)),
    ]
    check_steps(name, mode, params, between=restride)


@packed_blocks
@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    soaked(
        with_dtypes(*DTYPES),
        lambda name, mode, dtype: name == "AdamW" or dtype in (torch.bfloat16, torch.complex64),
    ),
    ids=str,
)
def test_dtypes(name: str, mode: str, dtype: torch.dtype, torch_place: Place) -> None:
    params = torch_place.weights(SHAPES, dtype)
    check_steps(name, mode, [*params, *permuted(torch_place, dtype)])
    check_steps(name, mode, permuted(torch_place, dtype), unit_dim=1)


@packed_blocks
@all_cases
def test_several_dtypes_in_one_group(name: str, mode: str, torch_place: Place) -> None:
    dtypes = [torch.float32, torch.float64, torch.float32]
    dtypes += [torch.complex64, torch.complex128]
    shapes = ((2, 3), (4, 6), (5, 8), (3, 4), (5,))
    params = [
        torch_place.weight(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=False)
    ]
    options = {**STATEFUL[name], "clipping": CLIPPING}
    optimizer = build(name, params, {**options, "backend": "torch"}, mode)
    oracles = [oracle_for(name, [p], torch_place, mode, **options) for p in params]
    for step in range(3):
        grads = grads_like(params, step)
        step_with(optimizer, params, grads)
        for oracle, param, grad in zip(oracles, params, grads, strict=True):
            oracle.step([grad])
            oracle.check([param], states_of(optimizer, [param]))


class Subclass(Tensor):
    """A tensor subclass that does nothing."""


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "of a subclass": lambda x: x.as_subclass(Subclass),
}
# torch's foreach and fused functions raise where they would have to write to such views.
PLAIN_CASES = [case for case in CASES if case[1] in ("default", "not fused")]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "mode"), PLAIN_CASES)
def test_lazily_negated_and_subclassed_tensors(
    name: str, mode: str, view: str, torch_place: Place
) -> None:
    def grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
        return [VIEWS[view](g) for g in grads_like(params, step)]

    params = [
        torch_place.weight((4, 3)),
        VIEWS[view](torch_place.weight((4, 3))),
        VIEWS[view](torch_place.weight((5,))),
    ]
    assert params[1].is_neg() or type(params[1]) is Subclass
    check_steps(name, mode, params, grads)


@pytest.mark.parametrize(("name", "mode"), PLAIN_CASES)
def test_lazily_conjugated_gradients(name: str, mode: str, torch_place: Place) -> None:
    def grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
        return [g.conj() for g in grads_like(params, step)]

    check_steps(
        name,
        mode,
        [
            torch_place.weight((4, 3), torch.complex64),
            torch_place.weight((), torch.complex64),
        ],
        grads,
    )


@pytest.mark.parametrize("mode", ["default", "not fused"])
def test_lazily_conjugated_parameters(mode: str, torch_place: Place) -> None:
    # Of torch.optim's, SGD alone takes them.
    check_steps("SGD", mode, [torch_place.weight((4, 3), torch.complex64).conj()])


# As torch's own tests give it, and as GradScaler does.
@pytest.mark.parametrize("scale_shape", [(1,), ()], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_unscaling_of_small_dtypes(
    name: str, scale_shape: tuple[int, ...], torch_place: Place
) -> None:
    params = torch_place.weights(((4, 3), (0,), (), (5,), ()), torch.float16)
    params[-1] = params[-1].as_subclass(Subclass)
    optimizer: Any = build(
        name, params, {"eps": 0.1, "clipping": CLIPPING, "backend": "torch"}, "fused"
    )
    oracle = Oracle(name, params, TOLERANCES["float16"], eps=0.1, clipping=CLIPPING)
    optimizer.grad_scale = torch.full(scale_shape, 4.0, device=torch_place.device)
    optimizer.found_inf = torch.zeros(scale_shape, device=torch_place.device)
    grads = grads_like(params, 0)
    oracle.step(grads)
    step_with(optimizer, params, [g * 4 for g in grads])
    oracle.check(params, states_of(optimizer, params))
