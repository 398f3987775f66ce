"""Settings for all tests."""

from __future__ import annotations

import torch
from hypothesis import settings

# torch's fused kernels wake all threads for tensors of any size, which takes longer than the work.
torch.set_num_threads(1)

# The same examples in each run, so that a failure can be repeated; no deadline, as machines stall.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")
