"""Does the order of SAQ's three cases come out? ResNet-20 on CIFAR-10's test images, at W2A2 and W4A4.

python -m benchmarks.saq_cases --data CIFAR10.npz            # every run that is not finished yet
python -m benchmarks.saq_cases --data CIFAR10.npz --print    # only the commands
python -m benchmarks.saq_cases --keep                        # copy the results, write docs/saq-cases.md and its picture

Each run is one of `recipes.vision`, on one thread: two of these side by side use two cores. The settings were chosen as
docs/saq-cases.md says, on training images that were held out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from recipes import vision
from recipes.compare import Json, mean_and_error, read_results

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "saq-cases.json"
PAGE = ROOT / "docs" / "saq-cases.md"
PICTURE = ROOT / "docs" / "saq-cases.png"
RUNS = ROOT / "runs" / "saq-cases"

SEEDS = (0, 1, 2)
BITS = (2, 4)
METHODS = {
    "lsq": "LSQ",
    "saq:case=1": "SAQ, case 1",
    "saq:case=2": "SAQ, case 2",
    "saq:case=3": "SAQ, case 3",
    "squat": "SQuAT, fused",
    "saq:direction=random": "random direction",
}
PAIRS = (
    ("saq:case=3", "saq:case=1"),
    ("saq:case=3", "saq:case=2"),
    ("saq:case=1", "saq:case=2"),
    ("saq:case=3", "lsq"),
    ("squat", "lsq"),
    ("saq:case=3", "saq:direction=random"),
    ("squat", "saq:case=3"),
)
RHO = 0.1
SETTINGS = """--model resnet20 --threads 1 --precision bf16 --batch-size 100 --augment crop
--fp32-epochs 20 --fp32-lr 0.1 --weight-decay 5e-4 --warmup-epochs 1
--epochs 3 --lr 0.02 --schedule fused --sharpness 0.05"""

TEXT = f"""# The three cases of SAQ, on CIFAR-10

SAQ's paper (arXiv 2111.12273) describes three ways to combine quantization noise and adversarial perturbation, and
argues that the third is best. In case 1 the perturbation e does not depend on the noise, in case 2 the noise depends
on e, and in case 3 e depends on the noise. This page is a small test of that order. It also has LSQ, SQuAT's fused
schedule and a random direction of the same length.

The network is ResNet-20 with one scale per tensor for weights and inputs, and 8 bits in the first layer and the head.
The images are the 10,000 test images of CIFAR-10, in a fixed random split of 8,000 for training and 2,000 for
measuring, so no number here compares with the usual ones. Each seed has one full-precision checkpoint (20 epochs).
Every method then trains 3 epochs from it, with the same rate (.02, SGD with momentum) and radius (rho {RHO}). On
training images that were held out, after two epochs at W2A2, case 3 had 59.8 % with rho .05 and 58.3 % with .2, and
LSQ had 58.1 %, with a standard error of 1.4 (`benchmarks/results/saq-cases-tuning.json`); the radius lies between
these two. Methods with a perturbation take two passes per step, and LSQ takes one.

