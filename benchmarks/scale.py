"""What the optimizer's update costs beyond the base's, up to 300 million weights; and what grows in 10,000 steps.

python -m benchmarks.scale 1000 10000    # what is alive after so many steps, as JSON

There is no forward: gradients are set by hand. The extra work is the pull-back and the write.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import qsam
from benchmarks.measure import Json, Variant, compared, in_new_process, interleaved, short, spread

LAYERS = 4
SIZES = (1_000, 100_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000)
COPIES_HELD = 12
"""fp32 copies of the weights: two models, two moments each, latents, gradients, and room to find the first scales."""
RATE: dict[str, Any] = {"lr": 1e-5, "fused": True}


def measure(quick: bool = False) -> Json:
    """Measure both."""
    sizes, rounds, looks = ((1_000, 300_000), 3, (5, 10)) if quick else (SIZES, 15, (1_000, 10_000))
    return {
        "settings": {"layers": LAYERS, "bits": 4, "base": "AdamW(fused=True)", "reference": "base", "rounds": rounds},
        "updates": [update(size, rounds) for size in sizes if fits(size)],
        "too_large": [size for size in sizes if not fits(size)],
        "growth": in_new_process("benchmarks.scale", *map(str, looks)),
    }


# --- the cost of an update --------------------------------------------------------------------------------------------


def fits(weights: int) -> bool:
    """Whether there is memory for both models with their optimizers, and for what starts them."""
    return COPIES_HELD * 4 * weights < available_bytes()


def available_bytes() -> int:
    """Return the memory that a process can have, that of file caches included, where the system says so."""
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def update(weights: int, rounds: int) -> Json:
    """Time an update of the base on float weights, and of QAT round the same base on as many quantized ones."""
    gc.collect()
    side = round(math.sqrt(weights / LAYERS))
    base, ours = _model(side), _model(side)
    qsam.quantize_(ours, bits=4, activations=None, rules=[("*", {})])
    plain, optimizer = AdamW(base.parameters(), **RATE), qsam.QAT(ours, AdamW, **RATE)
    grads = [torch.randn(side, side) * 1e-3 for _ in range(LAYERS)]
    times = interleaved(
        [
            Variant("base", plain.step, _sets(base, grads)),
            Variant("QAT", optimizer.step, _sets(ours, grads)),
        ],
        rounds,
    )
    count = LAYERS * side**2
    extra = [1e9 * (t - b) / count for t, b in zip(times["QAT"], times["base"], strict=True)]
    copy = _copy_nanoseconds(side, rounds)
    return {
        "weights": count,
        "variants": compared(times, "base"),
        "extra_nanoseconds_a_weight": spread(extra),
        "extra_microseconds_a_tensor": short(statistics.median(extra) * side**2 / 1e3),
        "extra_copies": short(statistics.median(extra) / copy),
    }


def _model(side: int) -> nn.Module:
    layers = [nn.Linear(side, side, bias=False, device="meta").to_empty(device="cpu") for _ in range(LAYERS)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(*layers)


def _sets(model: nn.Module, grads: Sequence[Tensor]) -> Callable[[], None]:
    """Return what sets the gradients: the base keeps its own, and the pull-back of QAT works inside of them."""

    def set_them() -> None:
        for p, grad in zip((p for p in model.parameters() if p.dim() == 2), grads, strict=True):
            p.grad = grad

    return set_them


def _copy_nanoseconds(side: int, rounds: int) -> float:
    """Return the nanoseconds that a copy takes per weight, of one layer's size."""
    source, out = torch.ones(side, side), torch.empty(side, side)
    times = interleaved([Variant("copy", lambda: out.copy_(source))], rounds)["copy"]
    return 1e9 * statistics.median(times) / source.numel()


# --- what grows -------------------------------------------------------------------------------------------------------


def growth(looks: Sequence[int]) -> Json:
    """Train a tiny W4A8 model with SQuAT, and count what is alive after so many steps of a process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    qsam.quantize_(model, bits=4, activation_bits=8)
    optimizer = qsam.SQuAT(model, AdamW, lr=1e-3)
    x, y = torch.randn(64, 16), torch.randn(64, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(x) - y).square().mean()
        torch.autograd.backward(loss)
        return loss

    found = []
    for step in range(1, max(looks) + 1):
        optimizer.step(closure)
        if step in looks:
            found.append({"steps": step, "live_tensors": live_tensors(), "resident_bytes": resident_bytes()})
    return {"method": "SQuAT, same_batch", "looks": found}


def live_tensors() -> int:
    """Return how many tensors Python knows."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def resident_bytes() -> int | None:
    """Return the process's resident memory; None where there is no /proc."""
    path = Path("/proc/self/status")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return None


if __name__ == "__main__":
    print(json.dumps(growth([int(look) for look in sys.argv[1:]])))
