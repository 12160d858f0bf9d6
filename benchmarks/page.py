"""The tables of docs/speed.md, each between two marks, written from the kept JSON files and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.measure import RESULTS, ROOT, Json, read_json
from benchmarks.targets import Results, ahead, targets

PAGE = ROOT / "docs" / "speed.md"
NAMES = ("kernels", "step", "ablation", "memory")
NOT_YET = "Not measured yet."


def read_results(folder: Path = RESULTS) -> Results:
    """Return the JSON of each benchmark that has been kept."""
    found = {name: read_json(folder, name) for name in (*NAMES, "versions")}
    return {name: result for name, result in found.items() if result is not None}


def marks(name: str) -> tuple[str, str]:
    """Return what stands before and after a block."""
    return f"<!-- {name}: begin (python -m benchmarks) -->", f"<!-- {name}: end -->"


def rewritten(text: str, results: Results) -> str:
    """Return the page with every block written again."""
    for name, lines in blocks(results).items():
        begin, end = marks(name)
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = "\n".join([before + begin, *lines, end + after])
    return text


def blocks(results: Results) -> dict[str, list[str]]:
    """Return the lines of each block; a sentence where its benchmark has not run."""
    made: Mapping[str, Callable[[Json], Iterator[str]]] = {
        "kernels": kernel_tables,
        "step": step_table,
        "ablation": ablation_table,
        "memory": memory_table,
        "versions": versions_table,
    }
    found = {name: list(make(results[name])) if name in results else [NOT_YET] for name, make in made.items()}
    anything = bool(results)
    found["machine"] = list(machine_lines(results)) if anything else [NOT_YET]
    found["targets"] = list(target_table(results)) if anything else [NOT_YET]
    return found


def table(head: tuple[str, ...], *rows: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a table."""
    for cells in (head, ("---",) * len(head), *rows):
        yield "| " + " | ".join(cells) + " |"


def between(figures: Json, digits: int = 2) -> str:
    """Return "1.07 (1.05-1.09)": the median and the quartiles."""
    low, high = figures["quartiles"]
    return f"{figures['median']:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def machine_lines(results: Results) -> Iterator[str]:
    """Yield what was measured where, with what: one line for each benchmark that differs."""
    told: dict[str, list[str]] = {}
    for name, result in results.items():
        told.setdefault(_machine(result["machine"]), []).append(name)
    for facts, names in told.items():
        yield f"- {', '.join(names)}: {facts}"


def _machine(facts: Json) -> str:
    packages = ", ".join(f"{name} {number or 'not installed'}" for name, number in facts["packages"].items())
    load = facts["load_before"][0]
    return (
        f"{facts['date']}, commit {facts['commit']}; {facts['processor']}, {facts['cores']} cores, {facts['threads']} "
        f"threads, {' '.join(facts['vector_flags'])}; load before {load:.2f}; a copy moves "
        f"{facts['copy_gigabytes_per_second']:.1f} GB/s; Python {facts['python']}; {packages}."
    )


def target_table(results: Results) -> Iterator[str]:
    """Yield the table of promises, and where another way is ahead."""
    found = targets(results)
    rows = [(t.what, f"{t.limit:g}{t.unit}", f"{t.value:.3f}{t.unit}", "met" if t.met else "**missed**") for t in found]
    yield from table(("target", "at most", "measured", ""), *rows)
    yield ""
    yield f"{sum(t.met for t in found)} of {len(found)} met. Where another way is ahead:"
    yield ""
    yield from [f"- {sentence}" for sentence in ahead(results)] or ["- No other way is ahead in any measured case."]


def kernel_tables(result: Json) -> Iterator[str]:
    """Yield the table of fake quantization, and the seconds of a first use."""
    cases = result["fake_quantize"]
    ways = cases[0]["variants"]
    rows = [(way, *(between(case["variants"][way]["ratio"]) for case in cases)) for way in ways]
    yield from table(
        ("forward and backward, against three copies", *(f"{c['case']}, {c['bits']} bits" for c in cases)), *rows
    )
    yield ""
    cold, warm = (result["first_use_seconds"][state] for state in ("cold", "warm"))
    yield f"First use in a process: {cold:.2f} s if it compiles the kernels, {warm:.3f} s if it finds them on the disk."


def ablation_table(result: Json) -> Iterator[str]:
    """Yield the table of steps with one trick left out."""
    rows = [(name, between(figures["ratio"])) for name, figures in result["variants"].items()]
    yield from table(("", f"{result['case']} tokens, {result['rounds']} rounds"), *rows)


def step_table(result: Json) -> Iterator[str]:
    """Yield the table of training steps."""
    cases = result["cases"]
    rows = [
        (
            f"{name} (peer)" if facts["peer"] else name,
            f"{facts['passes']:g}",
            *(_step_cell(case["variants"][name]) for case in cases),
        )
        for name, facts in result["methods"].items()
    ]
    heads = [f"{case['case']} tokens, {case['rounds']} rounds" for case in cases]
    yield from table(("method", "passes", *heads), *rows)


def _step_cell(figures: Json) -> str:
    return f"missing: {figures['missing']}" if "missing" in figures else between(figures["ratio"])


def versions_table(result: Json) -> Iterator[str]:
    """Yield the table of this version against an older one."""
    cases = result["cases"]
    rows = [
        (name, *(cell for case in cases for cell in map(between, case["methods"][name].values())))
        for name in cases[0]["methods"]
    ]
    older = result["older"]
    heads = [f"{case['case']} tokens, {case['rounds']} rounds: {what}" for case in cases
             for what in (f"time / time of {older}", "difference, in steps of fp32")]  # fmt: skip
    yield from table(("method", *heads), *rows)


def memory_table(result: Json) -> Iterator[str]:
    """Yield the budget and the table of memory."""
    budget = result["budget"]
    yield (
        f"Budget at {result['settings']['case']} tokens: {_mib(budget['fp32'])} (fp32) + {_mib(budget['weights'])} "
        f"(one copy of the quantized weights) + {_mib(budget['inputs'])} (one tensor a quantized input) = "
        f"{_mib(budget['budget'])} MiB."
    )
    yield ""
    rows = [(name, *_memory_cells(figures)) for name, figures in result["variants"].items()]
    yield from table(("method", "held between steps, MiB", "peak, MiB", "peak / fp32", "peak / budget"), *rows)


def _memory_cells(figures: Json) -> tuple[str, ...]:
    if "missing" in figures:
        return (f"missing: {figures['missing']}", "", "", "")
    sizes = (_mib(figures["standing"]), _mib(figures["peak"]))
    return (*sizes, f"{figures['of_fp32']:.3f}", f"{figures['of_budget']:.3f}")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