"""


def commands(data: str, out: Path, seeds: Sequence[int], bits: Sequence[int]) -> Iterator[list[str]]:
    """Yield the arguments of `recipes.vision`, a seed after the other, each after its full-precision run."""
    common = [*shlex.split(SETTINGS), "--rho", str(RHO), "--data", data, "--output-dir", str(out)]
    for seed in seeds:
        yield [*common, "--seed", str(seed), "--method", "fp32"]
        for width in bits:
            words = ["--bits", str(width), "--activation-bits", str(width), "--method", *METHODS]
            yield [*common, "--seed", str(seed), *words]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the .npz file with `images` and `labels`")
    parser.add_argument("--output-dir", type=Path, default=RUNS)
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS, help="which of them")
    parser.add_argument("--bits", type=int, choices=BITS, nargs="*", default=BITS, help="which of them; none: fp32")
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--keep", action="store_true", help="copy the results and write the page")
    options = parser.parse_args(arguments)
    if options.data is not None:
        for words in commands(options.data, options.output_dir, options.seed, options.bits):
            print("python -m recipes.vision", shlex.join(words), flush=True)
            if not options.print and (code := vision.main(words)):
                return code
    if options.keep:
        keep(options.output_dir)
    return 0


def keep(out: Path) -> None:
    """Copy the finished runs, if there are any, and write the page and the picture from what is kept."""
    tasks = {json.loads(path.read_text(encoding="utf-8"))["task"] for path in out.glob("*/run.json")}
    found = [result for task in sorted(tasks) for result in read_results(out, task)]
    if found:
        KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    PAGE.write_text("\n".join(page(found)) + "\n", encoding="utf-8")
    draw(found, PICTURE)


def page(found: Sequence[Json]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield TEXT
    yield from table(found)
    yield from differences(found)
    yield from verdict(found)
    yield "![Top-1 against sharpness](saq-cases.png)"
    yield ""
    yield from settings(found)


def table(found: Sequence[Json]) -> Iterator[str]:
    """Yield one row a bit width and method: mean and standard error over the seeds."""
    yield "| | top-1, % | train loss | sharpness, rho .05 | passes | seeds |"
    yield "|---|---|---|---|---|---|"
    yield _row("full precision", _of(found, "fp32"))
    for bits in BITS:
        for method, name in METHODS.items():
            if runs := _of(found, method, bits):
                yield _row(f"W{bits}A{bits} {name}", runs)
    yield ""


def _row(name: str, runs: Mapping[int, Json]) -> str:
    results = [runs[seed] for seed in sorted(runs)]
    cells = [
        name,
        mean_and_error([100 * r["metric"] for r in results], 2),
        mean_and_error([r["train_loss"] for r in results], 3),
        mean_and_error([r["sharpness"][0]["value"] for r in results], 4),
        f"{results[0]['passes']}",
        f"{len(results)}",
    ]
    return f"| {' | '.join(cells)} |"


def differences(found: Sequence[Json]) -> Iterator[str]:
    """Yield the differences in top-1 between pairs of methods, taken seed by seed: both start from one checkpoint."""
    yield "Differences in top-1 between runs from the same checkpoint, in points (mean ± standard error over seeds):"
    yield ""
    yield "| | " + " | ".join(f"W{bits}A{bits}" for bits in BITS) + " |"
    yield "|---|" + "---|" * len(BITS)
    for one, other in PAIRS:
        cells = []
        for bits in BITS:
            values = _differences(_of(found, one, bits), _of(found, other, bits), _top1)
            cells.append(mean_and_error(values, 2) if values else "not run")
        yield f"| {METHODS[one]} minus {METHODS[other]} | {' | '.join(cells)} |"
    yield ""


def verdict(found: Sequence[Json]) -> Iterator[str]:
    """Yield what the numbers say, and what they do not."""
    seeds = [len(_of(found, "lsq", bits)) for bits in BITS]
    if min(seeds) < len(SEEDS):
        yield f"Of {len(SEEDS)} seeds that were planned, {min(seeds)} to {max(seeds)} have run."
    yield from _order(found)
    for what, key in (("top-1", _top1), ("sharpness", _sharpness)):
        apart = []
        for one, other in PAIRS:
            for bits in BITS:
                values = _differences(_of(found, one, bits), _of(found, other, bits), key)
                if len(values) > 1 and abs(mean := statistics.mean(values)) > 2 * _error(values):
                    apart.append(f"{METHODS[one]} {'above' if mean > 0 else 'below'} {METHODS[other]} (W{bits}A{bits})")
        yield f"These pairs differ in {what} by more than two standard errors: {'; '.join(apart) or 'none'}."
    yield "With so few seeds a standard error is itself uncertain, and some of fourteen comparisons differ by chance."
    yield ""


def _order(found: Sequence[Json]) -> Iterator[str]:
    """Yield how the cases follow each other, and whether that is the paper's order."""
    for what, key, sign in (("Best in top-1", _top1, -1), ("Flattest", _sharpness, 1)):
        orders = []
        for bits in BITS:
            runs = {case: _of(found, f"saq:case={case}", bits) for case in (1, 2, 3)}
            means = {case: sign * statistics.mean(map(key, run.values())) for case, run in runs.items() if run}
            orders.append(f"{', '.join(map(str, sorted(means, key=means.__getitem__)))} (W{bits}A{bits})")
        yield f"{what} first, by their means, the cases are in the order {'; '.join(orders)}."
    ahead = all(_is_above(found, 3, other, bits) for other in (1, 2) for bits in BITS)
    yield (
        f"**So the paper's order {'comes' if ahead else 'does not come'} out in top-1**: case 3 is "
        f"{'' if ahead else 'not '}above both others by more than two standard errors at both widths."
    )


def _is_above(found: Sequence[Json], one: int, other: int, bits: int) -> bool:
    values = _differences(_of(found, f"saq:case={one}", bits), _of(found, f"saq:case={other}", bits), _top1)
    return len(values) > 1 and statistics.mean(values) > 2 * _error(values)


def _differences(one: Mapping[int, Json], other: Mapping[int, Json], of: Callable[[Json], float]) -> list[float]:
    return [of(one[seed]) - of(other[seed]) for seed in sorted(one.keys() & other.keys())]


def _top1(result: Json) -> float:
    return 100 * float(result["metric"])


def _sharpness(result: Json) -> float:
    return float(result["sharpness"][0]["value"])


def _error(values: Sequence[float]) -> float:
    return float(statistics.stdev(values) / len(values) ** 0.5)


def settings(found: Sequence[Json]) -> Iterator[str]:
    """Yield what made the numbers."""
    commits = sorted({result["commit"] or "unknown" for result in found})
    versions = found[0]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "timm") if name in versions)
    yield f"Made by `python -m benchmarks.saq_cases` at {', '.join(c[:12] for c in commits)}, {named}; all settings are"
    yield "in `benchmarks/results/saq-cases.json`. Ignore the seconds there: the machine had other work, and runs were"
    yield "interrupted for a while."


def draw(found: Sequence[Json], path: Path) -> None:
    """Draw top-1 against sharpness, a panel a bit width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    measured = [bits for bits in BITS if any(result["config"].get("bits") == bits for result in found)]
    for axes, bits in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        for number, (method, name) in enumerate(METHODS.items()):
            runs = _of(found, method, bits).values()
            sharp = [run["sharpness"][0]["value"] for run in runs]
            axes.plot(sharp, [100 * run["metric"] for run in runs], "o", color=f"C{number}", label=name)
        axes.set(title=f"W{bits}A{bits}, a point a seed", xlabel="sharpness of the training loss, rho .05")
        axes.set_ylabel("top-1, %")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _of(found: Sequence[Json], method: str, bits: int | None = None) -> dict[int, Json]:
    """Return the runs of a method at a bit width, by seed."""
    configs = [(result["config"], result) for result in found]
    return {c["seed"]: result for c, result in configs if c["method"] == method and c.get("bits") == bits}


if __name__ == "__main__":
    sys.exit(main())
