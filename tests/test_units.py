"""Units along any dimensions: how they lie in memory, and what tensors of them step as."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agc_triton import AGC, SGD_AGC, AdamW_AGC, adaptive_clip_grad_, param_groups, unitwise_norm
from agc_triton.units import UnitLayout, count_units, unit_layout
from tests.support.disk import on_disk
from tests.support.optimizers import CLIPPING, EACH_WAY, STATEFUL, build
from tests.support.places import DEVICE, KERNELS
from tests.support.soak import soaked
from tests.support.tensors import grad_like, same, weight

BACKENDS = ("torch", "triton") if DEVICE == "cpu" else ("triton",)
every_name = pytest.mark.parametrize("name", EACH_WAY)

LAYOUTS: list[tuple[Any, Any, Any, UnitLayout | None]] = [
    ((4, 5), None, None, UnitLayout(1, 1, 4, 5)),
    ((4, 5), 1, None, UnitLayout(1, 4, 5, 1)),
    ((4, 3, 2, 2), 1, (0, 2, 3, 1), UnitLayout(1, 16, 3, 1)),  # channels_last
    ((3, 4, 5), (0, 1), None, UnitLayout(1, 1, 12, 5)),
    ((3, 4, 5), (0, 2), None, UnitLayout(3, 4, 5, 1)),
    ((3, 4, 5), (2, 0), None, UnitLayout(3, 4, 5, 1)),
    ((3, 4, 5), (0, -1), (2, 1, 0), UnitLayout(5, 4, 3, 1)),
    ((3, 4, 5, 2), (0, 2), None, UnitLayout(3, 4, 5, 2)),
    ((6, 5, 3, 3), ((0, 2), 1), None, UnitLayout(2, 3, 5, 9)),
    ((6, 5), ((0, 3),), None, UnitLayout(1, 1, 3, 10)),
    ((3, 4, 5), "tensor", None, UnitLayout(1, 1, 1, 60)),
    ((5, 1, 1, 1), (0, 1), None, UnitLayout(1, 1, 1, 5)),
    ((1, 5, 3), 0, None, UnitLayout(1, 1, 1, 15)),
    ((2, 3, 4, 5, 6), (1, 3), None, None),
]


@pytest.mark.parametrize(("shape", "unit_dim", "order", "expected"), LAYOUTS)
def test_how_units_lie_in_memory(
    shape: Any, unit_dim: Any, order: Any, expected: UnitLayout | None
) -> None:
    order = order or tuple(range(len(shape)))
    assert unit_layout(torch.Size(shape), order, unit_dim) == expected
    if expected is not None:
        assert count_units(torch.Size(shape), unit_dim) == expected.n_units


# Stored, how its units are named, and the tensors of plain units that it is made of.
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "experts (E, out, in)": ((3, 4, 6), (0, 1), lambda t: list(t.unbind(0))),
    "experts (E, in, out)": ((3, 6, 4), (0, 2), lambda t: [x.t() for x in t.unbind(0)]),
    "long experts (E, in, out)": ((2, 30, 70), (0, 2), lambda t: [x.t() for x in t.unbind(0)]),
    "Conv1D of transformers": ((6, 4), 1, lambda t: [t.t()]),
    "ConvTranspose2d in groups": (
        (6, 4, 3, 3),
        ((0, 2), 1),
        lambda t: [x.transpose(0, 1) for x in t.chunk(2)],
    ),
    "whole tensors": ((3, 4, 5), "tensor", lambda t: [t.reshape(1, -1)]),
    "scattered": ((2, 3, 2, 3, 2), (1, 3), lambda t: [t.permute(1, 3, 0, 2, 4).reshape(9, 8)]),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# What lies scattered in memory takes the torch path.
WAYS = [(k, b) for k in KINDS for b in BACKENDS if (k, b) != ("scattered", "triton")]
on_both_paths = pytest.mark.parametrize(("kind", "backend"), WAYS)


RUNS = [*((name, "propagate") for name in EACH_WAY), ("SGD", "skip_unit")]


@pytest.mark.parametrize(
    ("kind", "backend", "name", "nonfinite"),
    soaked(
        [(*way, *run) for way in WAYS for run in RUNS],
        lambda kind, backend, name, nonfinite: (
            nonfinite == "skip_unit" or (backend == "torch" and name == "AdamW")
        ),
    ),
)
def test_a_tensor_steps_as_the_layers_it_stands_for(
    name: str, backend: str, nonfinite: str, kind: str
) -> None:
    shape, unit_dim, split = KINDS[kind]
    options = {**STATEFUL[name], "clipping": CLIPPING, "nonfinite": nonfinite, "backend": backend}
    (stacked,) = KERNELS.weights([shape])
    layers = [part.clone().contiguous() for part in split(stacked)]
    ours = build(name, [stacked], {**options, "unit_dim": unit_dim})
    theirs = build(name, layers, options)
    for seed in range(3):
        grad = grad_like(stacked, seed)
        if nonfinite == "skip_unit" and seed == 1:
            grad.view(-1)[5] = torch.nan
        stacked.grad = grad
        for layer, part in zip(layers, split(grad), strict=True):
            layer.grad = part.clone().contiguous()
        ours.step()
        theirs.step()
    for part, layer in zip(split(stacked), layers, strict=True):
        torch.testing.assert_close(part, layer)
    if nonfinite == "skip_unit":
        assert ours.skipped_units == theirs.skipped_units == 1  # type: ignore[attr-defined]  # ours


@every_kind
def test_blocks_of_part_of_a_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, unit_dim, _ = KINDS[kind]
    results = []
    for block in (1 << 20, 30, 7):
        monkeypatch.setattr("agc_triton.torch_path.blocks.BLOCK", block)
        monkeypatch.setattr("agc_triton.torch_path.blocks.PACKED", 0)
        param = weight(shape)
        optimizer = build("AdamW", [param], {"unit_dim": unit_dim, "clipping": CLIPPING})
        for seed in range(2):
            param.grad = grad_like(param, seed)
            optimizer.step()
        results.append(param)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@on_both_paths
def test_the_functional_form_and_norms(kind: str, backend: str) -> None:
    shape, unit_dim, split = KINDS[kind]
    (param,) = KERNELS.weights([shape])
    param.grad = grad_like(param)
    layers = [part.clone().contiguous() for part in split(param)]
    for layer, part in zip(layers, split(param.grad), strict=True):
        layer.grad = part.clone().contiguous()
    norms = unitwise_norm(param, unit_dim).expand(shape)
    for part, layer in zip(split(norms), layers, strict=True):
        torch.testing.assert_close(part, unitwise_norm(layer).expand(layer.shape))
    adaptive_clip_grad_([param], clipping=CLIPPING, unit_dim=unit_dim, backend=backend)
    adaptive_clip_grad_(layers, clipping=CLIPPING, backend=backend)
    for part, layer in zip(split(param.grad), layers, strict=True):
        torch.testing.assert_close(part, layer.grad)


@every_kind
def test_the_wrapper_and_checkpoints(kind: str) -> None:
    shape, unit_dim, _ = KINDS[kind]
    results = []
    for make in (
        lambda p: SGD_AGC([p], lr=0.1, clipping=CLIPPING, unit_dim=unit_dim),
        lambda p: AGC(torch.optim.SGD([p], lr=0.1), clipping=CLIPPING, unit_dim=unit_dim),
    ):
        (param,) = KERNELS.weights([shape])
        optimizer: Any = make(param)
        for seed in range(2):
            optimizer.load_state_dict(on_disk(optimizer.state_dict()))
            assert optimizer.param_groups[0]["unit_dim"] == unit_dim
            param.grad = grad_like(param, seed)
            optimizer.step()
        results.append(param)
    torch.testing.assert_close(*results)


@on_both_paths
def test_explain_counts_them(kind: str, backend: str) -> None:
    pytest.importorskip("pandas")  # `make test-gpu` does without
    shape, unit_dim, split = KINDS[kind]
    (param,) = KERNELS.weights([shape])
    table = AdamW_AGC([param], unit_dim=unit_dim, backend=backend).explain()
    layers = split(param)
    assert table["units"].iloc[-1] == sum(len(layer) for layer in layers)


def test_units_that_lie_scattered_take_the_torch_path() -> None:
    (param,) = KERNELS.weights([(2, 3, 2, 3, 2)])
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"unit_dim=\(1, 3\).* scattered in memory"):
        AdamW_AGC([param], unit_dim=(1, 3), backend="triton").step()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_param_groups_find_the_units_of_a_transposed_convolution(groups: int) -> None:
    layer = torch.nn.ConvTranspose2d(6, 12, 3, groups=groups, bias=False)
    (group,) = param_groups(layer, exclude_head=False)
    parts = [part.transpose(0, 1) for part in layer.weight.detach().chunk(groups)]
    expected = torch.cat([unitwise_norm(part.contiguous()).flatten() for part in parts])
    found = unitwise_norm(layer.weight.detach(), group["unit_dim"])
    per_group = torch.cat([part[0].flatten() for part in found.chunk(groups)])
    torch.testing.assert_close(per_group, expected)
    assert len(expected) == layer.out_channels


def test_one_value_means_one_thing() -> None:
    (param,) = KERNELS.weights([(4, 5)])
    assert same(unitwise_norm(param, None), unitwise_norm(param, 0))
    assert unitwise_norm(param, "tensor").shape == (1, 1)
    assert unitwise_norm(param, (0,)).shape == (4, 1)
