"""The docstrings and signatures of AGC optimizers: torch's arguments, then ours."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_AGC_DOC = """
    Each unit's gradient norm is held to ``clipping * max(||w||, agc_eps)`` (Brock et al. 2021,
    arXiv 2102.06171, equation 3) before any weight decay is added; ``.grad`` itself is not changed.
    Parameters have any shape and any real or complex floating dtype (the kernels take fp16, bf16,
    fp32 and fp64); norms are fp32, of fp64 parameters fp64.
    Groups, state and checkpoints are those of the torch.optim class; groups may set ``clipping``,
    ``agc_eps`` and ``unit_dim``.

    Args:
{theirs}
        clipping: limit as a fraction of the unit's weight norm; 0 or None for no clipping at all.
        agc_eps: the least weight norm assumed, so that zero-initialized units can train.
        unit_dim: dimension that indexes units, or a tuple of several, as stacked experts have
            ((0, 1) where they are stored (experts, out, in)); None for 0, as Linear, Conv and
            Embedding need. In a tuple ``(dim, parts)`` cuts a dimension into equal parts, each of
            units of its own: ((0, groups), 1) for a ConvTranspose with groups. "tensor" makes each
            tensor one unit. Tensors of squeezed rank <= 1 are one unit whatever it says.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        nonfinite: what a gradient with NaN or inf does. ``"propagate"``: NaN goes into the weights
            as in torch.optim, its unit unclipped; inf does as NaN, and the rest of its unit gets
            zero. ``"skip_unit"``: a unit whose gradient norm is not finite keeps its weights and
            states (`skipped_units` counts these), all others and the step count go on; the norm is
            inf too where only the sum of squares overflows, beyond about 1.8e19 in fp32.
            ``"raise"``: an error before anything has changed, for which each step waits for the
            device.
        track_clipping: steps from one whose ratios are kept to the next, for `clip_stats` and
            `clip_log`; 0 keeps none (see the method `track_clipping`).

    Raises:
        ValueError: torch.optim's own checks, an AGC option out of range or not known, or
            ``backend="triton"`` with an option that means the torch path.
        TypeError: an AGC option of the wrong type, or an FSDP1 flat parameter.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """


def documented(doc: str | None, torchs: str | None) -> str:
    """A class's docstring with what AGC does, and all arguments; ``torchs`` is its base's."""
    found = re.search(r"^    Args:\n((?: {8}.*\n)+)", torchs or "", re.MULTILINE)
    theirs = found[1].rstrip() if found else "        as in torch.optim, and"
    return f"{doc}\n{_AGC_DOC.format(theirs=theirs)}"


def merged_signature(torchs: Callable[..., Any], ours: Callable[..., Any]) -> inspect.Signature:
    """The arguments of one constructor, then those of the other that are by keyword only."""
    _, *theirs = inspect.signature(torchs).parameters.values()
    own = inspect.signature(ours).parameters.values()
    return inspect.Signature([*theirs, *(p for p in own if p.kind is p.KEYWORD_ONLY)])
