"""A training step of a small BERT with W4A8, by each method and each peer, against the same step in fp32."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from benchmarks import bert
from benchmarks.bert import Size, batch_of, build
from benchmarks.measure import Json, Variant, compared, interleaved
from benchmarks.training import ACTIVATION_BITS, GROUP, WEIGHT_BITS, Method, Missing, methods

REFERENCE = "fp32"
WARMUP = 4
"""Rounds before: the directions of one pass know theirs from the second step on, brevitas's scales from the third."""


def measure(quick: bool = False, names: Iterable[str] = ()) -> Json:
    """Time every method, or the reference and those named, on each batch."""
    size = bert.QUICK if quick else bert.FULL
    wanted = set(names) or set(methods())
    chosen = [method for name, method in methods().items() if name in wanted | {REFERENCE}]
    return {
        "settings": {
            "bert": {k: v for k, v in vars(size).items() if k != "batches"},
            "bits": WEIGHT_BITS,
            "activation_bits": ACTIVATION_BITS,
            "torchao_group_size": GROUP,
            "base": "AdamW(fused=True)",
            "reference": REFERENCE,
        },
        "methods": {m.name: {"period": m.period, "passes": m.passes, "peer": m.peer} for m in chosen},
        "cases": [
            on_batch(size, *batch, chosen, rounds) for batch, rounds in zip(size.batches, _rounds(quick), strict=True)
        ],
    }


def _rounds(quick: bool) -> tuple[int, ...]:
    """Return the rounds of each batch: the smaller one's steps are shorter."""
    return (2,) if quick else (16, 7)


def on_batch(size: Size, sentences: int, tokens: int, chosen: Iterable[Method], rounds: int) -> Json:
    """Time these methods on one batch."""
    batch = batch_of(size, sentences, tokens)
    variants, missing = [], {}
    for method in chosen:
        try:
            run = method.ready(build(size), batch)
        except Missing as error:
            missing[method.name] = {"missing": str(error)}
            continue
        # In training a step follows one of the same model: without it the others' memory would be in all caches.
        variants.append(Variant(method.name, run, prepare=run if method.period == 1 else None, units=method.period))
    gc.collect()
    times = interleaved(variants, rounds, warmup=WARMUP)
    return {"case": f"{sentences}x{tokens}", "rounds": rounds, "variants": {**compared(times, REFERENCE), **missing}}
