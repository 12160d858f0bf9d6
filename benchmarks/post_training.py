"""Rounding after training: quantize_, calibrate and write_ alone, for all quantizers, bit widths and initial scales.

python -m benchmarks.post_training --cache FOLDER                     # MiniLM-L6 on STS-B and on movie reviews
python -m benchmarks.post_training --cache FOLDER --images CIFAR10.npz    # and EfficientNet-Lite0
python -m benchmarks.post_training --tables                           # nothing: only the page, from the kept file

Models and data are those of `recipes/offline.py`. FOLDER keeps the short full-precision runs of `recipes.bert_glue`.
What has been measured is kept after every cell, and the same command goes on; `--minutes` caps the processor time of
each subject. Quantizers that give the same values on samples of three weights, or of normal inputs, are measured once.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qsam
from benchmarks.measure import RESULTS, ROOT, Json, commit, installed, processor, read_json, write_json
from benchmarks.page import table
from qsam.quantizers import build_quantizer
from qsam.scales import INIT_RULES

NAME = "post-training"
PAGE = ROOT / "docs" / "post-training.md"
BITS = (4, 2, 8, 3)
GRANULARITIES = ("per_tensor", "per_channel")
NO_ROUNDING, OTHER_NAMES = "identity", ("per_channel",)
ROWS, IMAGES, SIDE, CALIBRATION = 300, 150, 128, (8, 32)  # rows and images per cell; pixels; batches and rows of each
FP32 = {
    "stsb": "--method fp32 --train-rows 2500 --fp32-epochs 2 --fp32-lr 1e-4 --threads 1 --precision bf16",
    "movies": "--method fp32 --train-rows 2500 --fp32-epochs 1 --fp32-lr 1e-4 --threads 1 --precision bf16",
}
"""Options of the recipe by task."""
NETWORKS = ("lite0", "lite0-norms")
LITE0, NORMS = "EfficientNet-Lite0", "EfficientNet-Lite0 with BatchNorm re-estimated"
SUBJECTS = (*(f"MiniLM-L6, {task}" for task in FP32), LITE0, NORMS)

INPUTS_OF = "stsb"  # the subject whose inputs are quantized too

TEXT = """# Rounding after training

`quantize_`, `calibrate` and `write_` alone, without a training step: the floor that training has to beat, and a map of
what quantizers and initial scales differ in. Weights are quantized with float inputs, and inputs with float weights.

- **MiniLM-L6, STS-B** and **movie reviews**: the recipe's full-precision run, made short (one epoch of 2,500 rows, two
  for STS-B); then the Linear layers of the encoder. Pearson's correlation and accuracy, in percent, on {rows} dev rows.
- **EfficientNet-Lite0**: ImageNet's weights, all layers by the default policy (8 bits in the first layer and the head).
  Its task is not at hand, so that the figure is no accuracy: it is the share of {images} images of CIFAR-10's test set,
  {side} pixels wide, in percent, that get the same of 1,000 classes as from the float model. Once as it is, and once
  with the statistics of its BatchNorms taken again on 64 images after `write_` (and in the float model).

