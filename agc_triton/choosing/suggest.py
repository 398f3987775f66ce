"""suggest_clipping: the thresholds that would clip a given share of a model's units."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agc_triton.choosing.layers import check_layers, layers_of
from agc_triton.choosing.picture import draw
from agc_triton.choosing.table import table_of
from agc_triton.choosing.untouched import untouched
from agc_triton.extras import needed

if TYPE_CHECKING:
    from pandas import DataFrame


def suggest_clipping(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    optimizer: Optimizer | None = None,
    target: float = 0.1,
    plot: str | os.PathLike[str] | None = None,
) -> DataFrame:
    """The ``clipping`` that would clip a share of units: by parameter, by group and over all.

    Each batch goes forward and backward through the model in the mode that it is in, and nothing is
    updated: afterwards parameters, buffers, gradients, modes, the optimizer and random numbers are
    what they were. A unit is clipped where its ratio, ||g|| / max(||w||, agc_eps), is over
    ``clipping`` (Brock et al. 2021, arXiv 2102.06171, equation 3).

    Args:
        model: any module whose parameters are initialized, of any dtype, on any device.
        loss_fn: ``loss_fn(model, batch)`` gives the loss, a tensor of one element, as the optimizer
            would see it: not scaled, and the mean where batches are accumulated.
        batches: of any kind, as many as are to be looked at, of the size that is trained with:
            smaller ones have greater ratios.
        optimizer: has the groups with ``clipping``, ``agc_eps`` and ``unit_dim``; what they lack
            is as in `agc_triton.AdamW_AGC`. Without it that holds for all parameters of the model.
        target: the share of units, over all batches, that is to be clipped.
        plot: where to draw the distribution of the ratios; matplotlib chooses the format by it.

    Returns:
        A row per parameter, per group and for all groups that are clipped (``level`` is
        "parameter", "group", "total") with name, group, shape, units, batches (with a gradient),
        clipping (as it is; NaN where groups differ), clipped (the share of units over that),
        ratio_5, ratio_50, ratio_95 (percentiles), ratio_max, suggested. NaN without a gradient;
        ``suggested`` also where fewer units than ``target`` have another gradient than 0.

    Raises:
        ImportError: pandas is not installed, or for ``plot`` matplotlib.
        TypeError: a model, an optimizer or a loss that is none.
        ValueError: ``target`` is not between 0 and 1, there is no batch, a loss has several
            elements, or no parameter has had a gradient.
        RuntimeError: a gradient is not finite, or a backward pass would call hooks that may update.
    """
    needed("pandas", "suggest_clipping() makes a pandas.DataFrame")
    if plot is not None:
        needed("matplotlib", "suggest_clipping(plot=...) draws a picture")
    if not 0.0 < target < 1.0:
        raise ValueError(f"target must be a share of units between 0 and 1, not {target}")
    layers = layers_of(model, optimizer)
    check_layers(layers)
    seen = 0
    with untouched(model, [layer.param for layer in layers]), torch.enable_grad():
        for seen, batch in enumerate(batches, 1):
            loss: Any = _checked(loss_fn(model, batch), seen - 1)
            loss.backward()
            for layer in layers:
                layer.look(seen - 1)
                layer.param.grad = None
    if not seen:
        raise ValueError("there was no batch to look at; batches may be an iterator that has ended")
    if not any(layer.ratios for layer in layers):
        raise ValueError(
            f"no parameter has had a gradient in {seen} batches; the optimizer must be of this"
            " model's parameters, and loss_fn must run this model"
        )
    table = table_of(layers, target)
    if plot is not None:
        draw(layers, table, target, plot)
    return table


def _checked(loss: Any, index: int) -> Tensor:
    """The loss of a batch, which has to be one number and of the model."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return the loss as a tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn must return one number, not shape {tuple(loss.shape)}, in batch {index}; take"
            " the mean over the batch"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {index} depends on no parameter that requires a gradient; loss_fn"
            " must not detach it or run under no_grad"
        )
    return loss
