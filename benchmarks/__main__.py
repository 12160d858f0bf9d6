"""Measure speed and memory, keep the JSON files, and write docs/speed.md's tables from them.

python -m benchmarks                  # all: kernels, step, ablation, memory
python -m benchmarks step memory      # these
python -m benchmarks --tables         # none: only the tables, from the kept files
python -m benchmarks --quick          # a smoke run on tiny sizes, which writes nothing into the repository
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import ablation, kernels, memory, step
from benchmarks.measure import RESULTS, Json, machine, threads, write_json
from benchmarks.page import NAMES, PAGE, blocks, read_results, rewritten

BENCHMARKS: Mapping[str, Callable[[bool], Json]] = {
    "kernels": kernels.measure,
    "step": step.measure,
    "ablation": ablation.measure,
    "memory": memory.measure,
}
BUSY = 0.5
"""A load average above which a machine is not quiet."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing into the repository")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"there is no benchmark {', '.join(unknown)}: choose from {', '.join(NAMES)}.")
    if options.quick and options.tables:
        parser.error("--quick keeps nothing to make tables from: give one of --quick and --tables.")
    names = () if options.tables else tuple(options.names) or NAMES
    with threads(options.threads):
        _run(names, options.quick)


def _run(names: Sequence[str], quick: bool) -> None:
    if quick:
        with tempfile.TemporaryDirectory(prefix="qsam-bench-quick-") as folder:
            run(names, Path(folder), quick=True)
            results = read_results(Path(folder))
            print("\n\n".join("\n".join([f"## {name}", *lines]) for name, lines in blocks(results).items()))
        return
    run(names, RESULTS, quick=False)
    write_page()


def run(names: Sequence[str], folder: Path, quick: bool) -> None:
    """Run benchmarks, and keep each one's JSON as soon as it is there."""
    if not names:
        return
    facts = machine(quick)  # once: the files that are written below are changes of the checkout
    if facts["load_before"][0] > BUSY and not quick:
        print(f"The machine is not quiet (load {facts['load_before'][0]}): times will be worse.", file=sys.stderr)
    for name in names:
        start = time.perf_counter()
        result = BENCHMARKS[name](quick)
        seconds = round(time.perf_counter() - start, 1)
        write_json(folder, name, {"name": name, "quick": quick, "seconds": seconds, "machine": facts, **result})
        print(f"{name}: {seconds:.0f} s", file=sys.stderr)


def write_page() -> None:
    """Write the tables from what is kept."""
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), read_results()), encoding="utf-8")


if __name__ == "__main__":
    main()