One model and one set of rows per table: differences below {error} points mean nothing (two standard errors of a share
near 80 %). Quantizers that give the same values share a row. `python -m benchmarks.post_training` measures, and writes
this page from `benchmarks/results/post-training.json`.
"""


@dataclass(frozen=True)
class Subject:
    """A float model, batches to calibrate on, what measures it, the layers to quantize, and what follows `write_`."""

    name: str
    metric: str
    rows: int
    model: nn.Module
    batches: Sequence[Any]
    score: Callable[[nn.Module], float]
    rules: Any = None
    parts: tuple[str, ...] = ("weights",)
    after: Callable[[nn.Module], object] | None = None


# --- the subjects -----------------------------------------------------------------------------------------------------


def bert(task: str, cache: Path) -> Subject:
    """Return MiniLM-L6 after the recipe's full-precision run on a task, which is made if the folder lacks it."""
    from recipes import bert_glue, training

    words = ["--task", task, *shlex.split(FP32[task]), "--output-dir", str(cache)]
    if code := bert_glue.main(words):
        raise SystemExit(code)
    experiment = bert_glue.BertOnGlue(bert_glue.read_options(words))
    model = experiment.model(cache / f"{task}-fp32-seed0" / "model").eval()
    dev = [experiment.dev["dev"][i] for i in training.cut(range(len(experiment.dev["dev"])), ROWS)[0]]
    loader = [experiment.collate(dev[i : i + 50]) for i in range(0, ROWS, 50)]
    count, size = CALIBRATION
    few = [experiment.collate(experiment.part[i * size : (i + 1) * size]) for i in range(count)]
    batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in few]

    def score(model: nn.Module) -> float:
        found = [experiment.loss(model, batch)[1].float() for batch in loader]
        labels = torch.cat([batch["labels"] for batch in loader])
        return 100 * experiment.metrics(torch.cat(found).numpy(), labels.numpy())[experiment.metric]

    parts = ("weights", "inputs") if task == INPUTS_OF else ("weights",)
    return Subject(f"MiniLM-L6, {task}", experiment.metric, ROWS, model, batches, score, qsam.presets.squat_bert, parts)


def lite0(images: Path, name: str) -> Subject:
    """Return EfficientNet-Lite0 with images of CIFAR-10; its score is the agreement with the float model.

    Args:
        images: The file.
        name: "lite0-norms" if the statistics of its BatchNorms are taken again after rounding, on two batches.
    """
    import numpy as np
    import timm

    from recipes import offline, vision

    model = timm.create_model(vision.TIMMS_NAME)
    offline.lite0(model)
    model.eval()
    with np.load(images) as file:
        chosen = offline.fixed_order(len(file["images"]))[: IMAGES + CALIBRATION[0] * CALIBRATION[1]]
        x = torch.from_numpy(file["images"][chosen]).permute(0, 3, 1, 2).float()
    x = nn.functional.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
    x = (x - 127) / 128  # as the weights were trained
    rows, batches = x[:IMAGES], torch.split(x[IMAGES:], CALIBRATION[1])

    def classes(model: nn.Module) -> Tensor:
        found: Tensor = torch.cat([model(part) for part in torch.split(rows, 50)]).argmax(1)
        return found

    title, after = LITE0, None
    if name == "lite0-norms":
        title = NORMS
        after = partial(qsam.reestimate_batchnorm, batches=batches[:2])
        after(model)  # what is compared with has the statistics of these images too
    with torch.no_grad():
        expected = classes(model)

    def score(model: nn.Module) -> float:
        return 100 * float((classes(model) == expected).float().mean())

    return Subject(title, "agreement with float", IMAGES, model, batches, score, after=after)


# --- measuring --------------------------------------------------------------------------------------------------------


def alike(part: str, granularity: str, bits: int, samples: Sequence[Tensor]) -> list[list[tuple[str, str]]]:
    """Return the quantizers with the rules of their first scales, those together that give the same values.

    Args:
        part: "weights" or "inputs".
        granularity: Of the weights.
        bits: Of an entry.
        samples: Matrices whose values are compared, up to the rounding of a scale.
    """
    groups: list[tuple[Tensor, list[tuple[str, str]]]] = []
    axis = 0 if part == "weights" else None
    for name, init in product(qsam.list_quantizers(), INIT_RULES):
        if name == NO_ROUNDING or name in OTHER_NAMES:
            continue
        signed = True if axis == 0 else None
        found = []
        for sample in samples:
            try:
                q = build_quantizer(name, bits=bits, signed=signed, granularity=granularity, axis=axis)
            except ValueError:
                break  # it is for inputs only, for weights only, or has another granularity
            q.init = init
            with torch.no_grad():
                q.observe_(sample)
                found.append(q.eval()(sample).flatten())
        if not found:
            continue
        values = torch.cat(found)
        for known, names in groups:
            if torch.allclose(known, values, rtol=1e-5, atol=0):
                names.append((name, init))
                break
        else:
            groups.append((values, [(name, init)]))
    return [names for _, names in groups]


