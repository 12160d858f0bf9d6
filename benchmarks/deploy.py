"""Size and latency of a trained encoder in ONNX Runtime: ``python -m benchmarks.deploy RUN``, a run of bert_glue.

The same checkpoint in four files: float32, the trained integers as QDQ and as MatMulNBits, and the float file rounded
by ONNX Runtime's own dynamic quantization. One thread; calls are interleaved, and ratios are taken to float32 in the
same round. The result is written to benchmarks/results/deploy.json.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qsam
from benchmarks.measure import RESULTS, Json, Variant, compared, installed, interleaved, machine, write_json
from qsam import deploy
from qsam.deploy.__main__ import read_model

CASES = ((1, 16), (1, 128), (32, 32))
"""Sentences and tokens."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of recipes.bert_glue, or its model folder")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    model, _ = read_model(options.run)
    facts = machine()
    facts["packages"] |= {name: installed(name) for name in ("onnx", "onnxruntime")}
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(model, Path(folder))
        sizes = {name: path.stat().st_size for name, path in files.items()}
        sessions = {name: deploy.onnx_runtime(path) for name, path in files.items()}
    result: Json = {
        "machine": facts, "run": options.run.name, "bytes": sizes, "rounds": options.rounds,
        "operators": {name: session.operators for name, session in sessions.items()},
        "cases": {f"{n}x{tokens}": timed(model, sessions, n, tokens, options.rounds) for n, tokens in CASES},
    }  # fmt: skip
    write_json(RESULTS, "deploy", result)
    for name, size in sizes.items():
        ratios = ", ".join(f"{case} {found[name]['ratio']['median']}" for case, found in result["cases"].items())
        print(f"{name}: {size / 1e6:.1f} MB; time / float32: {ratios}")


def write_files(model: Any, folder: Path) -> dict[str, Path]:
    """Write the four files; return their paths by name."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime's advice about preprocessing
    batch = batch_of(model, 2, 16)
    files = {name: folder / f"{name}.onnx" for name in ("float32", "integers", "nbits", "dynamic")}
    plain = copy.deepcopy(model)
    qsam.dequantize_(plain)
    shapes = {key: {0: "batch", 1: "length"} for key in batch}
    torch.onnx.export(
        plain.eval(), (), str(files["float32"]), kwargs=batch, dynamo=True, opset_version=21, dynamic_shapes=shapes,
        external_data=False, verbose=False,
    )  # fmt: skip
    deploy.export_onnx(model, batch, files["integers"])
    deploy.export_onnx(model, batch, files["nbits"], weights="nbits")
    graph = onnx.load(files["float32"])
    del graph.graph.value_info[:]  # the exporter's shapes, with which onnx's own inference disagrees
    quantize_dynamic(graph, files["dynamic"], per_channel=True)
    return files


def batch_of(model: Any, sentences: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return random tokens."""
    ids = torch.randint(model.config.vocab_size, (sentences, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def timed(model: Any, sessions: dict[str, Any], sentences: int, tokens: int, rounds: int) -> Json:
    """Return milliseconds and ratios of one batch."""
    batch = batch_of(model, sentences, tokens)

    def call(session: Any) -> Callable[[], object]:
        return lambda: session(batch)

    times = interleaved([Variant(name, call(session)) for name, session in sessions.items()], rounds)
    return compared(times, "float32")


if __name__ == "__main__":
    main()
