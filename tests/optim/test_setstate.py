"""opt.__setstate__ with some of state, param_groups and defaults, as torch.optim takes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from torch.optim import Optimizer

from agc_triton import AGC
from tests.support.optimizers import EACH_WAY, PAIRS, STATEFUL, build, takes_more_later
from tests.support.places import KERNELS, Place
from tests.support.soak import soaked
from tests.support.tensors import SHAPES, same
from tests.support.training import train

CLIPPING = 0.05
BASES = {cls.__name__: cls for cls in PAIRS}
MAKE: dict[str, Callable[[str, Any, str], Any]] = {
    "class": lambda name, params, backend: build(
        name, params, {**STATEFUL[name], "clipping": CLIPPING, "backend": backend}
    ),
    "wrapper": lambda name, params, backend: AGC(
        BASES[name](params, **STATEFUL[name]), clipping=CLIPPING, backend=backend
    ),
}
every_optimizer = pytest.mark.parametrize("name", EACH_WAY)
every_make = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@every_make
@pytest.mark.parametrize("name", soaked(EACH_WAY, lambda name: name in ("SGD", "NAdam")))
def test_a_state_alone_starts_anew(name: str, make: Any, place: Place) -> None:
    params = place.weights(SHAPES)
    optimizer = make(name, params, place.backend)
    train(optimizer, params, range(3))
    optimizer.__setstate__({"state": defaultdict(dict)})
    assert not optimizer.state
    fresh_params = [p.detach().clone() for p in params]
    fresh = make(name, fresh_params, place.backend)
    for steps in (range(3, 4), range(4, 6)):
        train(optimizer, params, steps)
        train(fresh, fresh_params, steps)
        assert same(params, fresh_params)
        assert same(optimizer.state_dict(), fresh.state_dict())


@every_make
@every_optimizer
def test_groups_alone_keep_the_state_and_their_agc_options(name: str, make: Any) -> None:
    params = KERNELS.weights(SHAPES)
    optimizer: Optimizer = make(name, params, KERNELS.backend)
    train(optimizer, params, range(2))
    state = optimizer.state
    bare = BASES[name](params, **{**STATEFUL[name], "lr": 0.25}).param_groups
    optimizer.__setstate__({"param_groups": bare})
    assert optimizer.state is state
    assert optimizer.param_groups is bare
    assert (bare[0]["lr"], bare[0]["clipping"], bare[0]["agc_eps"]) == (0.25, CLIPPING, 1e-3)
    train(optimizer, params, range(2, 3))


@every_make
@every_optimizer
def test_defaults_alone_are_those_of_groups_to_come(name: str, make: Any) -> None:
    first, second = KERNELS.weights([(6, 5), (4, 3)])
    optimizer = make(name, [first], KERNELS.backend)
    if isinstance(optimizer, AGC) and not takes_more_later(name):
        pytest.skip("torch's class takes no parameters later")
    defaults = BASES[name]([first], **{**STATEFUL[name], "lr": 0.25}).defaults
    optimizer.__setstate__({"defaults": defaults})
    assert optimizer.defaults["clipping"] == CLIPPING
    optimizer.add_param_group({"params": [second]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert [group["clipping"] for group in optimizer.param_groups] == [CLIPPING] * 2
    train(optimizer, [first, second], range(2))
