"""A training loop that hypothesis decides on, and what weights and states have to be in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis.extra.numpy as hnp
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from tests.support.checks import oracle_for
from tests.support.disk import on_disk
from tests.support.formulas import SCALARS, defaults
from tests.support.guards import Guarded
from tests.support.optimizers import build
from tests.support.oracle import AGC, Oracle
from tests.support.places import DEVICE, Place
from tests.support.ratios import check_ratios, latest, ratios_of
from tests.support.tensors import GRAD_LAYOUTS, grad_like, same, weight
from tests.support.training import Training, options_of

# What parameters are cast between.
WIDE, NARROW = (torch.float32, torch.float64), (torch.float32, torch.float16, torch.bfloat16)
# With 16 bits an eps of 1e-8 is 0, and small variances are not there to be centered.
EPS = {WIDE: [1e-8, 1e-3], NARROW: [0.1, 0.3]}

# Values that a group can start with and change to at any time.
COMMON: dict[str, list[Any]] = {
    "lr": [0.5, 0.03],
    "weight_decay": [0.1, 0.0],
    "clipping": [0.05, 0.3, 1.5, 0, None],
    "agc_eps": [1e-3, 1.0, 0.0],
    "unit_dim": [None, 0, 1, -1, -2],
    "maximize": [False, True],
}
OWN: dict[str, dict[str, list[Any]]] = {
    "SGD": {"momentum": [0.9, 0.5, 0.0], "dampening": [0.0, 0.4], "nesterov": [False, True]},
    "Adam": {"betas": [(0.9, 0.999), (0.5, 0.75)]},
    "AdamW": {"betas": [(0.9, 0.999), (0.5, 0.75)]},
    "RMSprop": {"alpha": [0.99, 0.5]},
    "Adagrad": {"lr_decay": [0.1, 0.0]},
    "Adadelta": {"rho": [0.9, 0.5]},
    "Adamax": {"betas": [(0.9, 0.999), (0.5, 0.75)]},
    "NAdam": {"betas": [(0.9, 0.999), (0.5, 0.75)], "decoupled_weight_decay": [False, True]},
    "RAdam": {"betas": [(0.9, 0.999), (0.5, 0.75)], "decoupled_weight_decay": [False, True]},
    "ASGD": {"lambd": [0.1, 0.01], "alpha": [0.5, 1.0], "t0": [0.0, 2.0]},
    "Rprop": {"etas": [(0.5, 1.2), (0.25, 1.5)], "step_sizes": [(0.01, 0.5)]},
}
# Values that decide which states there are: torch.optim cannot change these later.
FIXED: dict[str, dict[str, list[Any]]] = {
    "Adam": {"amsgrad": [False, True]},
    "AdamW": {"amsgrad": [False, True]},
    "RMSprop": {"centered": [False, True], "momentum": [0.0, 0.9]},
}


@st.composite
def strided(draw: st.DrawFn, values: Tensor, holes: bool) -> Tensor:
    """The values in any memory order, with any strides where the size is 1."""
    strides, step = [0] * values.dim(), draw(st.sampled_from([1, 2])) if holes else 1
    for dim in draw(st.permutations(range(values.dim()))):
        size = values.shape[dim]
        strides[dim] = draw(st.sampled_from([step, 1, 7])) if size == 1 else step
        step *= max(size, 1)
        step += draw(st.sampled_from([0, 0, 3])) if holes else 0
    return torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)


class Loop(Training):
    """A training loop that keeps what weights and states have to be outside the optimizer."""

    def __init__(
        self, name: str, backend: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject
    ) -> None:
        self.name, self.backend, self.dtypes, self.data = name, backend, dtypes, data
        self.device = DEVICE if backend == "triton" else "cpu"
        self.known = {*defaults(name), *AGC}
        self.given = {
            "backend": backend,
            "nonfinite": self.draw(["propagate", "skip_unit", "raise"]),
            "track_clipping": self.draw([0, 1, 2]),
        }
        # torch's foreach SGD, which steps groups without clipping, writes to .grad with Nesterov;
        # its foreach ASGD rounds eta more often than the oracle knows with 16 bits.
        if backend == "torch" and name not in ("SGD", "ASGD"):
            self.given["foreach"] = self.draw([None, None, True])
        self.homes: dict[Tensor, Guarded] = {}
        self.left: list[Guarded] = []
        self.kept: dict[Tensor, tuple[Tensor, dict[str, Tensor]]] = {}
        self.seed = 0
        groups = [self._group() for _ in range(data.draw(st.integers(1, 2)))]
        super().__init__(name, groups, clipping=0.1, **self.given)
        for param, entry in self.optimizer.state.items():  # Adagrad's are there from the start
            self.kept[param] = self.kept[param][0], {k: x.clone() for k, x in entry.items()}

    def draw(self, values: Sequence[Any]) -> Any:
        return self.data.draw(st.sampled_from(values))

    def _group(self) -> dict[str, Any]:
        params = [self._param() for _ in range(self.data.draw(st.integers(1, 2)))]
        values = {**COMMON, **OWN[self.name], **FIXED.get(self.name, {})}
        values = {key: given for key, given in values.items() if key in self.known}
        if "eps" in self.known:
            values["eps"] = EPS[self.dtypes]
        if self.dtypes is NARROW:
            values.pop("centered", None)
        return {"params": params, **{key: self.draw(given) for key, given in values.items()}}

    def _param(self) -> Parameter:
        self.seed += 1
        shape = self.data.draw(hnp.array_shapes(min_dims=0, max_dims=5, max_side=3))
        # Some are alike, to be exchanged; some are empty, which kernels do not take.
        shape = self.draw([(3, 2), shape, shape, (0, 2)])
        param = Parameter(torch.empty(shape, dtype=self.draw(self.dtypes), device=self.device))
        self._place(param, weight(shape, param.dtype, seed=self.seed))
        self.kept[param] = param.detach().clone(), {}
        return param

    def _place(self, param: Tensor, values: Tensor) -> None:
        """Put the parameter elsewhere in memory; what is left behind must stay as it is."""
        given = self.data.draw(strided(values.cpu(), self.backend == "torch"))
        home = Guarded(given.to(self.device), self.draw([0, 1, 4]))
        param.data = home.tensor
        if param in self.homes:
            self._leave(self.homes[param])
        self.homes[param] = home

    def _leave(self, home: Guarded) -> None:
        home.abandon()
        self.left.append(home)

    def backward(self) -> None:
        """New gradients in new memory, of any strides, or none."""
        for param in self.params:
            if param.grad is not None:
                param.grad.fill_(torch.nan)
            self.seed += 1
            kind = self.draw(["like", "strided", "expanded", "partly expanded", "none"])
            values = grad_like(param.detach(), self.seed)
            if kind == "none" or not param.requires_grad:
                param.grad = None
            elif kind in GRAD_LAYOUTS and values.numel():
                param.grad = GRAD_LAYOUTS[kind](values)
            elif kind == "like":
                param.grad = torch.empty_like(param).copy_(values)
            else:
                given = self.data.draw(strided(values.cpu(), holes=True))
                self.left.append(Guarded(given.to(self.device), self.draw([0, 1])))
                param.grad = self.left[-1].tensor

    def oracle(self, p: Tensor, group: Mapping[str, Any]) -> Oracle:
        options = options_of(self.name, group)
        value, state = self.kept[p]
        # What is not dense, or laid out unlike its states, is not for torch's fused kernels.
        states = self.optimizer.state.get(p, {})
        laid_out = [torch.empty_like(p), *(x for key, x in states.items() if key not in SCALARS)]
        alike = all(x.stride() == p.stride() for x in laid_out)
        fused = alike and group["clipping"] and not group["foreach"]
        mode = "default" if fused else "not fused"
        oracle = oracle_for(self.name, [p], Place(self.backend, self.device), mode, **options)
        oracle.load([value], [state])
        return oracle

    def step(self) -> None:
        for param in self.params:
            value, state = self.kept[param]
            assert same((param.detach(), self.optimizer.state.get(param, {})), (value, state))
        number = self.optimizer._recorder.next(skip=False, capturing=False).number
        super().step()
        self._check_ratios(number)
        for param in self.params:
            state = {k: x.clone() for k, x in self.optimizer.state.get(param, {}).items()}
            self.kept[param] = param.detach().clone(), state
        for guard in (*self.homes.values(), *self.left):
            guard.assert_intact()

    def _check_ratios(self, number: int | None) -> None:
        """What a step of this number has recorded, if it was tracked, of what has a gradient."""
        records = iter(latest(self.optimizer, self.params))
        for group in self.groups:
            for param, record in zip(group["params"], records, strict=False):
                if number is not None and param.grad is not None and param.numel():
                    value, _ = self.kept[param]
                    options = group["unit_dim"], group["agc_eps"]
                    check_ratios(record, ratios_of(value, param.grad, *options), number)
                elif record is not None and param.numel():
                    assert record.number != number

    def some(self) -> list[Tensor]:
        """One of the parameters, or all of them."""
        chosen: list[Tensor] = self.draw([*([p] for p in self.params), self.params])
        return chosen

    def again(self) -> None:
        """Another step on the gradients there are."""

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.draw([True, False]))

    def freeze_or_thaw(self) -> None:
        for param in self.some():
            param.requires_grad_(not param.requires_grad)
            param.grad = None

    def add_group(self) -> None:
        if len(self.groups) < 3:
            self.optimizer.add_param_group(self._group())

    def change_option(self) -> None:
        group = self.draw(self.groups)
        values = {**COMMON, **OWN[self.name]}
        key = self.draw([key for key in values if key in self.known])
        group[key] = self.draw(values[key])

    def go_on_from_a_checkpoint(self) -> None:
        saved = on_disk(self.optimizer.state_dict())
        if self.draw([True, False]):
            groups = [{"params": group["params"]} for group in self.groups]
            self.optimizer = build(self.name, groups, self.given)
        self.optimizer.load_state_dict(saved)

    def go_back_to_a_checkpoint(self) -> None:
        saved = on_disk(self.optimizer.state_dict())
        kept = dict(self.kept)
        self.backward()
        self.step()
        for param in self.params:
            param.data.copy_(kept[param][0])
        self.optimizer.load_state_dict(saved)
        self.kept = kept

    def cast(self) -> None:
        dtype, along = self.draw(self.dtypes), self.draw([True, False])
        for param in self.some():
            value, state = self.kept[param]
            param.grad = None
            self._place(param, param.data.to(dtype))
            entry = self.optimizer.state.get(param, {})
            if not along:
                self.optimizer.state.pop(param, None)
                state = {}
            for key in entry.keys() - {*SCALARS} if along else ():
                entry[key], state = entry[key].to(dtype), {**state, key: state[key].to(dtype)}
            self.kept[param] = value.to(dtype), state

    def move(self) -> None:
        for param in self.some():
            self._place(param, param.data)

    def move_states(self) -> None:
        for param in self.some():
            entry = self.optimizer.state.get(param, {})
            for key in entry.keys() - {*SCALARS}:
                given = self.data.draw(strided(entry[key].cpu(), holes=True))
                entry[key].fill_(torch.nan)
                entry[key] = given.to(self.device)

    def exchange(self) -> None:
        """Two parameters of one shape and dtype, if there are such, exchange their memory."""
        a = self.draw(self.params)
        alike = [p for p in self.params if (p.shape, p.dtype) == (a.shape, a.dtype)]
        b = self.draw([p for p in alike if p is not a] or alike)
        a.data, b.data = b.data, a.data
        self.homes[a], self.homes[b] = self.homes[b], self.homes[a]
        (value_a, state_a), (value_b, state_b) = self.kept[a], self.kept[b]
        self.kept[a], self.kept[b] = (value_b, state_a), (value_a, state_b)


OPERATIONS: list[Callable[[Loop], None]] = [
    Loop.again,
    Loop.zero_grad,
    Loop.freeze_or_thaw,
    Loop.add_group,
    Loop.change_option,
    Loop.go_on_from_a_checkpoint,
    Loop.go_back_to_a_checkpoint,
    Loop.cast,
    Loop.move,
    Loop.move_states,
    Loop.exchange,
]
