"""The torch path's blocks: where parameters are cut must not be seen in any number."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agc_triton import adaptive_clip_grad_
from agc_triton.torch_path import blocks
from tests.support.checks import check_steps, states_of, step_with
from tests.support.optimizers import CLIPPING, EACH_WAY, STATEFUL, WAY_CASES, build
from tests.support.oracle import AGC, Oracle, assert_within, clip
from tests.support.rounded import as_float64, exact
from tests.support.soak import soaked
from tests.support.tensors import grad_like, grads_like, in_order, weight
from tests.support.tolerances import TOLERANCES

# Block sizes one short of, at and one beyond every place where the walk changes its course.
ROWS = (1, 4, 5, 6, 9, 10, 11, 29, 30, 31)  # of 6 rows of 5
FILTERS = (1, 5, 6, 7, 11, 12, 13, 35, 36, 37)  # 6 filters of 2 channels of 3
MANY_ROWS = (2, 3, 4, 39, 40, 41, 59, 60, 61, 119, 120, 121)  # 40 rows of 3
COLUMNS = (1, 7, 8, 9, 15, 16, 17, 23, 24, 25)  # 3 times 4 units of 2
ONE_UNIT = (1, 12, 18, 19, 36, 37, 38)  # of 37
WALKS: dict[str, tuple[Callable[[], Tensor], int | None, tuple[int, ...]]] = {
    "rows": (lambda: weight((6, 5)), None, ROWS),
    "channels_last": (lambda: in_order(weight((6, 5, 1, 1)), (0, 2, 3, 1)), None, ROWS),
    "channels_last filters": (
        lambda: in_order(weight((6, 2, 1, 3)), (0, 2, 3, 1)),
        None,
        FILTERS,
    ),
    "permuted rows": (lambda: in_order(weight((5, 6)), (1, 0)), 1, ROWS),
    "many rows": (lambda: weight((40, 3)), None, MANY_ROWS),
    "columns": (lambda: weight((3, 4, 2)), 1, COLUMNS),
    "permuted columns": (lambda: in_order(weight((4, 3, 2)), (1, 0, 2)), None, COLUMNS),
    "one unit": (lambda: weight((37,)), None, ONE_UNIT),
    "complex rows": (lambda: weight((6, 5), torch.complex64), None, (*ROWS, 59, 60, 61)),
}
CASES = [case for case in WAY_CASES if case[1] in ("default", "not fused")]


def cut(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Blocks of this many elements, and none that go through in one batch."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "PACKED", 0)


@functools.cache
def trajectory(name: str, walk: str) -> list[Oracle]:
    """The oracle after each step."""
    make, unit_dim, _ = WALKS[walk]
    param, options = make(), {**STATEFUL[name], "clipping": CLIPPING, "unit_dim": unit_dim}
    oracle = Oracle(name, [param], TOLERANCES["float32"], **options)
    return oracle.trajectory(grads_like([param], step) for step in range(2))


@pytest.mark.parametrize(
    ("name", "mode", "walk"),
    soaked(
        [(*case, walk) for case in CASES for walk in WALKS],
        lambda name, mode, walk: name in ("SGD", "AdamW") or walk in ("rows", "columns"),
    ),
)
def test_blocks_follow_the_oracle(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str, walk: str
) -> None:
    make, unit_dim, sizes = WALKS[walk]
    for block in sizes:
        cut(monkeypatch, block)
        params = [make()]
        options = {**STATEFUL[name], "clipping": CLIPPING, "unit_dim": unit_dim}
        optimizer = build(name, params, options, mode)
        for step, oracle in enumerate(trajectory(name, walk)):
            step_with(optimizer, params, grads_like(params, step))
            oracle.check(params, states_of(optimizer, params))


@pytest.mark.parametrize("walk", WALKS)
def test_the_functional_form_follows_the_oracle(monkeypatch: pytest.MonkeyPatch, walk: str) -> None:
    make, unit_dim, sizes = WALKS[walk]
    tolerance, options = TOLERANCES["float32"], {**AGC, "clipping": CLIPPING, "unit_dim": unit_dim}
    for block in sizes:
        cut(monkeypatch, block)
        param = make()
        param.grad = in_order(grad_like(param, 0), range(param.dim()))
        p, g = (exact(as_float64(t), tolerance.norms) for t in (param, param.grad))
        expected = clip(p, g, param.shape, options, tolerance.stored)
        adaptive_clip_grad_(param, clipping=CLIPPING, unit_dim=unit_dim)
        assert_within(param.grad, expected, tolerance.margin, f"gradient, blocks of {block}")


@pytest.mark.parametrize(("block", "joined"), [(8, 8), (16, 8), (1000, 8), (16, 0), (1000, 6)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    soaked(
        itertools.product(EACH_WAY, (torch.float32, torch.float64, torch.bfloat16)),
        lambda name, dtype: dtype is torch.float32 or name == "AdamW",
    ),
    ids=str,
)
def test_batches_of_small_tensors(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, block: int, joined: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "PACKED", joined)
    shapes: tuple[tuple[int, ...], ...] = (
        *((7,), (8,), (9,), (), (8, 1, 1), (1, 9), (2, 4), (2, 2, 2), (4, 2), (3, 3)),
        *((8, 1, 1), (3, 2), (7,), (), (1, 4)),  # units that look like others'
    )
    check_steps(name, "default", [weight(shape, dtype, seed=i) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("name", soaked(EACH_WAY, lambda name: name in ("SGD", "AdamW")))
def test_parameters_larger_than_a_block(name: str) -> None:
    rows, inner = blocks.BLOCK // 1000 + 6, blocks.BLOCK // 10_000 + 1
    params = [weight((rows, 1000)), in_order(weight((10, 1000, inner)), (2, 0, 1))]
    assert all(p.numel() > blocks.BLOCK for p in params)
    one_unit = weight((blocks.PACKED + 1,))
    # Among so many elements L2 decay would cancel some gradients to nothing but rounding.
    check_steps(name, "default", [*params, one_unit], weight_decay=0.0)
