"""Tracked steps on a GPU: ratios, no wait for the device, graphs, a warning that comes later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.cuda import (
    capturable,
    copy_grads,
    cuda_weights,
    every_rule,
    needs_gpu,
    no_host_sync,
    side_stream,
)
from tests.support.optimizers import CLIPPING, STATEFUL, build
from tests.support.ratios import check_ratios, latest, ratios_of
from tests.support.tensors import assign, grads_like, set_grads

pytestmark = needs_gpu


def check_all(optimizer: Any, before: list[Any], number: int) -> None:
    params = optimizer.param_groups[0]["params"]
    for record, p, param in zip(latest(optimizer, params), before, params, strict=True):
        check_ratios(record, ratios_of(p, param.grad), number)


@every_rule
def test_no_step_waits_for_the_device(name: str) -> None:
    params = cuda_weights()
    options = {**STATEFUL[name], "clipping": CLIPPING, "track_clipping": 2}
    optimizer = build(name, params, options)
    set_grads(params, 0)
    optimizer.step()
    optimizer.step()  # what is compiled and pinned is there
    before = []
    with no_host_sync():
        for seed in range(1, 4):  # steps 3 to 5, of which two are tracked
            before = [p.clone() for p in params]
            copy_grads(params, grads_like(params, seed))
            optimizer.step()
    check_all(optimizer, before, 5)


@every_rule
def test_replays_of_a_graph_are_recorded(name: str) -> None:
    params = cuda_weights()
    optimizer = build(name, params, {**capturable(name), "track_clipping": 1})
    set_grads(params, 0)
    with side_stream():
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(1, 3):
        copy_grads(params, grads_like(params, seed))
        before = [p.clone() for p in params]
        graph.replay()
        check_all(optimizer, before, 2)


def test_the_warning_comes_without_a_wait() -> None:
    params = cuda_weights()
    optimizer = build("SGD", params, {"lr": 0.0, "clipping": 1e-6, "track_clipping": 1})
    assign(params, [p.clone() for p in params])
    for _ in range(10):
        optimizer.step()
        torch.cuda.synchronize()  # all but the last have been read
    with pytest.warns(UserWarning, match="over 90% of the units in each of the first 10"):
        optimizer.step()