def samples_of(subject: Subject, part: str) -> list[Tensor]:
    """Return 64 rows of three weights, those with the longest rows and two others; or normal numbers."""
    if part == "inputs":
        return [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    coverage = qsam.quantize_(copy.deepcopy(subject.model), activations=None, init="absmax", rules=subject.rules)
    weights = sorted((row.parameter.detach() for row in coverage.quantized), key=lambda w: w[0].numel())
    return [w[:64] for w in (weights[len(weights) // 3], weights[len(weights) // 2], weights[-1])]


@torch.no_grad()
def score(subject: Subject, part: str, granularity: str, bits: int, pair: tuple[str, str]) -> float:
    """Return the score of the model with weights or inputs quantized; the model itself stays float."""
    name, init = pair
    model = copy.deepcopy(subject.model)
    if part == "weights":
        call: Json = {"weights": name, "bits": bits, "granularity": granularity, "activations": None}
    else:
        call = {"weights": None, "activations": name, "activation_bits": bits}
    qsam.quantize_(model, init=init, rules=subject.rules, **call)
    if part == "inputs":
        qsam.calibrate(model, subject.batches)
    qsam.write_(model)
    if subject.after is not None:
        subject.after(model)
    return subject.score(model.eval())


def cells(subject: Subject, widths: Sequence[int]) -> Iterator[tuple[str, str, int, list[tuple[str, str]]]]:
    """Yield what is to be measured: part, granularity, bits, and quantizers that are alike."""
    for part in subject.parts:
        samples = samples_of(subject, part)
        for bits, granularity in product(widths, GRANULARITIES if part == "weights" else GRANULARITIES[:1]):
            for names in alike(part, granularity, bits, samples):
                yield part, granularity, bits, names


def measure(subject: Subject, facts: Json, until: float, widths: Sequence[int] = BITS) -> None:
    """Measure the cells of a subject that are not among the kept ones, until the processor time is spent."""
    kept = read_json(RESULTS, NAME) or {"subjects": {}}
    entry = kept["subjects"].get(subject.name) or {"metric": subject.metric, "rows": subject.rows, "cells": []}
    if "float" not in entry:
        with torch.no_grad():
            entry["float"] = subject.score(subject.model)
    done = [(cell["part"], cell["granularity"], cell["bits"], cell["names"]) for cell in entry["cells"]]
    for part, granularity, bits, names in cells(subject, widths):
        if (part, granularity, bits, [list(pair) for pair in names]) in done:
            continue
        if time.process_time() > until:
            print(f"{subject.name}: the processor time is spent; the same command goes on.", file=sys.stderr)
            break
        found = score(subject, part, granularity, bits, names[0])
        entry["cells"].append({"part": part, "granularity": granularity, "bits": bits,
                               "names": [list(pair) for pair in names], "score": round(found, 2)})  # fmt: skip
        kept = read_json(RESULTS, NAME) or {"subjects": {}}  # another subject may be measured at the same time
        write_json(RESULTS, NAME, {**kept, **facts, "subjects": {**kept["subjects"], subject.name: entry}})
        print(f"{subject.name}, {part} {bits} bits, {granularity}, {names[0]}: {found:.2f}", flush=True)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(found: Json) -> Iterator[str]:
    """Yield the lines of the page."""
    error = round(200 * (0.16 / ROWS) ** 0.5)
    yield TEXT.format(rows=ROWS, images=IMAGES, side=SIDE, error=error)
    missing = [name for name in SUBJECTS if name not in found["subjects"]]
    if missing:
        yield f'Not measured yet: {", ".join(missing)}. Cells that say "not run" are not either.'
        yield ""
    for name, entry in found["subjects"].items():
        yield f"## {name}"
        yield ""
        yield f"{entry['metric']}, percent, on {entry['rows']} rows; float: **{entry['float']:.1f}**."
        yield ""
        if control := entry.get("control"):
            scores = ", ".join(f"{score:.1f} at {bits} bits" for bits, score in control["scores"].items())
            yield f"A control on {control['rows']} rows, `{control['quantizer']}`, {control['granularity']}: {scores}."
            yield ""
        for part in dict.fromkeys(cell["part"] for cell in entry["cells"]):
            yield f"{part.capitalize()} quantized, with float {'inputs' if part == 'weights' else 'weights'}:"
            yield ""
            yield from part_table([cell for cell in entry["cells"] if cell["part"] == part])
            yield ""
    yield f"Measured at commit {found['commit']} on {found['processor']}; {found['packages']}."


def part_table(cells: Sequence[Json]) -> Iterator[str]:
    """Yield a table with one row for all quantizers and rules that are alike at all bits."""
    scores: dict[tuple[str, str, str], dict[int, Json]] = {}
    for cell in cells:
        for name, init in cell["names"]:
            scores.setdefault((name, cell["granularity"], init), {})[cell["bits"]] = cell
    rows: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for (name, granularity, init), by_bits in scores.items():
        same = tuple(id(by_bits.get(b)) if b in by_bits else None for b in sorted(BITS, reverse=True))
        rows.setdefault((granularity, same), []).append((name, init))
    shown = {id(cell): f"{cell['score']:.1f}" for cell in cells}
    heads = ("quantizer", "granularity", "init", *(f"{b} bits" for b in sorted(BITS, reverse=True)))
    yield from table(heads, *(
        (names_of(pairs), granularity, ", ".join(_inits(pairs)), *(shown.get(key, "not run") for key in same))
        for (granularity, same), pairs in sorted(rows.items(), key=lambda row: GRANULARITIES.index(row[0][0]))
    ))  # fmt: skip


def names_of(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the names of a row; those beside others for which the rule makes no difference say so."""
    words = [f"`{name}`{' (any init)' if _any(pairs, name) and _inits(pairs) != ['any'] else ''}" for name, _ in pairs]
    return ", ".join(dict.fromkeys(words))


def _any(pairs: Sequence[tuple[str, str]], name: str) -> bool:
    """Whether all rules of a quantizer are in this row."""
    return len([init for other, init in pairs if other == name]) == len(INIT_RULES)


def _inits(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return the rules of those quantizers of a row for which they make a difference."""
    return list(dict.fromkeys(init for name, init in pairs if not _any(pairs, name))) or ["any"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="keeps the full-precision runs; without it only the images are run")
    parser.add_argument("--images", type=Path, help="an .npz file with CIFAR-10's test images")
    parser.add_argument("--only", nargs="+", choices=[*FP32, *NETWORKS], help="these subjects only")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=BITS, help="these bits only")
    parser.add_argument("--minutes", type=float, default=5.0, help="processor time per subject, without training")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args(arguments)
    if not options.tables:
        packages = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "timm"))
        packages = f"qsam {qsam.__version__}, {packages}"
        facts = {"commit": commit(), "processor": processor(), "packages": packages}
        tasks, images = (() if options.cache is None else FP32), (() if options.images is None else NETWORKS)
        builders: dict[str, Callable[[], Subject]] = {task: partial(bert, task, options.cache) for task in tasks}
        builders |= {name: partial(lite0, options.images, name) for name in images}
        for name in options.only or builders:
            measure(builders[name](), facts, time.process_time() + options.minutes * 60, options.bits)
    PAGE.write_text("\n".join(page(read_json(RESULTS, NAME) or {"subjects": {}})) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
