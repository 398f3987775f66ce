"""Settings for all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples in each run, so that a failure can be repeated; no deadline, as machines stall.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")
