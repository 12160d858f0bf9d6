"""Checkpoints of transformers models in the layouts of other loaders; each has its tensors and its part of config.json.

    compressed-tensors   transformers, vLLM, SGLang      X.weight_packed, X.weight_scale, X.weight_shape, X.input_scale
    mlx                  mlx-lm                          X.weight, X.scales, X.biases = -2^(bits-1) scales
    olive                onnxruntime-genai's builder     X.qweight, X.scales, X.qzeros

All three pack the rows as :func:`qsam.deploy.packed.pack_rows` does.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsam.deploy.integers import Layer, integers, warn_of_inputs
from qsam.deploy.packed import pack_rows
from qsam.layers import is_hf_conv1d, unwrap_model
from qsam.registry import nearest


class Linear(NamedTuple):
    """One Linear of a checkpoint: codes ``(out, in)``, scales ``(out, groups)``, and the bits that the file has."""

    layer: Layer
    codes: Tensor
    scale: Tensor
    bits: int

    @property
    def group(self) -> int:
        """Entries that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]


class Layout(NamedTuple):
    """A loader's widths, the tensors of one Linear, its part of config.json, and its group sizes (none: any)."""

    widths: tuple[int, ...]
    tensors: Callable[[Linear], dict[str, Tensor]]
    config: Callable[[list[Linear], list[str]], dict[str, Any]]
    groups: tuple[int, ...] = ()
    holds_inputs: bool = False


@torch.no_grad()
def export_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike[str],
    layout: str = "compressed-tensors",
    dtype: torch.dtype | None = None,
    exact_width: bool = False,
) -> list[Linear]:
    """Write a transformers model as a checkpoint that another loader reads: config.json and safetensors.

    The folder is made under another name and renamed when it is complete. Tokenizer files are the caller's.

    Args:
        model: A quantized transformers model whose weights hold Q(w). Its quantized weights must be Linears.
        folder: A folder that does not exist, or is empty.
        layout: ``"compressed-tensors"`` (weights and static inputs), ``"mlx"`` or ``"olive"`` (weights only; a warning
            tells of inputs that run in float there).
        dtype: Of the float tensors and scales; None: their own, as the model has them. Scales that it would round
            are refused.
        exact_width: For compressed-tensors: write 3, 5, 6 and 7 bits as such, which versions from 0.18 on read; else
            3 bits are written as 4, and 5 to 7 as 8.

    Returns:
        The Linears that were written.

    Raises:
        ValueError: a layer, group size or scale that the layout does not hold; an unknown layout.
        TypeError: not a transformers model, or as :func:`integers`.
        FileExistsError: there is something in ``folder``.
        RuntimeError: as :func:`integers`.
    """
    if layout not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise ValueError(f"`layout` must be one of {known}, got {layout!r}.{nearest(str(layout), list(LAYOUTS))}")
    root: Any = unwrap_model(model)
    if not hasattr(getattr(root, "config", None), "save_pretrained"):
        raise TypeError(
            f"a checkpoint needs a model of transformers with its config, got {type(root).__name__}: use deploy.save, "
            "which takes any model."
        )
    target, form = Path(folder), LAYOUTS[layout]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{str(target)!r} exists: give a new folder, so that no file of another model stays.")
    layers = integers(root)
    if exact_width and form.holds_inputs:
        form = form._replace(widths=tuple(range(2, 9)))
    linears = [_linear(layer, layout, form, dtype) for layer in layers]
    if not form.holds_inputs:
        warn_of_inputs(layers, f"the layout {layout!r}")
    packed = {id(layer.module._parameters[layer.attr]) for layer in layers}
    tensors = _float_tensors(root, packed, dtype)
    for linear in linears:
        tensors |= {f"{linear.layer.path}.{key}": value.contiguous() for key, value in form.tensors(linear).items()}
    floats = [name for name, m in root.named_modules() if isinstance(m, nn.Linear) and id(m.weight) not in packed]
    _write(root, target, tensors, {**form.config(linears, floats), "dtype": dtype or root.dtype})
    return linears


