"""Settings for all tests."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from tests.support.interpreter import interpret_without_gpu

interpret_without_gpu()  # before anything that imports agc_triton.kernels

# What a GPU's machine may have to do without (`make test-gpu`), and the tests that need it.
NEEDED = {
    "benchmarks": ("matplotlib", "pandas", "sklearn", "tqdm"),
    "choosing": ("matplotlib", "pandas"),
    "examples": ("pandas", "tqdm"),
    "gpu/test_benchmarks.py": ("matplotlib", "pandas", "tqdm"),
    "meta": ("grimp", "importlinter", "pandas"),
    "meta/test_site.py": ("furo", "myst_parser", "sphinx"),
    "meta/test_typing.py": ("basedpyright", "mypy"),
    "meta/test_workflows.py": ("yaml",),
    "test_explain.py": ("pandas",),
    "triton_path/test_buckets.py": ("pandas",),
}
collect_ignore = [
    path
    for path, modules in NEEDED.items()
    if not all(importlib.util.find_spec(m) for m in modules)
]
# Without it fully_shard does not train on a CPU: torch 2.6.
if not hasattr(torch.cpu.Stream, "record_event") and not torch.cuda.is_available():
    collect_ignore.append("sharded")
try:
    import torch.testing._internal.common_optimizers  # fails in torch 2.6 beside Triton from 3.3 on
except ImportError:
    with_its_database = ("behaviours", "errors", "optimizer_infos", "parity")
    collect_ignore += [f"conformance/test_{name}.py" for name in with_its_database]

# torch's fused kernels wake all threads for tensors of any size, which takes longer than the work.
torch.set_num_threads(1)

# The same examples in each run, so that a failure can be repeated; no deadline, as machines stall.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``place``: wherever steps can run here; ``torch_place``: those on the torch path."""
    from tests.support.places import PLACES, TORCH_PLACES, label

    for name, places in (("place", PLACES), ("torch_place", TORCH_PLACES)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, places, ids=label)


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    """Warnings are given again, and a GPU is not left refusing to be waited for."""
    yield
    from agc_triton import routing

    routing._warned.clear()
    if torch.cuda.is_available() and torch.cuda.get_sync_debug_mode():
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, and nothing kept."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each upload of tables to the device from now on, whether it was captured."""
    from agc_triton.triton_path.tables import Tables

    found: list[bool] = []
    upload = Tables.upload

    def counted(self: Tables, capturing: bool) -> None:
        found.append(capturing)
        upload(self, capturing)

    monkeypatch.setattr(Tables, "upload", counted)
    return found


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty and torch.empty_like holds NaN, or a wild integer."""

    def poison(allocate: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            return tensor.fill_(-1 if not tensor.dtype.to_real().is_floating_point else torch.nan)

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def pytest_collection_finish() -> None:
    """Thousands of tests are not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``either_block`` is for what goes through blocks; these modes do not."""

    def goes_through_blocks(item: Any) -> bool:
        given = item.callspec.params
        options = {given.get("mode"): True, **(given.get("options") or {})}
        return not (options.get("foreach") or options.get("differentiable"))

    def is_alone(item: Any) -> bool:
        return hasattr(item, "callspec") and item.callspec.params.get("either_block") == "alone"

    items[:] = [item for item in items if not is_alone(item) or goes_through_blocks(item)]


@pytest.fixture(params=["packed", "alone"])
def either_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path's two kinds of blocks: small tensors are packed, or each has its own."""
    if request.param == "alone":
        from agc_triton.torch_path import blocks

        monkeypatch.setattr(blocks, "PACKED", 0)


@pytest.fixture
def two_ranks() -> Iterator[Any]:
    """A mesh of two ranks, the first of which is this process; what it sends goes nowhere."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tests.support.places import DEVICE

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh(DEVICE, (2,))
    dist.destroy_process_group()
