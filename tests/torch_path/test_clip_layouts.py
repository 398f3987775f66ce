"""adaptive_clip_grad_ with gradients of any strides, shared memory and sparse rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Embedding, Parameter

from agc_triton import adaptive_clip_grad_
from tests.support.checks import clipped
from tests.support.tensors import grad_like, parameters

pytestmark = pytest.mark.usefixtures("either_block")


def test_writes_through_a_gradient_that_is_a_view() -> None:
    buffer = torch.full((3, 8), 100.0)
    param = Parameter(torch.ones(3, 4))
    param.grad = buffer[:, ::2]
    adaptive_clip_grad_(param, clipping=0.01)
    torch.testing.assert_close(buffer[:, ::2], torch.full((3, 4), 0.01))
    assert torch.equal(buffer[:, 1::2], torch.full((3, 4), 100.0))


# Dense in another order, with holes, with elements between others', with odd strides of sizes 1.
STRIDES = [
    *(((4, 3), (1, 4)), ((4, 3), (5, 1)), ((2, 3, 2), (1, 4, 2)), ((2, 2), (3, 2))),
    *(((3, 2), (2, 3)), ((4, 1, 3), (3, 0, 1)), ((1, 5), (0, 2)), ((2, 2, 2), (1, 3, 5))),
]


@pytest.mark.parametrize(("shape", "stride"), STRIDES, ids=str)
def test_clips_gradients_of_any_strides_that_share_no_memory(
    shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    (param,) = parameters([shape])
    memory = torch.full((20,), 7.0)
    grad = memory.as_strided(shape, stride).copy_(grad_like(param, 0) * 10)
    inside = torch.zeros(20, dtype=torch.bool)
    inside.as_strided(shape, stride).fill_(True)
    expected = clipped(param.detach(), grad.clone(), 0.01)
    param.grad = grad
    adaptive_clip_grad_(param, clipping=0.01)
    torch.testing.assert_close(param.grad, expected)
    assert torch.equal(memory[~inside], torch.full_like(memory[~inside], 7.0))


@pytest.mark.parametrize(
    ("shape", "stride"), [((3, 4), (2, 1)), ((3, 3), (2, 4)), ((2, 2, 2), (1, 2, 3)), ((4,), (0,))]
)
def test_refuses_gradients_whose_elements_share_memory(
    shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    param = Parameter(torch.ones(shape))
    memory = torch.full((20,), 7.0)
    param.grad = memory.as_strided(shape, stride)
    with pytest.raises(RuntimeError, match=r"share memory.*\.clone\(\)"):
        adaptive_clip_grad_(param, clipping=0.01)
    assert torch.equal(memory, torch.full((20,), 7.0))


def sparse_embedding(width: int, indices: list[int]) -> tuple[Embedding, Tensor]:
    """An embedding with a sparse gradient, and the same gradient dense."""
    torch.manual_seed(0)
    embedding = Embedding(7, width, sparse=True)
    scale = torch.logspace(-3, 1, len(indices)).unsqueeze(1)
    (embedding(torch.tensor(indices, dtype=torch.long)) * scale).sum().backward()
    assert embedding.weight.grad is not None
    return embedding, embedding.weight.grad.to_dense()


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("indices", [[5], [1, 4, 1, 6, 4, 4], []], ids=str)
@pytest.mark.parametrize("width", [4, 1])
def test_sparse_rows_are_clipped_as_dense_ones(
    width: int, indices: list[int], coalesced: bool
) -> None:
    embedding, dense = sparse_embedding(width, indices)
    weight = embedding.weight
    assert weight.grad is not None
    if coalesced:
        weight.grad = weight.grad.coalesce()
    adaptive_clip_grad_(weight, clipping=0.05)
    assert weight.grad.layout is torch.sparse_coo
    assert weight.grad.coalesce().indices().tolist() == [sorted(set(indices))]
    torch.testing.assert_close(weight.grad.to_dense(), clipped(weight.detach(), dense, 0.05))


def test_coalesced_sparse_gradients_are_clipped_in_place() -> None:
    embedding, _ = sparse_embedding(4, [1, 2])
    assert embedding.weight.grad is not None
    grad = embedding.weight.grad = embedding.weight.grad.coalesce()
    adaptive_clip_grad_(embedding.weight, clipping=0.05)
    assert embedding.weight.grad is grad
