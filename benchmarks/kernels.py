"""Fake quantization, and what the optimizer does to a weight, against copies of the same tensor.

Forward and backward of fake quantization read the input twice and the gradient once, and write two tensors: 2.5 copies
of the input are the floor. The reference is three copies into memory that is there already. Of the optimizer's
operations each one's bytes are counted, and its bandwidth is compared with a copy's in the same round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD

import qsam
from benchmarks.compile_time import compile_times
from benchmarks.formulas import compiled, lsq
from benchmarks.measure import Json, Variant, compared, interleaved, ratios, spread
from qsam.latent import Target
from qsam.quantizers.lsq import LSQ

Fake = Callable[[Tensor, Tensor], Tensor]

WEIGHT = (3072, 768)
ACTIVATION = (32, 64, 384)
QUICK = (260, 256)
BYTES = {"write": 8, "pull back": 20, "scale gradient": 12, "perturb": 16, "norm": 4}
"""Per fp32 weight. write: w, p. pull back: w, grad, p, and writes grad and p. scale gradient: w, grad, p. perturb: w,
p, d, and writes p. norm: d."""
PRODUCTS = ((512, 384, 1536), (512, 1536, 384), (2048, 384, 1536), (2048, 1536, 384))
"""Tokens, features and outputs of Linear layers."""


def measure(quick: bool = False) -> Json:
    """Measure everything; ``quick`` is a smoke run on a small tensor."""
    rounds = 3 if quick else 60
    sizes: Sequence[tuple[str, tuple[int, ...], torch.dtype, int]] = [
        ("weight", QUICK if quick else WEIGHT, torch.float32, 4)
    ]
    if not quick:
        sizes = [*sizes, ("activation", ACTIVATION, torch.float32, 8), ("activation", ACTIVATION, torch.bfloat16, 8)]
    return {
        "settings": {"rounds": rounds, "reference": "three copies", "bytes_per_weight": BYTES},
        "fake_quantize": [fake_quantization(*size, rounds) for size in sizes],
        "verbs": verbs(QUICK if quick else WEIGHT, rounds),
        "products": [product(*shape, rounds) for shape in (((130, 32, 48),) if quick else PRODUCTS)],
        "compile_seconds": None if quick else compile_times(),
    }


# --- fake quantization ------------------------------------------------------------------------------------------------


def fake_quantization(what: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int, rounds: int) -> Json:
    """Time forward and backward of every way to fake-quantize one tensor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    quantizer = LSQ(bits=bits)
    quantizer.observe_(x.detach())
    variants = [*_copies(x.detach()), *_passes(x, grad, quantizer)]
    times = interleaved(variants, rounds, warmup=3)
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


def _passes(x: Tensor, grad: Tensor, quantizer: LSQ) -> Iterator[Variant]:
    """Yield each way's forward and backward, from the same input, scale and gradient."""
    s = quantizer.scale.detach().clone().requires_grad_()
    low, high, gs = quantizer.quant_min, quantizer.quant_max, float(x.numel() * quantizer.quant_max) ** -0.5
    zero = torch.zeros(1)
    fused = compiled(lsq)
    ways: dict[str, Fake] = {
        "torch's learnable op": lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(
            x, s, zero, low, high, gs
        ),
        "formula in the graph, eager": lambda x, s: lsq(x, s, low, high, gs),
        "formula in the graph, torch.compile": lambda x, s: fused(x, s, low, high, gs),
    }

    def both(way: Fake, leaf: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(way(x, leaf), (x, leaf), grad)

    for backend in ("compiled", "eager"):
        run = both(lambda x, _: quantizer(x), quantizer.scale)
        yield Variant(f"qsam, {backend}", run, lambda backend=backend: qsam.set_backend(backend))  # type: ignore[misc]
    for name, way in ways.items():
        yield Variant(name, both(way, s))


def product(tokens: int, features: int, outputs: int, rounds: int) -> Json:
    """Time ``X W^T`` of codes, 8 bits by 4: in fp32, as integers, and in bf16, which holds them exactly.

    A backward multiplies codes by a gradient, which takes three terms in bf16, and so a sum three times as long.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (tokens, features), generator=generator).to(torch.int8)
    w = torch.randint(-8, 8, (outputs, features), generator=generator).to(torch.int8)
    ways: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
        "fp32": (torch.mm, x.float(), w.float()),
        "int8": (torch._int_mm, x, w),
        "bf16": (torch.mm, x.bfloat16(), w.bfloat16()),
        "bf16, three terms": (torch.mm, x.bfloat16().repeat(1, 3), w.bfloat16().repeat(1, 3)),
    }
    variants = [Variant(name, functools.partial(mm, a, b.t())) for name, (mm, a, b) in ways.items()]
    times = interleaved(variants, rounds, warmup=3)
    return {"case": f"{tokens}x{features} by {features}x{outputs}", "variants": compared(times, "fp32")}


# --- the optimizer's operations on one weight -------------------------------------------------------------------------


def verbs(shape: tuple[int, ...], rounds: int) -> Json:
    """Time each operation on one weight, fused and eager, with the bandwidth it reaches as a share of a copy's."""
    model = nn.Linear(shape[1], shape[0], bias=False)
    qsam.quantize_(model, bits=4, activations=None)
    optimizer = qsam.QAT(model, SGD, lr=0.0)
    source, out = torch.ones(shape), torch.empty(shape)
    found = {}
    for backend in ("compiled", "eager"):
        qsam.set_backend(backend)
        variants = [Variant("copy", lambda: out.copy_(source)), *_verbs(optimizer, torch.randn(shape) * 1e-3)]
        found[backend] = _against_copy(interleaved(variants, rounds, warmup=3))
    qsam.set_backend("auto")
    return {"case": f"weight {'x'.join(map(str, shape))} float32", "bits": 4, **found}


def _verbs(optimizer: qsam.QAT, grad: Tensor) -> Iterator[Variant]:
    latents = optimizer._latents
    slots = latents.slots
    target = Target(slots[0], slots[0].parameter, grad, torch.tensor(1e-6))

    def on_grid() -> None:
        latents.write()
        slots[0].parameter.grad = grad

    yield Variant("write", latents.write)
    yield Variant("pull back", lambda: _no_grad(lambda: list(latents.pull_back_(slots))), on_grid)
    yield Variant("scale gradient", lambda: _no_grad(lambda: list(latents.scale_gradients(slots))), on_grid)
    yield Variant("perturb", lambda: latents.perturb_([target]), on_grid)
    yield Variant("norm", lambda: torch.linalg.vector_norm(grad))


@torch.no_grad()
def _no_grad(run: Callable[[], object]) -> None:
    run()


def _against_copy(times: dict[str, list[float]]) -> Json:
    """Return milliseconds, and (bytes / time) of each operation as a share of a copy's, which moves 8 a weight."""
    copy = times.pop("copy")
    return {
        name: {
            "milliseconds": spread(1e3 * t for t in found),
            "share_of_copy_bandwidth": ratios([BYTES[name] / 8 * c for c in copy], found),
        }
        for name, found in times.items()
    }
