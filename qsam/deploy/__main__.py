"""Write the file that a runtime reads from a trained folder, read it again, and say what it holds and how large it is.

    python -m qsam.deploy runs/glue/stsb-squat-w4a8-seed0 --to compressed-tensors --out deployed

FOLDER is a recipe's run, its ``model``, any folder with a transformers model and a ``qsam.json`` beside it, or what
``--to packed`` wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import qsam
from qsam import deploy
from qsam.coverage import merged
from qsam.deploy.gguf import Patched
from qsam.deploy.packed import PACKED, unpack_rows
from qsam.plan import SPEC_NAME

FORMATS = ("packed", "compressed-tensors", "mlx", "olive", "gguf", "onnx", "onnx-nbits")
SCALES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CODES = {"compressed-tensors": "weight_packed", "mlx": "weight", "olive": "qweight"}
LENGTH = 16
"""Tokens of an example."""

Held = dict[str, tuple[str, int]]
"""What the file has for each weight, by its name: the width or type in words, and the bytes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qsam.deploy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a recipe's run, or a model with its qsam.json")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument("--out", required=True, type=Path, help="the new folder or file")
    parser.add_argument("--float-gguf", type=Path, help="for gguf: what llama.cpp's converter made, with --outtype f32")
    parser.add_argument(
        "--scales", choices=list(SCALES), help="round the weights' scales first, as gguf needs; codes stay"
    )
    parser.add_argument("--rows", type=int, default=4, help="random examples on which outputs are compared")
    options = parser.parse_args(arguments)
    try:
        if options.to == "gguf" and options.float_gguf is None:
            raise ValueError("--to gguf needs --float-gguf, a file of llama.cpp's convert_hf_to_gguf.py --outtype f32.")
        if options.rows < 1:
            raise ValueError(f"--rows must be at least 1, got {options.rows}.")
        run(options)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"qsam.deploy: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Write, read again, and print."""
    model, source = read_model(options.folder)
    if options.out.resolve() == source.resolve():
        raise ValueError(f"--out is the model's own folder {str(source)!r}: give another one.")
    if options.scales:
        deploy.round_scales_(model, SCALES[options.scales])
    held, read = write(model, source, options)
    print("\n".join([*table(model, held, options.out), f"read again: {read}"]))
    if (fresh := loaded(model, options)) is not None:
        inputs = examples(model, options.rows)
        with torch.no_grad():
            ours, theirs = (next(iter(m(**inputs).values())) for m in (model, fresh))
        print(f"outputs of {options.rows} random examples: largest difference {float((ours - theirs).abs().max()):.3g}")


