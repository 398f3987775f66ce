"""What logs clipping while a model is trained: in a loop, by Lightning and by transformers.

Lightning and transformers are imported where their callbacks are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from agc_triton.extras import needed
from agc_triton.integrations.monitor import ClipMonitor

if TYPE_CHECKING:
    from agc_triton.integrations.of_lightning import LightningClipMonitor
    from agc_triton.integrations.of_transformers import TransformersClipCallback

__all__ = ["ClipMonitor", "LightningClipMonitor", "TransformersClipCallback"]

# The package that each callback is of, and the module that has it.
_LAZY = {
    "LightningClipMonitor": ("lightning", "of_lightning"),
    "TransformersClipCallback": ("transformers", "of_transformers"),
}


def __getattr__(name: str) -> Any:
    """A callback, whose base class is another package's.

    Raises:
        ImportError: that package is not installed.
    """
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, module = _LAZY[name]
    needed(package, f"{name} is a callback of {package}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
