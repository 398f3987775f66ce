"""What the Triton path has planned."""

from __future__ import annotations

from typing import Any

from agc_triton.triton_path.buckets import BucketPlan, TensorUnits, TileShape
from agc_triton.triton_path.launches import Launch
from agc_triton.triton_path.plan import TritonPlan
from agc_triton.units import UnitLayout


def plan_of(optimizer: Any) -> TritonPlan:
    """The plan that an optimizer has made."""
    plan = optimizer._paths.triton.plan
    assert isinstance(plan, TritonPlan)
    return plan


def bucket_plans(optimizer: Any) -> list[BucketPlan]:
    """What the planner decided, per dtype and set of flags."""
    return [part.launches.plan for part in plan_of(optimizer).parts]


def bound_args(launch: Launch) -> dict[str, Any]:
    """The arguments that a launch keeps from step to step, by name."""
    names = launch.kernel.arg_names
    return dict(zip(names[len(names) - len(launch.bound) :], launch.bound, strict=True))


def tile_shapes(optimizer: Any) -> set[TileShape]:
    """The tile shapes that a step launches."""
    return {bucket.shape for plan in bucket_plans(optimizer) for bucket in plan.buckets}


def units_of(length: int, aligned: bool = True, outer: int = 1) -> TensorUnits:
    """Two units of this length in ``outer`` runs each, to be planned."""
    return TensorUnits(UnitLayout(1, outer, 2, length // outer), aligned, 0)
