"""How long the first call of each fused kernel takes, in a new process: without torch's cache of kernels, and with it.

python -m benchmarks.compile_time    # one process's times, as JSON, with whatever cache torch has
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.measure import Json, in_new_process, short
from qsam import kernels
from qsam.quantizers.lsq import LSQ

SHAPE = (384, 384)


def compile_times(names: Sequence[str] = ()) -> Json:
    """Return seconds by kernel of a cold process and of a warm one, which finds the first one's kernels on the disk.

    Args:
        names: Of kernels; all by default.
    """
    with tempfile.TemporaryDirectory(prefix="qsam-bench-inductor-") as cache:
        return {state: _first_calls_elsewhere(names, cache) for state in ("cold", "warm")}


def _first_calls_elsewhere(names: Sequence[str], cache: str) -> Json:
    seconds = in_new_process("benchmarks.compile_time", *names, TORCHINDUCTOR_CACHE_DIR=cache)
    return {"seconds": {name: short(s) for name, s in seconds.items()}, "total": short(sum(seconds.values()))}


def first_calls(names: Sequence[str] = ()) -> dict[str, float]:
    """Return the seconds of each kernel's first call; the first of all includes the import of the compiler."""
    kernels.set_backend("compiled")
    found = {}
    for name, call in _calls():
        if not names or name in names:
            start = time.perf_counter()
            call()
            found[name] = time.perf_counter() - start
    return found


def _calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield one call of each kernel that training with W4A8 uses, in the order of a step."""
    w, p, grad = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    x = torch.randn(SHAPE, requires_grad=True)
    quantizer = LSQ(bits=4)
    quantizer.observe_(w)
    grid = quantizer.grid(w)
    assert grid is not None
    outputs: list[torch.Tensor] = []
    yield "write", lambda: kernels.write_(w, grid, p)
    yield "forward", lambda: outputs.append(quantizer(x))
    yield "backward", lambda: torch.autograd.backward(outputs[0], grad)
    yield "compare", lambda: kernels.holds(w, grid, p)
    yield "scale gradient", lambda: kernels.scale_gradient(w, grid, grad, p)
    yield "pull back", lambda: kernels.pull_back_(w, grid, grad, p)


if __name__ == "__main__":
    print(json.dumps(first_calls(sys.argv[1:])))
