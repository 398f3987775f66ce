"""Scikit-learn's bundled digits: 1,437 images of 8x8 to train on and 360 to test on."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.lib.data.sets import Held, Read

CLASSES = 10


def read() -> Read:
    """The same split every time."""
    # Not for other data: it takes seconds to import.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test, *both_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    held, held_out = (
        Held(torch.from_numpy(x.astype(np.uint8)).view(-1, 1, 8, 8), torch.from_numpy(y))
        for x, y in zip((train, test), both_labels, strict=True)
    )
    return Read(held, held_out, CLASSES, flip=False)
