"""Keep the results of `make glue` and `make vision`, and write the README's tables from what is kept.

python -m benchmarks.demos --runs runs/glue-demo    # copies the finished runs into benchmarks/results/
python -m benchmarks.demos                          # only rewrites the README's tables
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from recipes.compare import ONE_SEED, Json, read_results

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- results: begin (python -m benchmarks.demos) -->"
END = "<!-- results: end -->"
TASKS = {
    "stsb": ("make glue", "glue-demo-stsb"),
    "movies": ("make glue TASK=movies", "glue-demo-movies"),
    "mnist5k-resnet20": ("make vision", "vision-demo"),
}
"""By task: the command that ran it, and the file that its results are kept in."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="the demo's output folder, to be copied from first")
    options = parser.parse_args(arguments)
    if options.runs is not None:
        for task, (_, name) in TASKS.items():
            if found := read_results(options.runs, task):
                (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + BEGIN + "\n" + "\n".join(results_block()) + "\n" + END + after, encoding="utf-8")


def results_block() -> Iterator[str]:
    """Yield the README's lines about all kept results."""
    for command, name in TASKS.values():
        path = KEPT / f"{name}.json"
        if path.is_file():
            yield from task_block(command, json.loads(path.read_text(encoding="utf-8")))


def task_block(command: str, results: Sequence[Json]) -> Iterator[str]:
    """Yield the lines of one task's table, in the order of the methods' passes."""
    first = results[0]
    name = first["metric_name"]
    yield f"`{command}`, {first['config']['evaluated_on']}; **{ONE_SEED}**:"
    yield ""
    yield f"| method | {name}, % | dev loss | train loss | passes | seconds |"
    yield "|---|---|---|---|---|---|"
    for result in sorted(results, key=lambda result: (result["passes"], result["config"]["method"] == "squat")):
        config = result["config"]
        bits = f" W{config['bits']}A{config['activation_bits']}" if "bits" in config else ""
        cells = (
            f"{config['method']}{bits}",
            f"{100 * result['metric']:.2f}",
            f"{result['dev_loss']:.3f}",
            f"{result['train_loss']:.3f}",
            f"{result['passes']}",
            f"{result['seconds']:.0f}",
        )
        yield "| " + " | ".join(cells) + " |"
    yield ""


if __name__ == "__main__":
    main()
