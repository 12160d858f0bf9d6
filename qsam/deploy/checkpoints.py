"""Checkpoints of transformers models in the layouts of other loaders; each has its tensors and its part of config.json.

    compressed-tensors   transformers, vLLM, SGLang      X.weight_packed, X.weight_scale, X.weight_shape, X.input_scale
    mlx                  mlx-lm                          X.weight, X.scales, X.biases = -2^(bits-1) scales
    olive                onnxruntime-genai's builder     X.qweight, X.scales, X.qzeros

All three pack the rows as :func:`qsam.deploy.packed.pack_rows` does.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsam.deploy.integers import Layer, integers
from qsam.deploy.packed import pack_rows
from qsam.layers import is_hf_conv1d, unwrap_model
from qsam.registry import nearest


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One Linear of a checkpoint.

    Attributes:
        codes: ``(out, in)``.
        scale: ``(out, groups)``, in the checkpoint's dtype.
        bits: Width in the file.
        layer: Where it came from.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    layer: Layer

    @property
    def group(self) -> int:
        """Entries that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def in_groups_of(self, sizes: Sequence[int], layout: str) -> Matrix:
        """Return the same with a group size that the layout has: the scale of a longer group is repeated."""
        size = next((size for size in sizes if self.group % size == 0), None)
        if size is None:
            raise ValueError(
                f"{self.layer.name!r} has groups of {self.group}, and the layout {layout!r} has groups of "
                f"{', '.join(map(str, sizes))}: quantize it with group_size={sizes[-1]}, or use 'compressed-tensors'."
            )
        return dataclasses.replace(self, scale=self.scale.repeat_interleave(self.group // size, 1))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a loader wants its tensors.

    Attributes:
        widths: Bits that it reads; a narrower weight is written in the next of them.
        tensors: The tensors of one Linear, by their name behind its path.
        config: What config.json gets, from all Linears and the paths of those that stay float.
        groups: Group sizes that it has; empty: any, and one for a whole row.
        holds_inputs: Whether it holds the grids of inputs.
    """

    widths: tuple[int, ...]
    tensors: Callable[[Matrix], dict[str, Tensor]]
    config: Callable[[list[Matrix], list[str]], dict[str, Any]]
    groups: tuple[int, ...] = ()
    holds_inputs: bool = False


@torch.no_grad()
def export_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike[str],
    layout: str = "compressed-tensors",
    dtype: torch.dtype | None = None,
    exact_width: bool = False,
) -> list[Matrix]:
    """Write a transformers model as a checkpoint that another loader reads: config.json and safetensors.

    The folder is made under another name and renamed when it is complete. Tokenizer files are the caller's.

    Args:
        model: A quantized transformers model whose weights hold Q(w). Its quantized weights must be Linears.
        folder: A folder that does not exist, or is empty.
        layout: ``"compressed-tensors"`` (weights and static inputs), ``"mlx"`` or ``"olive"`` (weights only: inputs
            that are quantized in training run in float there, of which a warning tells).
        dtype: Of the float tensors and scales; None: the model's. Scales that it would round are refused.
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
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}.{nearest(layout, list(LAYOUTS))}")
    root: Any = unwrap_model(model)
    if not hasattr(getattr(root, "config", None), "save_pretrained"):
        raise TypeError(
            f"a checkpoint needs a model of transformers with its config, got {type(root).__name__}: use deploy.save, "
            "which takes any model."
        )
    target, form = Path(folder), LAYOUTS[layout]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{str(target)!r} exists: give a new folder, so that no file of another model stays in it.")
    own = next(p.dtype for p in root.parameters() if p.is_floating_point())
    widths = tuple(range(2, 9)) if exact_width and layout == "compressed-tensors" else form.widths
    layers = integers(root)
    _refuse_layers(layers, layout, form)
    dtype = dtype or own
    matrices = [_matrix(layer, widths, dtype) for layer in layers]
    if form.groups:
        matrices = [matrix.in_groups_of(form.groups, layout) for matrix in matrices]
    tensors = _float_tensors(root, layers, dtype)
    for matrix in matrices:
        tensors |= {f"{matrix.layer.path}.{key}": value.contiguous() for key, value in form.tensors(matrix).items()}
    _write(root, target, tensors, form.config(matrices, _float_linears(root, layers)), dtype)
    return matrices


def _refuse_layers(layers: list[Layer], layout: str, form: Layout) -> None:
    for layer in layers:
        if not layer.is_linear:
            kind = "a Conv1D" if is_hf_conv1d(layer.module) else f"the {layer.attr} of {type(layer.module).__name__}"
            cure = "deploy.export_gguf or deploy.save" if layer.codes.dim() == 2 else "deploy.save"
            raise ValueError(
                f"{layer.name!r} is {kind}, and the layout {layout!r} takes Linear only: use {cure}, or keep it float "
                f"in `rules`."
            )
        found = layer.input
        if found is not None and form.holds_inputs and found.signed and found.quant_min != -(2 ** (found.bits - 1)):
            raise ValueError(
                f"the input of {layer.path!r} has levels from {found.quant_min} to {found.quant_max}, and the layout "
                f"{layout!r} would add one below: quantize inputs with activations='lsq'."
            )
    if not form.holds_inputs and (rounded := [layer.path for layer in layers if layer.input is not None]):
        warnings.warn(
            f"the layout {layout!r} holds weights only: the inputs of {len(rounded)} layers ({rounded[0]!r}, ...), which "
            "were quantized in training, run in float there. Train with activations=None for it.",
            UserWarning,
            stacklevel=3,
        )


def _matrix(layer: Layer, widths: Sequence[int], dtype: torch.dtype) -> Matrix:
    codes, scale = layer.matrix()
    return Matrix(codes, held_by(scale, dtype, layer.name), next(w for w in widths if w >= layer.bits), layer)


def held_by(scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return scales in another dtype, if that is exact."""
    cast = scale.to(dtype)
    if not torch.equal(cast.float(), scale):
        raise ValueError(
            f"{name!r} has scales that {dtype} rounds, so that the file would hold other weights: call "
            f"deploy.round_scales_(model, {dtype}) and evaluate again, or give another dtype."
        )
    return cast


def _float_tensors(root: nn.Module, layers: list[Layer], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what stays float, once, by its first name, in the checkpoint's dtype."""
    seen = {id(layer.module._parameters[layer.attr]) for layer in layers}
    found: dict[str, Tensor] = {}
    for name, value in root.state_dict(keep_vars=True).items():
        if id(value) not in seen and "_quantizer." not in name:
            seen.add(id(value))
            found[name] = value.detach().to(dtype if value.is_floating_point() else value.dtype).cpu().contiguous()
    return found


def _float_linears(root: nn.Module, layers: list[Layer]) -> list[str]:
    packed = {id(layer.module) for layer in layers}
    return [name for name, m in root.named_modules() if isinstance(m, nn.Linear) and id(m) not in packed]


def _write(root: Any, target: Path, tensors: dict[str, Tensor], more: Mapping[str, Any], dtype: torch.dtype) -> None:
    from huggingface_hub import save_torch_state_dict

    config = copy.deepcopy(root.config)
    config.architectures, config.dtype = [type(root).__name__], dtype
    for key, value in more.items():
        setattr(config, key, value)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
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


def _words(codes: Tensor, bits: int) -> Tensor:
    """Return packed rows, each filled with zeros to whole 32-bit words."""
    packed = pack_rows(codes, bits)
    return F.pad(packed, (0, -packed.shape[1] % 4))


def _ct_tensors(matrix: Matrix) -> dict[str, Tensor]:
    found = matrix.layer.input
    tensors = {
        "weight_packed": _words(matrix.codes, matrix.bits).view(torch.int32),
        "weight_scale": matrix.scale,
        "weight_shape": torch.tensor(matrix.codes.shape),
    }
    if found is not None:
        tensors["input_scale"] = found.scale.cpu()
        if not found.signed:
            tensors["input_zero_point"] = torch.tensor([-(2 ** (found.bits - 1))], dtype=torch.int8)
    return tensors


def _ct_config(matrices: list[Matrix], ignore: list[str]) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for matrix in matrices:
        found, by_group = matrix.layer.input, matrix.scale.shape[1] > 1
        whole = {"type": "int", "dynamic": False}
        size = {"strategy": "group", "group_size": matrix.group} if by_group else {"strategy": "channel"}
        inputs = None if found is None else {
            **whole, "num_bits": found.bits, "symmetric": found.signed, "strategy": "tensor"}  # fmt: skip
        scheme = {"weights": {**whole, "num_bits": matrix.bits, "symmetric": True, **size}, "input_activations": inputs,
                  "output_activations": None, "format": "pack-quantized"}  # fmt: skip
        groups.setdefault(repr(scheme), {"targets": [], **scheme})["targets"].append(matrix.layer.path)
    try:
        written_by = version("compressed-tensors")
    except PackageNotFoundError:
        written_by = "0.20.0"
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
              "version": written_by, "ignore": ignore,
              "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())}}  # fmt: skip
    return {"quantization_config": config}


def _mlx_tensors(matrix: Matrix) -> dict[str, Tensor]:
    low = -(2.0 ** (matrix.bits - 1))
    packed = _words(matrix.codes, matrix.bits).view(torch.uint32)
    return {"weight": packed, "scales": matrix.scale, "biases": matrix.scale * low}


def _mlx_config(matrices: list[Matrix], ignore: list[str]) -> dict[str, Any]:
    each: dict[str, Any] = {m.layer.path: {"group_size": m.group, "bits": m.bits} for m in matrices}
    config = {**next(iter(each.values())), **each, **dict.fromkeys(ignore, False)}
    return {"quantization": config, "quantization_config": config}


def _olive_tensors(matrix: Matrix) -> dict[str, Tensor]:
    middle = torch.full_like(matrix.scale, 2 ** (matrix.bits - 1), dtype=torch.uint8)
    return {
        "qweight": pack_rows(matrix.codes, matrix.bits),
        "scales": matrix.scale,
        "qzeros": pack_rows(middle, matrix.bits),  # without it the builder fails
    }


def _olive_config(matrices: list[Matrix], ignore: list[str]) -> dict[str, Any]:
    each = {m.layer.path: {"bits": m.bits, "group_size": m.group} for m in matrices}
    first = next(iter(each.values()))
    config = {"quant_method": "olive", **first, "symmetric": True,
              "overrides": {path: own for path, own in each.items() if own != first}}  # fmt: skip
    return {"quantization_config": config}


LAYOUTS = {
    "compressed-tensors": Layout((2, 4, 8), _ct_tensors, _ct_config, holds_inputs=True),
    "mlx": Layout((2, 3, 4, 5, 6, 8), _mlx_tensors, _mlx_config, (128, 64, 32)),
    "olive": Layout((2, 4, 8), _olive_tensors, _olive_config, (128, 64, 32, 16)),
}
