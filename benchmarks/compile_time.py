"""How long the first call of each fused kernel takes, in a new process: without torch's cache of kernels, and with it.

python -m benchmarks.compile_time    # one process's times, as JSON, with whatever cache torch has

The import of torch is not counted. That of its compiler is, in a line of its own, in a process that needs it: one that
finds the kernels on the disk does not.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Json, in_new_process, short
from qsam import backend, compiling, kernel_cache, sweeps
from qsam.quantizers.lsq import LSQ

SHAPE = (384, 384)
IMPORT = "import of the compiler"


def compile_times(names: Sequence[str] = ()) -> Json:
    """Return seconds by kernel of a cold process and of a warm one, which finds the first one's kernels on the disk.

    Args:
        names: Of kernels; all by default.
    """
    with tempfile.TemporaryDirectory(prefix="qsam-bench-inductor-") as cache:
        return {state: _first_calls_elsewhere(names, Path(cache)) for state in ("cold", "warm")}


def _first_calls_elsewhere(names: Sequence[str], cache: Path) -> Json:
    """Return the seconds by kernel, their sum, and how many libraries the process had to build."""
    before = len(list(cache.rglob("*.so")))
    seconds = in_new_process("benchmarks.compile_time", *names, TORCHINDUCTOR_CACHE_DIR=str(cache))
    return {
        "seconds": {name: short(s) for name, s in seconds.items()},
        "total": short(sum(seconds.values())),
        "built": len(list(cache.rglob("*.so"))) - before,
    }


def first_calls(names: Sequence[str] = ()) -> dict[str, float]:
    """Return the seconds of each kernel's first call, and before them those of importing the compiler, if it is needed.

    The first call waits for the other kernels of a step too, which are compiled with it. What torch itself imports at
    its first backward pass is not a kernel's, and comes before.
    """
    x = torch.ones(2, requires_grad=True)
    torch.autograd.backward(x * x, torch.ones(2))
    found = {}
    if not any(kernel_cache.directory().glob("*.json")):
        start = time.perf_counter()
        with compiling.without_garbage_collection():
            importlib.import_module("torch._inductor.compile_fx")
        found[IMPORT] = time.perf_counter() - start
    backend.set_backend("compiled")
    for name, call in _calls():
        if not names or name in names:
            start = time.perf_counter()
            call()
            found[name] = time.perf_counter() - start
    return found


def _calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield one call of each kernel that training with W4A8 uses, in the order of a step; a forward is a write."""
    w, p, grad = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    x = torch.randn(SHAPE, requires_grad=True)
    quantizer = LSQ(bits=4)
    quantizer.observe_(w)
    grid = quantizer.grid(w)
    assert grid is not None
    weight = [sweeps.Weight(w, p, grid)]
    yield "write", lambda: sweeps.write_(weight)
    yield "backward", lambda: torch.autograd.backward(quantizer(x), grad)
    yield "perturb", lambda: sweeps.perturb_(weight, [grad], [torch.tensor(1e-6)])
    yield "scale gradient", lambda: sweeps.scale_gradients(weight, [grad])
    yield "pull back", lambda: sweeps.pull_back_(weight, [grad])


if __name__ == "__main__":
    print(json.dumps(first_calls(sys.argv[1:])))
