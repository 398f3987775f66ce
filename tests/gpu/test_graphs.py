"""CUDA graphs: captured once, replayed with other gradients and another learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.checks import oracle_for, states_of
from tests.support.cuda import (
    capturable,
    copy_grads,
    cuda_weights,
    every_rule,
    needs_gpu,
    side_stream,
)
from tests.support.optimizers import CLIPPING, STATEFUL, build
from tests.support.places import KERNELS, Place
from tests.support.tensors import (
    assign,
    grads_like,
    set_grads,
)

pytestmark = needs_gpu


def capture(optimizer: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@every_rule
def test_replays_of_a_graph_follow_the_learning_rate(name: str) -> None:
    options = capturable(name)
    params, eager_params = cuda_weights(), cuda_weights()
    optimizer, oracle = build(name, params, options), oracle_for(name, params, KERNELS, **options)
    eager = build(name, eager_params, {**STATEFUL[name], "clipping": CLIPPING, "backend": "torch"})
    torch_path = Place("torch", "cuda")
    theirs = oracle_for(name, eager_params, torch_path, **STATEFUL[name], clipping=CLIPPING)

    def expect(rate: float, grads: Sequence[Tensor]) -> None:
        options["lr"].fill_(rate)
        eager.param_groups[0]["lr"] = oracle.options["lr"] = theirs.options["lr"] = rate
        assign(eager_params, grads)
        eager.step()
        for each in (oracle, theirs):
            each.step(grads)

    def check() -> None:
        oracle.check(params, states_of(optimizer, params))
        theirs.check(eager_params, states_of(eager, eager_params))

    set_grads(params, 0)
    expect(0.5, grads_like(params, 0))
    with side_stream():
        optimizer.step()
    check()
    graph = capture(optimizer)
    check()  # capturing does nothing yet
    for seed, rate in enumerate((0.5, 0.125, 0.25), 1):
        expect(rate, grads_like(params, seed))
        copy_grads(params, grads_like(params, seed))
        graph.replay()
        check()
    # An eager step on other gradients, and the graph again.
    static = [p.grad for p in params]
    expect(0.5, grads_like(params, 7))
    set_grads(params, 7)
    optimizer.step()
    check()
    expect(0.25, grads_like(params, 8))
    for p, grad in zip(params, static, strict=True):
        p.grad = grad
    copy_grads(params, grads_like(params, 8))
    graph.replay()
    check()


@every_rule
def test_two_graphs_keep_their_own_gradients(name: str) -> None:
    options = capturable(name)
    params = cuda_weights()
    optimizer, oracle = build(name, params, options), oracle_for(name, params, KERNELS, **options)
    set_grads(params, 0)
    oracle.step(grads_like(params, 0))
    with side_stream():
        optimizer.step()
    graphs = []
    for seed in (1, 2):
        set_grads(params, seed)
        graphs.append((capture(optimizer), [p.grad for p in params], seed))
    for graph, _, seed in (*graphs, *graphs):
        oracle.step(grads_like(params, seed))
        graph.replay()
        oracle.check(params, states_of(optimizer, params))


def test_a_graph_of_the_whole_training_step() -> None:
    options = capturable("AdamW")
    params = [p.requires_grad_() for p in cuda_weights()]
    optimizer = build("AdamW", params, options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    inputs = grads_like(params, 0)

    def train() -> None:
        losses = [(p * x).sum() for p, x in zip(params, inputs, strict=True)]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()

    with side_stream():
        for seed in range(2):
            for x, value in zip(inputs, grads_like(params, seed), strict=True):
                x.copy_(value)
            optimizer.zero_grad(set_to_none=True)
            train()
    for seed in range(2):
        oracle.step(grads_like(params, seed))
    oracle.check(params, states_of(optimizer, params))
    # Gradients are allocated in the graph's own pool: other addresses than in the eager steps.
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    for seed in range(2, 5):
        for x, value in zip(inputs, grads_like(params, seed), strict=True):
            x.copy_(value)
        oracle.step(grads_like(params, seed))
        graph.replay()
        oracle.check(params, states_of(optimizer, params))


def test_a_learning_rate_that_becomes_a_tensor_of_equal_value() -> None:
    options = {**capturable("AdamW"), "lr": 0.5}
    params = cuda_weights()
    optimizer = build("AdamW", params, options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    set_grads(params, 0)
    oracle.step(grads_like(params, 0))
    with side_stream():
        optimizer.step()
    lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="cuda")
    oracle.step(grads_like(params, 0))
    with side_stream():
        optimizer.step()  # a capture loads no kernels
    graph = capture(optimizer)
    oracle.options["lr"] = 0.125
    oracle.step(grads_like(params, 0))
    lr.fill_(0.125)
    graph.replay()
    oracle.check(params, states_of(optimizer, params))
