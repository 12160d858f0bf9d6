"""Time this version of qsam against an older one in one process: ``python -m benchmarks.versions 8706e5b``.

The older package is taken from git, renamed to ``qsam_before`` and imported beside this one. Steps of both, and of the
float model, are interleaved as in every benchmark here (:mod:`benchmarks.measure`). A ratio is taken between steps of
the same round; ``slower`` is the difference of the two versions' ratios to fp32, so .03 means three hundredths of a
float step. The result is written to benchmarks/results/versions.json.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.optim import AdamW

import qsam
from benchmarks.bert import FULL, QUICK, Size, batch_of, build
from benchmarks.measure import RESULTS, ROOT, Json, Variant, compared, interleaved, machine, ratios, spread, write_json
from benchmarks.step import REFERENCE, WARMUP
from benchmarks.training import ACTIVATION_BITS, RATE, WEIGHT_BITS, _closure, methods

OLD = "qsam_before"
METHODS: Mapping[str, Mapping[str, Any]] = {
    "QAT": {},
    "SAQ": {},
    "SQuAT": {},
    "SQuAT, fused": {"schedule": "fused"},
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the older version, as git names it")
    parser.add_argument("--rounds", type=int, nargs=2, default=(24, 10), metavar=("SMALL", "LARGE"))
    parser.add_argument("--quick", action="store_true", help="a smoke run on tiny sizes, which writes nothing")
    options = parser.parse_args()
    facts = machine(options.quick)
    with tempfile.TemporaryDirectory(prefix="qsam-versions-") as folder:
        old = older(options.revision, Path(folder))
        size = QUICK if options.quick else FULL
        rounds = options.rounds[: len(size.batches)]
        cases = [on_batch(size, *batch, old, n) for batch, n in zip(size.batches, rounds, strict=True)]
    result = {"name": "versions", "quick": options.quick, "older": options.revision, "machine": facts, "cases": cases}
    for case in cases:
        for name, found in case["methods"].items():
            print(f"{case['case']} {name}: {found}")
    if not options.quick:
        write_json(RESULTS, "versions", result)


def older(revision: str, folder: Path) -> ModuleType:
    """Import the package of a revision under another name."""
    archive = subprocess.run(["git", "archive", revision, "qsam"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    package = (folder / "qsam").rename(folder / OLD)
    for path in package.rglob("*.py"):
        path.write_text(re.sub(r"\bqsam\b", OLD, path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module(OLD)


def on_batch(size: Size, sentences: int, tokens: int, old: ModuleType, rounds: int) -> Json:
    """Time both versions on one batch."""
    batch = batch_of(size, sentences, tokens)

    def step(package: ModuleType, method: str) -> Callable[[], object]:
        model = build(size)
        preset = importlib.import_module(f"{package.__name__}.presets").squat_bert
        package.quantize_(model, bits=WEIGHT_BITS, activation_bits=ACTIVATION_BITS, rules=preset)
        optimizer = getattr(package, method.split(",", maxsplit=1)[0])(model, AdamW, **RATE, **METHODS[method])
        closure = _closure(model, batch, optimizer)
        return lambda: optimizer.step(closure)

    runs = {REFERENCE: methods()[REFERENCE].ready(build(size), batch)}
    for name in METHODS:
        runs |= {f"{name}, older": step(old, name), f"{name}, now": step(qsam, name)}
    times = interleaved([Variant(name, run, prepare=run) for name, run in runs.items()], rounds, warmup=WARMUP)
    floats = times[REFERENCE]
    pairs = {}
    for name in METHODS:
        now, before = times[f"{name}, now"], times[f"{name}, older"]
        slower = [(n - b) / f for n, b, f in zip(now, before, floats, strict=True)]
        pairs[name] = {"now/older": ratios(now, before), "slower": spread(slower)}
    return {"case": f"{sentences}x{tokens}", "rounds": rounds, "variants": compared(times, REFERENCE), "methods": pairs}


if __name__ == "__main__":
    main()
