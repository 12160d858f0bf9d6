"""Fake quantization alone: every way to compute it against copies of memory, and the first use in a new process.

python -m benchmarks.kernels    # the seconds of one process's first use, as JSON

Forward and backward read the input twice and the gradient once, and write two tensors: 2.5 copies of the input are the
floor. The reference is three copies into memory that is there already.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import qsam
from benchmarks.formulas import compiled, lsq
from benchmarks.measure import Json, Variant, compared, in_new_process, interleaved, short
from qsam.functional import fake_quantize, integer_limits, lsq_grad_scale

Fake = Callable[[Tensor, Tensor], Tensor]

WEIGHT = (3072, 768)
ACTIVATION = (32, 64, 384)
QUICK = (260, 256)


def measure(quick: bool = False) -> Json:
    """Measure everything; ``quick`` is a smoke run on a small tensor."""
    rounds = 3 if quick else 60
    sizes: Sequence[tuple[str, tuple[int, ...], torch.dtype, int]] = [
        ("weight", QUICK if quick else WEIGHT, torch.float32, 4)
    ]
    if not quick:
        sizes = [*sizes, ("activation", ACTIVATION, torch.float32, 8), ("activation", ACTIVATION, torch.bfloat16, 8)]
    return {
        "settings": {"rounds": rounds, "reference": "three copies"},
        "fake_quantize": [fake_quantization(*size, rounds) for size in sizes],
        "first_use_seconds": first_uses(),
    }


def fake_quantization(what: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int, rounds: int) -> Json:
    """Time forward and backward of every way to fake-quantize one tensor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    times = interleaved([*_copies(x.detach()), *_passes(x, grad, bits)], rounds, warmup=3)
    qsam.set_backend("auto")
    name = f"{what} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    return {"case": name, "bits": bits, "variants": compared(times, "three copies")}


def _copies(x: Tensor) -> Iterator[Variant]:
    out = torch.empty_like(x)

    def copy() -> None:
        for _ in range(3):
            out.copy_(x)

    def clone() -> None:
        for _ in range(3):
            x.clone()

    yield Variant("three copies", copy)
    yield Variant("three copies into new memory", clone)


def _passes(x: Tensor, grad: Tensor, bits: int) -> Iterator[Variant]:
    """Yield each way's forward and backward, from the same input, scale and gradient."""
    limits = integer_limits(bits, True)
    gs = lsq_grad_scale(x.numel(), limits[1])
    s = torch.full((1,), 2 * float(x.detach().abs().mean()) / limits[1] ** 0.5, requires_grad=True)
    fused, zero = compiled(lsq), torch.zeros(1)
    ours = functools.partial(_called, fake_quantize, limits, gs)
    ways: dict[str, Fake] = {
        "torch's learnable op": lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(x, s, zero, *limits, gs),
        "formula in the graph, eager": functools.partial(_called, lsq, limits, gs),
        "formula in the graph, torch.compile": functools.partial(_called, fused, limits, gs),
    }

    def both(way: Fake) -> Callable[[], object]:
        return lambda: torch.autograd.grad(way(x, s), (x, s), grad)

    for backend in ("compiled", "eager"):
        yield Variant(f"qsam, {backend}", both(ours), functools.partial(qsam.set_backend, backend))
    for name, way in ways.items():
        yield Variant(name, both(way))


def _called(way: Callable[..., Tensor], limits: tuple[int, int], gs: float, x: Tensor, s: Tensor) -> Tensor:
    return way(x, s, *limits, gs)


def first_uses() -> Json:
    """Return the seconds of the first use in a process that compiles the kernels, and in one that finds them."""
    with tempfile.TemporaryDirectory(prefix="qsam-bench-cache-") as cache:
        return {
            state: in_new_process("benchmarks.kernels", XDG_CACHE_HOME=cache)["seconds"] for state in ("cold", "warm")
        }


def first_use() -> float:
    """Return the seconds of a forward and a backward, after torch's own first ones."""
    x = torch.ones(2**10, requires_grad=True)
    torch.autograd.backward(x * x, torch.ones(2**10))
    qsam.set_backend("compiled")
    start = time.perf_counter()
    torch.autograd.backward(fake_quantize(x, torch.ones(1, requires_grad=True), -8, 7).sum())
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps({"seconds": short(first_use())}))
