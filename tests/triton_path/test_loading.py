"""Kernels are compiled and loaded ahead of a step, as on a GPU: by a driver that only looks so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Compiles for sm_90 without a GPU; every start is counted with the arguments that it had.
SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

fired = []

class Utils:
    def load_binary(self, name, kernel, shared, device):
        return "module", "function", 64, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

class Launcher:
    def __init__(self, source, metadata):
        self.name, self.parameters = source.fn.__name__, len(source.fn.arg_names)
    def __call__(self, *args):
        # Before its own come the grid, the stream, the function and what belongs to it.
        fired.append((self.name, len(args) - self.parameters))

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from agc_triton import AdamW_AGC, SGD_AGC, routing
from agc_triton.triton_path import compiling

compiling.Target.of = classmethod(lambda cls, device: cls(hip=False, pdl=True, stream=True))
routing.interpreted = lambda: True  # so that CPU tensors get there
shapes = (4, 768), (9,), (3, 30_000)
for cls, options in ((AdamW_AGC, {}), (SGD_AGC, {"momentum": 0.9, "nonfinite": "skip_unit"})):
    params = [torch.randn(shape, device="cpu") for shape in shapes]
    optimizer = cls(params, lr=0.1, backend="triton", **options)
    for step in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    (part,) = optimizer._paths.triton.plan.parts
    print(*(launch.kernel.__name__ for launch in part.launches.launcher.untracked.steps))
    print(*(name for name, _ in fired))
    print(*{before for _, before in fired})
    fired.clear()
"""


def test_a_step_on_a_gpu_starts_what_was_compiled_for_its_arguments() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for steps, fired, before in (lines[:3], lines[3:]):
        assert fired == " ".join(["begin", steps] * 2)
        assert len(before.split()) == 1  # as many beside its own arguments at each start
