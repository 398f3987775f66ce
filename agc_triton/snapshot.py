"""The one way to ask whether a plan still fits what it was made for, before every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, UntypedStorage

# What torch.compile asks before it runs compiled code: one call for all tensors, in a fifth of the
# time of asking each for its shape, strides and dtype. Private, so it may be missing.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards: Any = getattr(_guards, "TensorGuards", None)


def bug(what: str) -> AssertionError:
    """An error that is this package's own."""
    return AssertionError(
        f"a bug of agc_triton: {what}; please report it where you have the package from, with what"
        " optimizer.explain() and `python -m torch.utils.collect_env` show; backend='torch' may go"
        " on without"
    )


class Layouts:
    """The shapes, strides, dtypes and devices of tensors; it keeps none of them alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.kinds = [(t.dtype, t.device) for t in tensors]
        self.shapes = [t.shape for t in tensors]
        strided = all(t.layout is torch.strided for t in tensors)
        self.strides = [t.stride() for t in tensors] if strided else None
        self._guards: Any = None

    def fit(self, tensors: Sequence[Any]) -> bool:
        """Whether each of these has its shape, strides, dtype and device, and no lazy bits.

        None and sparse tensors never do, nor do more or fewer than there were.
        """
        if len(tensors) != len(self.kinds):  # the guards would raise
            return False
        if self._guards is not None and self._guards.check(*tensors):
            return True
        try:
            same = (
                list(map(Tensor.stride, tensors)) == self.strides
                and list(map(Tensor.size, tensors)) == self.shapes
                and [(t.dtype, t.device) for t in tensors] == self.kinds
                and not any(t.is_conj() or t.is_neg() for t in tensors)
            )
        except (TypeError, RuntimeError):
            return False
        if same:
            self._guards = self._watch(tensors)
        return same

    def _watch(self, tensors: Sequence[Tensor]) -> Any:
        """Guards that pass on tensors of the same types, keys and layouts as these."""
        if TensorGuards is None:
            return None
        sizes = [list(shape) for shape in self.shapes]
        strides = [list(stride) for stride in self.strides or ()]
        try:
            return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        except (TypeError, RuntimeError):  # another torch may make them otherwise
            return None


class Look(NamedTuple):
    """What a plan was made for, or what there is now.

    ``key`` holds the options and the identities of containers that shape the plan; ``fixed`` are
    the tensors whose addresses and layouts it holds, ``loose`` those of which it knows the layouts
    alone, and ``scalars`` those of which the addresses alone, as one element has no other layout.
    """

    key: Any
    fixed: list[Tensor]
    loose: list[Tensor]
    scalars: list[Tensor]


class Snapshot:
    """Where tensors lay, and how, when a plan was made; it keeps no tensor alive.

    With ``views`` the plan keeps views of the fixed tensors. Their memory is held then, as
    ``resize_(0)`` may free it under them.
    """

    def __init__(self, seen: Look, views: bool) -> None:
        self._key = seen.key
        self._layouts = Layouts(seen.fixed + seen.loose)
        self._addresses = list(map(Tensor.data_ptr, seen.fixed + seen.scalars))
        self._memory = list(map(Tensor.untyped_storage, seen.fixed)) if views else []
        self._starts = list(map(UntypedStorage.data_ptr, self._memory))

    def holds(self, now: Look) -> bool:
        """Whether everything is as it was."""
        return (
            now.key == self._key
            and list(map(Tensor.data_ptr, now.fixed + now.scalars)) == self._addresses
            and list(map(UntypedStorage.data_ptr, self._memory)) == self._starts
            and self._layouts.fit(now.fixed + now.loose if now.loose else now.fixed)
        )


P = TypeVar("P")


class Cached(Generic[P]):
    """A plan that is kept until something that it was made for has changed."""

    def __init__(self, *, views: bool = False) -> None:
        self.plan: P | None = None
        self._views = views
        self._seen: Snapshot | None = None

    def get(
        self,
        look: Callable[[Any], Look | None],
        make: Callable[[], P],
        write: Callable[[Any], bool] = lambda plan: True,
    ) -> P:
        """The plan; a new one if there is none or it does not fit.

        ``look`` gives what there is now for a plan, or None where that is plainly something else;
        ``write`` brings one that fits up to date, or asks for another with False. ``make`` checks,
        creates what is missing and plans, or gives None where nothing is to be planned. It may
        raise, and then has changed nothing.
        """
        if self.plan is not None and self._seen is not None:
            now = look(self.plan)
            if now is not None and self._seen.holds(now) and write(self.plan):
                return self.plan
        self.drop()
        # Memory that is made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            plan = make()
        if plan is None:
            return plan
        seen = look(plan)
        if seen is None:
            raise bug("a new plan does not fit what it was made from")
        self.plan, self._seen = plan, Snapshot(seen, self._views)
        return plan

    def drop(self) -> None:
        """Let go of the plan, which may hold the last of the memory."""
        self.plan = self._seen = None