def _linear(layer: Layer, layout: str, form: Layout, dtype: torch.dtype | None) -> Linear:
    """Return the matrix of a layer as the layout holds it."""
    if not layer.is_linear:
        kind = "a Conv1D" if is_hf_conv1d(layer.module) else f"the {layer.attr} of {type(layer.module).__name__}"
        cure = "deploy.export_gguf or deploy.save" if layer.codes.dim() == 2 else "deploy.save"
        raise ValueError(
            f"{layer.name!r} is {kind}, and the layout {layout!r} takes Linear only: use {cure}, or keep it float in "
            "`rules`."
        )
    found = layer.input
    if found is not None and form.holds_inputs and found.signed and found.quant_min != -(2 ** (found.bits - 1)):
        raise ValueError(
            f"the input of {layer.path!r} has levels from {found.quant_min} to {found.quant_max}, and the layout "
            f"{layout!r} would add one below: quantize inputs with activations='lsq'."
        )
    codes, scale = layer.matrix()
    dtype = dtype or layer.dtype
    cast = scale.to(dtype)
    if found is not None and form.holds_inputs and not torch.equal(found.scale.to(dtype).float(), found.scale):
        raise ValueError(
            f"the input of {layer.path!r} has a scale that {dtype} rounds, and the loader keeps it in that dtype: "
            "write the model in torch.float32, or train with activations=None."
        )
    if not torch.equal(cast.float(), scale):
        raise ValueError(
            f"{layer.name!r} has scales that {dtype} rounds, so that the file would hold other weights: call "
            f"deploy.round_scales_(model, {dtype}) and evaluate again, or give another dtype."
        )
    linear = Linear(layer, codes, cast, next(w for w in form.widths if w >= layer.bits))
    if not form.groups:
        return linear
    group = next((size for size in form.groups if linear.group % size == 0), None)
    if group is None:
        raise ValueError(
            f"{layer.name!r} has a scale per {linear.group}, and the layout {layout!r} has groups of "
            f"{', '.join(map(str, form.groups))}: quantize it with group_size=32, or use 'compressed-tensors'."
        )
    return linear._replace(scale=cast.repeat_interleave(linear.group // group, 1))


def _float_tensors(root: nn.Module, packed: set[int], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return what stays float, once, by its first name."""
    seen, found = set(packed), {}
    for name, value in root.state_dict(keep_vars=True).items():
        if id(value) not in seen and "_quantizer." not in name:
            seen.add(id(value))
            own = dtype if dtype is not None and value.is_floating_point() else value.dtype
            found[name] = value.detach().to(own).cpu().contiguous()
    return found


def _write(root: Any, target: Path, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
    from huggingface_hub import save_torch_state_dict

    config, scratch = copy.deepcopy(root.config), target.with_name(f".{target.name}.{os.getpid()}")
    for key, value in {"architectures": [type(root).__name__], **more}.items():
        setattr(config, key, value)
    try:
        scratch.mkdir(parents=True)
        save_torch_state_dict(tensors, scratch)
        if getattr(root, "generation_config", None) is not None:
            root.generation_config.save_pretrained(scratch)
        config.save_pretrained(scratch)
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- the layouts ------------------------------------------------------------------------------------------------------


def _words(linear: Linear) -> Tensor:
    """Return packed rows, each filled with zeros to whole 32-bit words."""
    packed = pack_rows(linear.codes, linear.bits)
    return F.pad(packed, (0, -packed.shape[1] % 4))


def _ct_tensors(linear: Linear) -> dict[str, Tensor]:
    weight = _words(linear).view(torch.int32)
    tensors = {"weight_packed": weight, "weight_scale": linear.scale, "weight_shape": torch.tensor(linear.codes.shape)}
    if (found := linear.layer.input) is not None:
        tensors["input_scale"] = found.scale.cpu()
        if not found.signed:
            tensors["input_zero_point"] = torch.tensor([-(2 ** (found.bits - 1))], dtype=torch.int8)
    return tensors


def _ct_config(linears: list[Linear], ignore: list[str]) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for linear in linears:
        found, static = linear.layer.input, {"type": "int", "dynamic": False}
        size = (
            {"strategy": "group", "group_size": linear.group} if linear.scale.shape[1] > 1 else {"strategy": "channel"}
        )
        scheme = {
            "weights": {**static, "num_bits": linear.bits, "symmetric": True, **size},
            "input_activations": None
            if found is None
            else {**static, "num_bits": found.bits, "symmetric": found.signed, "strategy": "tensor"},
            "output_activations": None,
            "format": "pack-quantized",
        }
        groups.setdefault(repr(scheme), {"targets": [], **scheme})["targets"].append(linear.layer.path)
    found_version = [d.version for d in importlib.metadata.distributions(name="compressed-tensors")]
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "version": (found_version or ["0.20.0"])[0],
            "ignore": ignore,
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        }
    }


def _mlx_tensors(linear: Linear) -> dict[str, Tensor]:
    low = -(2.0 ** (linear.bits - 1))
    return {"weight": _words(linear).view(torch.uint32), "scales": linear.scale, "biases": linear.scale * low}


def _each(linears: list[Linear]) -> dict[str, dict[str, int]]:
    return {linear.layer.path: {"group_size": linear.group, "bits": linear.bits} for linear in linears}


def _mlx_config(linears: list[Linear], ignore: list[str]) -> dict[str, Any]:
    each = _each(linears)
    config = {**next(iter(each.values()), {}), **each, **dict.fromkeys(ignore, False)}
    return {"quantization": config, "quantization_config": config}


def _olive_tensors(linear: Linear) -> dict[str, Tensor]:
    middle = torch.full_like(linear.scale, 2 ** (linear.bits - 1), dtype=torch.uint8)  # the builder fails without it
    weight = pack_rows(linear.codes, linear.bits)
    return {"qweight": weight, "scales": linear.scale, "qzeros": pack_rows(middle, linear.bits)}


def _olive_config(linears: list[Linear], ignore: list[str]) -> dict[str, Any]:
    each = _each(linears)
    first = next(iter(each.values()), {})
    others = {path: own for path, own in each.items() if own != first}
    return {"quantization_config": {"quant_method": "olive", **first, "symmetric": True, "overrides": others}}


LAYOUTS = {
    "compressed-tensors": Layout((2, 4, 8), _ct_tensors, _ct_config, holds_inputs=True),
    "mlx": Layout((2, 3, 4, 5, 6, 8), _mlx_tensors, _mlx_config, (128, 64, 32)),
    "olive": Layout((2, 4, 8), _olive_tensors, _olive_config, (128, 64, 32, 16)),
}
