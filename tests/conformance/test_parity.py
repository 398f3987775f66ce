"""Bit for bit what torch.optim does, over every configuration that torch tests its own with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

import agc_triton
import agc_triton.torch_path.blocks
from tests.support.optimizers import EACH_WAY, MODES, NAMES, STATEFUL, STATEFUL_CASES
from tests.support.soak import packed_blocks, soaked
from tests.support.tensors import grad_like, parameters, same

either_block = pytest.mark.usefixtures("either_block")

STEPS = 3
SHAPES = ((17, 3), (4, 3, 2, 2), (6,), (4, 1, 1, 1), ())
INFOS: dict[str, Any] = {info.name: info for info in optim_db if info.name in NAMES}
FLAGS = ("foreach", "fused", "differentiable")
UNREACHED = 1e30


def configurations(modes_of_torchs_choice: bool, everywhere: Sequence[str]) -> list[Any]:
    """torch's own list, with what it keeps for CUDA, in each mode.

    Of its first, the defaults, all are quick, of the others those that are ``everywhere``.
    """
    found = []
    for name, info in INFOS.items():
        modes: list[dict[str, bool]] = [{}] if modes_of_torchs_choice else []
        modes += [{flag: False for flag in FLAGS if flag in info.supported_impls}]
        modes += [{flag: True} for flag in info.supported_impls]
        for given in info.optim_inputs_func(device="cuda"):
            for mode in modes:
                label = f"{name}: {given.desc}: {mode}"
                quick = given.desc == "default" or str(mode) in everywhere
                marks = () if quick else pytest.mark.soak
                found.append(pytest.param(name, {**given.kwargs, **mode}, id=label, marks=marks))
    return found


def run(
    cls: Any,
    options: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> list[Any]:
    """Numbers, state names and group after each step, an error and what it leaves at the end."""
    params: list[Any] = parameters(shapes, dtype)
    if options.get("differentiable"):  # torch.optim cannot update leaves that need a gradient then
        params = [p.detach() for p in params]
    # torch's fused SGD takes no late first gradient, and its foreach SGD multiplies 16-bit buffers
    # with other roundings as long as one is missing.
    late = not options.get("fused") and dtype.itemsize > 2
    after: list[Any] = []
    optimizer = None
    try:
        optimizer = cls(params, **copy.deepcopy(dict(options)))
        for step in range(STEPS):
            for i, param in enumerate(params):
                absent = late and i == 1 and step == 0
                param.grad = None if absent else grad_like(param.detach(), 10 * step + i)
            optimizer.step()
            values = [(p, p.grad, *optimizer.state.get(p, {}).values()) for p in params]
            kept = [[None if t is None else t.detach().clone() for t in row] for row in values]
            names = [list(optimizer.state.get(p, {})) for p in params]
            after.append((kept, names, dict(optimizer.param_groups[0], params=None)))
    except (AssertionError, RuntimeError) as error:
        left = [] if optimizer is None else [[p, *optimizer.state[p].values()] for p in params]
        after.append((left, (type(error), str(error)), {}))
    return after


def assert_same_run(
    name: str, options: Mapping[str, Any], *clippings: float | None, **how: Any
) -> None:
    expected = run(getattr(torch.optim, name), options, **how)
    dtype = how.get("dtype", torch.float32)
    refused = dtype.is_complex if options.get("fused") else options.get("capturable", False)
    assert len(expected) == (1 if refused else STEPS)
    for clipping in clippings:
        actual = run(getattr(agc_triton, f"{name}_AGC"), {**options, "clipping": clipping}, **how)
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert same(ours[:2], theirs[:2])
            assert theirs[2].keys() == ours[2].keys() - {"clipping", "agc_eps", "unit_dim"}
            assert same({key: ours[2][key] for key in theirs[2]}, theirs[2])


@pytest.mark.parametrize(("name", "options"), configurations(True, ["{}"]))
def test_without_clipping(name: str, options: dict[str, Any]) -> None:
    assert_same_run(name, options, 0, None)


@either_block
@packed_blocks
@pytest.mark.parametrize(
    ("name", "options"), configurations(False, ["{'foreach': True}", "{'fused': True}"])
)
def test_under_a_limit_that_nothing_reaches(name: str, options: dict[str, Any]) -> None:
    assert_same_run(name, options, UNREACHED)


DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
# What torch takes for a flag or a number, and its fused kernels do not.
ODD_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "nesterov": 1}),
    ("SGD", {"maximize": 1}),
    ("SGD", {"momentum": torch.tensor([0.75])}),
    ("SGD", {"weight_decay": torch.tensor(0.5, requires_grad=True)}),
    ("Adam", {"amsgrad": 1, "maximize": 1}),
    ("AdamW", {"amsgrad": 2, "maximize": 1}),
    ("RMSprop", {"maximize": 1, "momentum": 0.9}),
    ("RMSprop", {"centered": 2, "alpha": torch.tensor(0.75)}),
]


@either_block
@pytest.mark.parametrize(("name", "options"), ODD_OPTIONS)
def test_flags_and_numbers_as_torch_takes_them(name: str, options: dict[str, Any]) -> None:
    shapes = SHAPES[:-1]  # it takes a momentum of shape (1,) for all but scalars
    theirs = run(getattr(torch.optim, name), options, shapes=shapes)
    ours = run(
        getattr(agc_triton, f"{name}_AGC"), {**options, "clipping": UNREACHED}, shapes=shapes
    )
    assert len(theirs) == STEPS
    for (actual, *names), (expected, *of_torch) in zip(ours, theirs, strict=True):
        assert names[0] == of_torch[0]
        for row, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(row[0], other[0])
            torch.testing.assert_close(row[2:], other[2:])


# While a momentum buffer is missing, torch's foreach SGD updates parameters one after the other.
REPEATED = [case for case in STATEFUL_CASES if case != ("SGD", "foreach")]


@either_block
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize(("name", "mode"), REPEATED)
def test_a_parameter_that_is_twice_in_a_group(name: str, mode: str) -> None:
    def twice(cls: Any) -> Any:
        return lambda params, **options: cls([*params, params[0]], **options)

    options = {**STATEFUL[name], **MODES[mode]}
    theirs = run(twice(getattr(torch.optim, name)), options)
    ours = run(twice(getattr(agc_triton, f"{name}_AGC")), {**options, "clipping": UNREACHED})
    assert len(theirs) == STEPS
    assert same([step[:2] for step in ours], [step[:2] for step in theirs])


EXPLICIT_CASES = [case for case in STATEFUL_CASES if "default" not in case]
OTHER_DTYPES = [
    (name, mode, dtype)
    for name, mode in STATEFUL_CASES
    for dtype in DTYPES
    # It skips whole vectors of 16-bit numbers up to torch 2.13 (pytorch#191763).
    if not (name == "SGD" and mode == "fused" and dtype.itemsize == 2)
]


@either_block
@packed_blocks
@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    soaked(
        OTHER_DTYPES,
        lambda name, mode, dtype: (
            name in EACH_WAY or (mode == "not fused") is (dtype is torch.bfloat16)
        ),
    ),
    ids=str,
)
def test_other_dtypes(name: str, mode: str, dtype: torch.dtype) -> None:
    clippings = [None] if mode == "default" else [None, UNREACHED]
    assert_same_run(name, {**STATEFUL[name], **MODES[mode]}, *clippings, dtype=dtype)


# Blocks of one unit, some and all, each of a multiple of 16 elements; in the last shape of parts of
# its only unit.
@pytest.mark.parametrize(
    ("name", "mode", "block"),
    soaked(
        [(*case, block) for case in EXPLICIT_CASES for block in (96, 192, 320)],
        lambda name, mode, block: name in EACH_WAY or block == 96,
    ),
)
def test_blocks_do_not_change_a_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str, block: int
) -> None:
    monkeypatch.setattr(agc_triton.torch_path.blocks, "BLOCK", block)
    monkeypatch.setattr(agc_triton.torch_path.blocks, "PACKED", 0)
    shapes = ((20, 16), (5, 64), (48, 5), (400,))
    assert_same_run(name, {**STATEFUL[name], **MODES[mode]}, UNREACHED, shapes=shapes)


@pytest.mark.parametrize("block", [1, 7, 33])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_odd_blocks_do_not_change_a_bit_of_the_for_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(agc_triton.torch_path.blocks, "BLOCK", block)
    monkeypatch.setattr(agc_triton.torch_path.blocks, "PACKED", 0)
    assert_same_run(name, {**STATEFUL[name], "fused": False}, UNREACHED)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_without_clipping(momentum: float) -> None:
    results = []
    cases: list[tuple[Any, dict[str, Any]]] = [
        (torch.optim.SGD, {}),
        (agc_triton.SGD_AGC, {"clipping": 0}),
    ]
    for cls, ours in cases:
        (param,) = parameters([(4, 3)])
        optimizer: Any = cls([param], lr=0.1, momentum=momentum, dampening=0.5, **ours)
        for row in (1, 1, 2):
            param.grad = torch.sparse_coo_tensor(
                torch.tensor([[row]], device=param.device),
                torch.ones(1, 3, device=param.device),
                param.shape,
                check_invariants=True,
            )
            optimizer.step()
        results.append((param.detach(), optimizer.state[param]))
    assert same(*results)
