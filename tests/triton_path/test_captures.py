"""CUDA graphs without a GPU: what a capture leaves to its graph, and what it is refused.

The interpreter runs a captured step at once; its launches are then replayed as a graph would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton import adaptive_clip_grad_, dispatch
from agc_triton.triton_path.launches import Launch
from agc_triton.triton_path.tables import CAPTURES
from tests.support.checks import check_clipped, oracle_for, states_of
from tests.support.optimizers import CLIPPING, EACH_WAY, STATEFUL, TRITON, build
from tests.support.places import DEVICE, KERNELS
from tests.support.ratios import check_ratios, latest, ratios_of
from tests.support.soak import soaked
from tests.support.tensors import TILE_SHAPES, assign, grads_like, same, weights

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu/test_graphs.py captures there")

# With steps alone, and with scalars of its own, that go on in a graph.
ON_DEVICE = ("AdamW", "NAdam")
every_rule = pytest.mark.parametrize("name", soaked(EACH_WAY, lambda name: name in ON_DEVICE))


class Graph:
    """The launches of a step, and the upload before them, to be made again."""

    def __init__(self, launches: list[tuple[Launch, Any]]) -> None:
        self.launches = launches

    def replay(self) -> None:
        for launch, varying in self.launches:
            launch.fire(*varying)


@contextmanager
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    """A graph of what is launched within; nothing is launched yet."""
    launches: list[tuple[Launch, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "is_capturing", lambda: True)
        patch.setattr(Launch, "fire", lambda launch, *varying: launches.append((launch, varying)))
        yield Graph(launches)


def make_grads(seed: int) -> list[Tensor]:
    return grads_like(weights(TILE_SHAPES), seed)


class Captured:
    """An optimizer beside its oracle, through eager steps and replays."""

    def __init__(self, name: str) -> None:
        self.params = weights(TILE_SHAPES)
        options = {**STATEFUL[name], **TRITON}
        self.optimizer: Any = build(name, self.params, options)
        self.oracle = oracle_for(name, self.params, KERNELS, **options)

    def eager(self, seed: int, without: int | None = None) -> None:
        grads: list[Any] = make_grads(seed)
        if without is not None:
            grads[without] = None
        assign(self.params, grads)
        self.oracle.step(grads)
        self.optimizer.step()
        self.check()

    def replay(self, graph: Graph, grads: list[Tensor]) -> None:
        self.oracle.step(grads)
        graph.replay()
        self.check()

    def check(self) -> None:
        self.oracle.check(self.params, states_of(self.optimizer, self.params))


@every_rule
def test_graphs_keep_their_own_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Captured(name)
    run.eager(0)
    plan = run.optimizer._paths.triton.plan
    graphs = []
    for seed in (1, 2):
        grads = make_grads(seed)
        assign(run.params, grads)
        with capture(monkeypatch) as graph:
            run.optimizer.step()
        graphs.append((graph, grads))
    for graph, grads in (*graphs, graphs[0]):
        run.replay(graph, grads)
    run.eager(3)
    run.replay(*graphs[1])
    assert run.optimizer._paths.triton.plan is plan


def test_two_graphs_of_the_same_gradients(
    uploads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Captured("AdamW")
    run.eager(0)
    grads = make_grads(1)
    assign(run.params, grads)
    uploads.clear()
    graphs = []
    for _ in range(2):
        with capture(monkeypatch) as graph:
            run.optimizer.step()
        graphs.append(graph)
    assert uploads == [True, True]  # either may be replayed without the other
    for graph in reversed(graphs):
        run.replay(graph, grads)


@every_rule
def test_a_graph_and_steps_of_part_of_the_parameters_count_together(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Captured(name)
    run.eager(0, without=2)
    grads: list[Any] = make_grads(1)
    grads[2] = None
    assign(run.params, grads)
    with capture(monkeypatch) as graph:
        run.optimizer.step()
    run.replay(graph, grads)
    run.eager(2, without=1)  # the first gradient of the third parameter: another plan
    run.replay(graph, grads)
    run.eager(3)
    run.replay(graph, grads)


def test_captures_without_a_plan_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Captured("AdamW")
    assign(run.params, make_grads(0))
    before = copy.deepcopy(run.params)
    with capture(monkeypatch), pytest.raises(RuntimeError, match=r"step\(\) once .*before"):
        run.optimizer.step()
    assert same(run.params, before)


def test_more_captures_than_there_is_pinned_memory_for(
    uploads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Captured("AdamW")
    run.eager(0)
    graphs = []
    for seed in range(1, CAPTURES + 3):
        grads = make_grads(seed)
        assign(run.params, grads)
        with capture(monkeypatch) as graph:
            run.optimizer.step()
        graphs.append((graph, grads))
    assert uploads == [False, *[True] * len(graphs)]
    for graph, grads in (graphs[-1], graphs[0], graphs[-2]):
        run.replay(graph, grads)


def test_clipping_alone_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights(TILE_SHAPES)

    def clip(grads: list[Tensor]) -> None:
        assign(params, grads)
        adaptive_clip_grad_(params, clipping=CLIPPING, backend="triton")

    with capture(monkeypatch), pytest.raises(RuntimeError, match="clipping once on them before"):
        clip(make_grads(0))
    clip(make_grads(0))
    graphs = []
    for seed in (1, 2):
        grads = make_grads(seed)
        with capture(monkeypatch) as graph:
            clip(grads)
        assert same(grads, make_grads(seed))
        graphs.append((graph, grads, seed))
    eager = make_grads(3)
    clip(eager)
    others = [weights(TILE_SHAPES) for _ in range(9)]  # more than there are plans kept for
    for other in others:
        assign(other, make_grads(4))
        adaptive_clip_grad_(other, clipping=CLIPPING, backend="triton")
    for graph, grads, seed in graphs:
        graph.replay()
        for p, grad, before in zip(params, grads, make_grads(seed), strict=True):
            check_clipped(p, before, grad)
    before_eager = make_grads(3)
    for p, grad, before in zip(params, eager, before_eager, strict=True):
        check_clipped(p, before, grad)


@every_rule
def test_what_checkpoints_replace_is_let_go_but_graphs_stay(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Captured(name)
    run.eager(0)
    grads = make_grads(1)
    assign(run.params, grads)
    with capture(monkeypatch):
        run.optimizer.step()
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert run.optimizer._paths.triton.plan is None
    run.eager(2)
    # Whatever there is no plan for any more.
    run.optimizer.backend = "torch"
    assign(run.params, make_grads(3))
    run.optimizer.step()
    assert run.optimizer._paths.triton.plan is None
    assert len(run.optimizer._paths.triton.captured) == 1


def test_replays_record_ratios_as_the_step_that_was_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Captured("AdamW")
    run.optimizer.track_clipping(5)
    run.eager(0)  # tracked
    grads = make_grads(1)
    assign(run.params, grads)
    with capture(monkeypatch) as graph:  # tracked as all that is captured
        run.optimizer.step()
    expected: list[Any] = []
    for _ in range(2):
        expected = [ratios_of(p, grad) for p, grad in zip(run.params, grads, strict=True)]
        run.replay(graph, grads)
    for record, ratios in zip(latest(run.optimizer, run.params), expected, strict=True):
        check_ratios(record, ratios, 2)
    run.optimizer.track_clipping(0)
    run.eager(2)  # by another plan, which records nothing
    expected = [ratios_of(p, grad) for p, grad in zip(run.params, grads, strict=True)]
    run.replay(graph, grads)
    for record, ratios in zip(latest(run.optimizer, run.params), expected, strict=True):
        check_ratios(record, ratios, 2)


def test_replays_of_a_plan_that_was_replaced_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Captured("SGD")
    run.optimizer.track_clipping(5)
    run.eager(0, without=2)
    grads: list[Any] = make_grads(1)
    grads[2] = None
    assign(run.params, grads)
    with capture(monkeypatch) as graph:
        run.optimizer.step()
    run.eager(2, without=1)  # the first gradient of the third parameter: another plan, not tracked
    before = [p.clone() for p in run.params]
    run.replay(graph, grads)
    records = latest(run.optimizer, run.params)
    for record, p, grad in zip(records, before, grads, strict=True):
        if grad is not None:
            check_ratios(record, ratios_of(p, grad), 2)
    assert records[2] is None


def test_a_state_of_another_kind_is_laid_out_anew() -> None:
    param = torch.randn(3, 4, dtype=torch.complex64)
    values, grad = (
        torch.randn(3, 4, dtype=torch.complex64),
        torch.randn(3, 4, dtype=torch.complex64),
    )
    results = []
    for buffer in (values.clone(), values.conj().clone().conj()):
        weight = param.clone()
        optimizer = build("SGD", [weight], {**STATEFUL["SGD"], **TRITON})
        optimizer.state[weight]["momentum_buffer"] = buffer
        weight.grad = grad.clone()
        optimizer.step()
        results.append(weight)
    assert torch.equal(*results)
