"""Shared parts of the benchmarks of cost: facts about the machine, interleaved timing, ratios, and the JSON files.

A ratio is taken between two times of the same round, in one process, because a disturbance of the machine then affects
both. The median of these ratios is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import qsam

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "transformers", "torchao", "brevitas", "pytorch-optimizer")
VECTOR_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")
COPIED = 2**26
"""fp32 numbers in the copy that measures the memory: 256 MiB, more than any cache."""

Json = dict[str, Any]
Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing to be timed.

    Attributes:
        name: Its key in the JSON.
        run: What is timed.
        prepare: What comes before it in each round, and is not timed.
        units: By what the time is divided: the calls in a period, say.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    units: float = 1.0


def interleaved(
    variants: Sequence[Variant], rounds: int, warmup: int = 2, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Time all variants once per round, in an order that is drawn for each round.

    Args:
        variants: Of distinct names.
        rounds: How many are kept. An integer >= 1.
        warmup: How many come before and are not kept.
        clock: Returns seconds.

    Returns:
        Seconds by name, in the order of the rounds.
    """
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    order, draw = list(variants), random.Random(0)
    for i in range(warmup + rounds):
        draw.shuffle(order)
        for variant in order:
            seconds = _timed(variant, clock)
            if i >= warmup:
                times[variant.name].append(seconds)
    return times


def _timed(variant: Variant, clock: Clock) -> float:
    if variant.prepare is not None:
        variant.prepare()
    start = clock()
    variant.run()
    return (clock() - start) / variant.units


def spread(values: Iterable[float]) -> Json:
    """Return the median and the quartiles, to five digits."""
    found = sorted(values)
    low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": short(statistics.median(found)), "quartiles": [short(low), short(high)]}


def short(value: float) -> float:
    """Return a number to five digits, which is more than any time is good for."""
    return float(f"{value:.5g}")


def ratios(times: Sequence[float], reference: Sequence[float]) -> Json:
    """Return the spread of ``times[i] / reference[i]``: the median of the ratios, not the ratio of the medians."""
    return spread(t / r for t, r in zip(times, reference, strict=True))


def compared(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, Json]:
    """Return for each name its milliseconds, and its ratio to the reference of the same round."""
    base = times[reference]
    return {
        name: {"milliseconds": spread(1e3 * t for t in found), "ratio": ratios(found, base)}
        for name, found in times.items()
    }


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within this context torch computes on so many threads; None: as it stands."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_new_process(module: str, *arguments: str, **environment: str) -> Json:
    """Run ``python -m <module>`` on as many threads as torch has here, and return the JSON of its last line.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    around = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`python -m {' '.join(command[2:])}` failed:\n{done.stderr}")
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def write_json(folder: Path, name: str, result: Json) -> Path:
    """Write ``<folder>/<name>.json``; a reader sees the old file or the new one, never half of one."""
    text = json.dumps(result, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=name, suffix=".part", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # a temporary file is private
    path = folder / f"{name}.json"
    os.replace(file.name, path)
    return path


def read_json(folder: Path, name: str) -> Json | None:
    """Return what was written, or None if nothing was."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found


def machine(quick: bool = False) -> Json:
    """Return what has to be known about the machine and the software to read a time."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_flags": [flag for flag in VECTOR_FLAGS if flag in _cpu_field("flags", "Features").split()],
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "packages": {"qsam": qsam.__version__, **{name: installed(name) for name in PACKAGES}},
        "copy_gigabytes_per_second": copy_bandwidth(COPIED // 64 if quick else COPIED),
    }


def commit() -> str:
    """Return the commit, with "-dirty" where the files differ from it; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def processor() -> str:
    """Return the processor's name, with its family and model where the name says little."""
    name = _cpu_field("model name") or platform.processor() or "unknown"
    family, model = _cpu_field("cpu family"), _cpu_field("model")
    return f"{name} (family {family}, model {model})" if family else name


def _cpu_field(*names: str) -> str:
    """Return the first of these fields in Linux's list of processors; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return ""


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def copy_bandwidth(numbers: int, rounds: int = 15) -> float:
    """Return the GB/s of a copy, what is read and what is written together, of so many fp32 numbers."""
    source = torch.ones(numbers)
    out = torch.empty_like(source)
    times = interleaved([Variant("copy", lambda: out.copy_(source))], rounds)["copy"]
    return short(2 * source.nbytes / statistics.median(times) / 1e9)