def read_model(folder: Path) -> tuple[Any, Path]:
    """Return the quantized model of a folder, in eval mode, and where it is."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = folder / "model" if (folder / "model" / SPEC_NAME).is_file() else folder
    if not (source / SPEC_NAME).is_file():
        raise FileNotFoundError(f"there is no {SPEC_NAME} in {str(folder)!r}, nor in its folder 'model'.")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(source)!r} has no config.json of a transformers model: build your model, call "
            "qsam.quantize_(model, spec=folder), and then the functions of qsam.deploy."
        )
    config = transformers.AutoConfig.from_pretrained(source)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise ValueError(f"{str(source)!r}: transformers has no architecture {config.architectures} to build.")
    if PACKED in json.loads((source / SPEC_NAME).read_text(encoding="utf-8")):
        model = kind(config).to(config.dtype or torch.float32)
        deploy.load(model, source)
    else:
        model = kind.from_pretrained(source, dtype="auto")
        qsam.quantize_(model, spec=source)
    return model.eval(), source


def examples(model: Any, rows: int) -> dict[str, Tensor]:
    """Return random inputs of a transformers model, the same at every call."""
    draw, config = torch.Generator().manual_seed(0), model.config
    if model.main_input_name == "input_ids":
        text = config.get_text_config()
        length = min(LENGTH, getattr(text, "max_position_embeddings", LENGTH))
        ids = torch.randint(0, text.vocab_size, (rows, length), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    size = getattr(config, "image_size", None)
    if model.main_input_name == "pixel_values" and size is not None:
        sides = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(rows, config.num_channels, *sides, generator=draw)}
    raise ValueError(
        f"there are no examples for a model of {model.main_input_name!r}: call the functions of qsam.deploy."
    )


def write(model: nn.Module, source: Path, options: argparse.Namespace) -> tuple[Held, str]:
    """Write the format and read it again; return what the file holds for each weight, and what was compared."""
    to, out = options.to, options.out
    if to.startswith("onnx"):
        form = "nbits" if to == "onnx-nbits" else "int8"
        batch = examples(model, options.rows)
        deploy.export_onnx(model, batch, out, weights=form)
        report = deploy.check(model, deploy.onnx_runtime(out), [batch])
        return {}, f"the graph holds the trained integers. ONNX Runtime on random examples:\n{report}"
    if to == "gguf":
        return held_by_gguf(deploy.export_gguf(model, options.float_gguf, out), out)
    left = {SPEC_NAME, "generation_config.json", "model.safetensors.index.json"}
    if to == "packed":
        deploy.save(model, out)
        matrices = [
            (x.name, x.codes.flatten(1), x.bits, f"{x.name}_packed") for x in deploy.integers(model) if not x.shares
        ]
    else:
        linears, left = deploy.export_checkpoint(model, out, to), {*left, "config.json"}
        matrices = [(x.layer.name, x.codes, x.bits, f"{x.layer.path}.{CODES[to]}") for x in linears]
    for path in source.iterdir():  # the tokenizer and the like
        if path.suffix in {".json", ".txt", ".model", ".jinja"} and path.name not in left:
            shutil.copyfile(path, out / path.name)
    tensors: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    held: Held = {}
    for name, codes, bits, key in matrices:
        if not torch.equal(unpack_rows(tensors[key].view(torch.uint8), bits, codes.shape[1]), codes.cpu()):
            raise RuntimeError(f"{name!r}: {str(out)!r} does not hold the trained integers. Please report this.")
        stem = name.rpartition(".")[0]
        own = {
            key,
            *(f"{stem}.{end}" for end in ("weight_scale", "scales", "biases", "qzeros")),
            f"{name}_quantizer.scale",
        }
        held[name] = f"{bits} bits", sum(tensors[each].nbytes for each in own & tensors.keys())
    return held, f"all {len(held)} weights hold the trained integers"


def held_by_gguf(patched: Sequence[Patched], out: Path) -> tuple[Held, str]:
    """Return the same for a GGUF file, whose tensors the package gguf turns into floats again."""
    import gguf

    held = {each.layer.name: (each.type, each.blocks.numel()) for each in patched}
    try:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    except ValueError:
        return held, "not possible, because the installed gguf does not know all types (0.19 lacks Q2_0)"
    for each in patched:
        found = tensors[each.tensor]
        values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
        if not torch.equal(values, each.layer.floats()[each.rows]):
            raise RuntimeError(
                f"{each.tensor!r} in {str(out)!r} does not hold the trained integers. Please report this."
            )
    return held, f"all {len(held)} weights hold the trained integers"


def table(model: nn.Module, held: Held, out: Path) -> Iterator[str]:
    """Yield the lines: each weight with its bits and bytes, what stays float, and the sizes in all."""
    coverage = qsam.coverage_of(model)
    assert coverage is not None
    matrices = [row for row in coverage.weights if len(row.shape) >= 2]
    rows: list[tuple[str, tuple[str, ...]]] = []
    for row in matrices:
        kind, size = held.get(row.name, ("float" if row.bits == 32 else f"{row.bits} bits", 0))
        rows.append((row.name, (kind, f"{size:,}" if size else "", f"{4 * row.numel:,}", row.reason)))
    lines = [("weight", "in the file", "bytes", "in fp32", ""), *merged(iter(rows))]
    first, second, third, fourth, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    for a, b, c, d, note in lines:
        yield f"{a:<{first}}  {b:<{second}}  {c:>{third}}  {d:>{fourth}}  {note}".rstrip()
    files = [*out.parent.glob(f"{out.name}*")] if out.is_file() else [*out.glob("*.safetensors")]
    total, whole = sum(path.stat().st_size for path in files), coverage.float_bytes
    yield f"{out}: {total / 1e6:.2f} MB; the model in fp32 {whole / 1e6:.2f} MB ({total / whole:.3f}x)"
    if held:
        packed, wide = sum(size for _, size in held.values()), sum(4 * r.numel for r in matrices if r.name in held)
        yield f"quantized weights: {packed / 1e6:.2f} MB; in fp32 {wide / 1e6:.2f} MB ({packed / wide:.3f}x)"


def loaded(model: Any, options: argparse.Namespace) -> Any:
    """Return a model that is loaded from the file alone; None where this environment has no loader."""
    if options.to == "packed":
        return read_model(options.out)[0]
    with contextlib.suppress(ImportError):
        if options.to == "compressed-tensors":
            import compressed_tensors  # noqa: F401

            return type(model).from_pretrained(options.out, dtype="auto").eval()
    return None


if __name__ == "__main__":
    sys.exit(main())
