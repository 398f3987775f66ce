"""Checkpoints with names, with more than states, of older versions: loaded as torch.optim does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Linear
from torch.optim import Adam, AdamW, RMSprop

from agc_triton import (
    SGD_AGC,
    Adadelta_AGC,
    Adam_AGC,
    Adamax_AGC,
    AdamW_AGC,
    RAdam_AGC,
    RMSprop_AGC,
    Rprop_AGC,
)
from tests.conformance.pairs import every_class_on_both_paths
from tests.support.disk import on_disk
from tests.support.optimizers import PAIRS
from tests.support.places import DEVICE
from tests.support.tensors import parameters, same
from tests.support.training import train


@pytest.mark.parametrize("cls", PAIRS)
def test_names_are_saved_and_loaded_as_torchs(cls: Any) -> None:
    torch.manual_seed(0)
    model = Linear(4, 3)
    params = list(model.parameters())
    ours, theirs = PAIRS[cls](model.named_parameters()), cls(model.named_parameters())
    train(ours, params, range(1))
    checkpoint = on_disk(ours.state_dict())
    assert checkpoint["param_groups"][0]["param_names"] == ["weight", "bias"]
    theirs.load_state_dict(checkpoint)
    unnamed = PAIRS[cls](model.parameters())
    unnamed.load_state_dict(checkpoint)
    for optimizer in (theirs, unnamed):
        assert same(ours.state_dict(), optimizer.state_dict())
    # A checkpoint without names leaves those there.
    ours.load_state_dict(cls(model.parameters()).state_dict())
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]


@every_class_on_both_paths
def test_what_users_keep_beside_the_states_is_saved_and_loaded(cls: Any, backend: str) -> None:
    params: list[Any] = [p.detach().to(DEVICE) for p in parameters()]
    ours = PAIRS[cls](params, backend=backend)
    train(ours, params, range(1))
    for p in params:
        ours.state[p].update(decay=torch.tensor(0.5), slow=torch.ones(2, 9))
    checkpoint = on_disk(ours.state_dict())
    copied: list[Any] = [p.clone() for p in params]
    loaded, theirs = PAIRS[cls](copied, backend=backend), cls(copied)
    for optimizer in (loaded, theirs):
        optimizer.load_state_dict(checkpoint)
        assert same(optimizer.state_dict()["state"], checkpoint["state"])
    train(loaded, copied, range(1, 3))
    train(ours, params, range(1, 3))
    assert same(params, copied)
    assert same(loaded.state_dict()["state"], ours.state_dict()["state"])


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("cls", [Adam, AdamW, RMSprop])
def test_steps_counted_in_integer_tensors(cls: Any, dtype: torch.dtype, some: bool) -> None:
    def run(make: Any, **options: Any) -> Any:
        params = parameters()
        optimizer = make(params, **options)
        train(optimizer, params, range(2))
        saved = on_disk(optimizer.state_dict())
        for entry in list(saved["state"].values())[some:]:
            entry["step"] = entry["step"].to(dtype)
        optimizer.load_state_dict(saved)
        train(optimizer, params, range(2, 4))
        return [p.detach() for p in params], optimizer.state_dict()["state"]

    ours, theirs = run(PAIRS[cls], clipping=1e6), run(cls)
    torch.testing.assert_close(ours, theirs)
    assert ours[1][4]["step"].dtype == dtype


OLD_GROUPS: dict[Any, dict[str, Any]] = {
    SGD_AGC: {"lr": 0.01, "momentum": 0.9, "dampening": 0, "weight_decay": 0},
    Adam_AGC: {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0},
    AdamW_AGC: {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    RMSprop_AGC: {"lr": 0.01, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0, "momentum": 0},
    # Adagrad's, NAdam's and ASGD's had numbers beside the count too.
    Adadelta_AGC: {"lr": 0.5, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.1},
    Adamax_AGC: {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0},
    RAdam_AGC: {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0},
    Rprop_AGC: {"lr": 0.01, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)},
}


@pytest.mark.parametrize("with_agc_options", [True, False])
@pytest.mark.parametrize("cls", OLD_GROUPS)
def test_checkpoints_that_count_steps_in_a_python_int(cls: Any, with_agc_options: bool) -> None:
    # As torch before 1.12 and agc_optims 0.0.2 wrote them, without the options that came later.
    params = parameters(dtype=torch.float64)
    options = OLD_GROUPS[cls]
    optimizer = cls(params, clipping=0.05, **options)
    train(optimizer, params, range(3))

    group = {**options, "params": list(range(len(params)))}
    if with_agc_options:
        group |= {"clipping": 0.05, "agc_eps": 1e-3}
    state = on_disk(optimizer.state_dict()["state"])
    for entry in state.values():
        if "step" in entry:
            entry["step"] = int(entry["step"])
    copied = copy.deepcopy(params)
    loaded = cls(copied, clipping=0.6 if with_agc_options else 0.05)
    loaded.load_state_dict(on_disk({"state": state, "param_groups": [group]}))

    train(optimizer, params, range(3, 6))
    train(loaded, copied, range(3, 6))
    torch.testing.assert_close(copied, params, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        loaded.state_dict()["state"], optimizer.state_dict()["state"], rtol=1e-12, atol=1e-14
    )
