"""CUDA graphs: captured once, replayed with other gradients and another learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.cases import STATEFUL, build
from tests.support.cuda_cases import (
    capturable,
    copy_grads,
    every_rule,
    make_grads,
    make_params,
    needs_gpu,
    set_grads,
    side_stream,
)
from tests.support.triton_cases import (
    CLIPPING,
    KernelOracle,
    states_of,
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
    params, eager_params = make_params(), make_params()
    optimizer, oracle = build(name, params, options), KernelOracle(name, params, **options)
    eager = build(name, eager_params, {**STATEFUL[name], "clipping": CLIPPING, "backend": "torch"})

    def expect(rate: float, grads: Sequence[Tensor]) -> None:
        options["lr"].fill_(rate)
        eager.param_groups[0]["lr"] = oracle.options["lr"] = rate
        set_grads(eager_params, grads)
        eager.step()
        oracle.step(grads)

    def check() -> None:
        oracle.check(params, states_of(optimizer, params))
        oracle.check(eager_params, states_of(eager, eager_params))

    set_grads(params, make_grads(0))
    expect(0.5, make_grads(0))
    with side_stream():
        optimizer.step()
    check()
    graph = capture(optimizer)
    check()  # capturing does nothing yet
    for seed, rate in enumerate((0.5, 0.125, 0.25), 1):
        expect(rate, make_grads(seed))
        copy_grads(params, make_grads(seed))
        graph.replay()
        check()
    # An eager step on other gradients, and the graph again.
    static = [p.grad for p in params]
    expect(0.5, make_grads(7))
    set_grads(params, make_grads(7))
    optimizer.step()
    check()
    expect(0.25, make_grads(8))
    for p, grad in zip(params, static, strict=True):
        p.grad = grad
    copy_grads(params, make_grads(8))
    graph.replay()
    check()


@every_rule
def test_two_graphs_keep_their_own_gradients(name: str) -> None:
    options = capturable(name)
    params = make_params()
    optimizer, oracle = build(name, params, options), KernelOracle(name, params, **options)
    set_grads(params, make_grads(0))
    oracle.step(make_grads(0))
    with side_stream():
        optimizer.step()
    graphs = []
    for seed in (1, 2):
        set_grads(params, make_grads(seed))
        graphs.append((capture(optimizer), [p.grad for p in params], seed))
    for graph, _, seed in (*graphs, *graphs):
        oracle.step(make_grads(seed))
        graph.replay()
        oracle.check(params, states_of(optimizer, params))


def test_a_graph_of_the_whole_training_step() -> None:
    options = capturable("AdamW")
    params = [p.requires_grad_() for p in make_params()]
    optimizer, oracle = build("AdamW", params, options), KernelOracle("AdamW", params, **options)
    inputs = make_grads(0)

    def train() -> None:
        losses = [(p * x).sum() for p, x in zip(params, inputs, strict=True)]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()

    with side_stream():
        for seed in range(2):
            for x, value in zip(inputs, make_grads(seed), strict=True):
                x.copy_(value)
            optimizer.zero_grad(set_to_none=True)
            train()
    for seed in range(2):
        oracle.step(make_grads(seed))
    oracle.check(params, states_of(optimizer, params))
    # Gradients are allocated in the graph's own pool: other addresses than in the eager steps.
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    for seed in range(2, 5):
        for x, value in zip(inputs, make_grads(seed), strict=True):
            x.copy_(value)
        oracle.step(make_grads(seed))
        graph.replay()
        oracle.check(params, states_of(optimizer, params))


def test_a_learning_rate_that_becomes_a_tensor_of_equal_value() -> None:
    options = {**capturable("AdamW"), "lr": 0.5}
    params = make_params()
    optimizer, oracle = build("AdamW", params, options), KernelOracle("AdamW", params, **options)
    set_grads(params, make_grads(0))
    oracle.step(make_grads(0))
    with side_stream():
        optimizer.step()
    lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="cuda")
    oracle.step(make_grads(0))
    with side_stream():
        optimizer.step()  # a capture loads no kernels
    graph = capture(optimizer)
    oracle.options["lr"] = 0.125
    oracle.step(make_grads(0))
    lr.fill_(0.125)
    graph.replay()
    oracle.check(params, states_of(optimizer, params))
