"""GGUF for llama.cpp: a float file of its own converter gets the trained integers in place of the floats.

    block = one fp16 d and some codes;   w = d * (q - zero)

The file's floats must be the model's weights up to the rounding of their scales, as they are or with rows in the order
that the converter gives rotary heads: so no architecture is written down here, and no code is computed from a float.

    type    bits  block   holds            by
    Q2_0    2     64      d (q - 1)        q = 1 - code, d = -s
    TQ2_0   2     256     d (q - 1)        the same; kernels on CPUs only
    Q2_K    2     256     d q - 2 d        sub-scales and sub-minima 1
    Q3_K    3     256     d (q - 4)        sub-scales 1
    Q4_0    4     32      d (q - 8)
    Q5_0    5     32      d (q - 16)
    Q6_K    6     256     d (q - 32)       sub-scales 1
    Q8_0    8     32      d q

References:
    The block layouts of ggml-common.h, and the reference dequantizers of the package ``gguf``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qsam.deploy.integers import Layer, integers, warn_of_inputs
from qsam.layers import is_hf_conv1d
from qsam.registry import nearest


def _fields(q: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """Return bytes that hold the fields along dimension 2 of ``q.reshape(n, *shape)``, the lowest first."""
    parts = q.reshape(len(q), *shape).to(torch.int16).unbind(2)
    return torch.stack([part << bits * i for i, part in enumerate(parts)]).sum(0).to(torch.uint8).flatten(1)


def _half(s: Tensor) -> Tensor:
    return s.to(torch.float16)[:, None].view(torch.uint8)


def _filled(q: Tensor, value: int, count: int) -> Tensor:
    return torch.full((len(q), count), value, dtype=torch.uint8)


def _q2_0(q: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_half(-s), _fields(3 - q, (16, 4), 2)], 1)


def _tq2_0(q: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_fields(3 - q, (2, 4, 32), 2), _half(-s)], 1)


def _q2_k(q: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_filled(q, 0x11, 16), _fields(q, (2, 4, 32), 2), _half(s), _half(2 * s)], 1)


def _q3_k(q: Tensor, s: Tensor) -> Tensor:
    scales = [_filled(q, 0x11, 8), _filled(q, 0xAA, 4)]  # sixteen times 33, which is 1
    return torch.cat([_fields(q >> 2, (1, 8, 32), 1), _fields(q & 3, (2, 4, 32), 2), *scales, _half(s)], 1)


def _q4_0(q: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_half(s), _fields(q, (1, 2, 16), 4)], 1)


def _q5_0(q: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_half(s), _fields(q >> 4, (4, 8), 1), _fields(q & 15, (1, 2, 16), 4)], 1)


def _q6_k(q: Tensor, s: Tensor) -> Tensor:
    low = (q & 15).reshape(len(q), 2, 2, 64)  # a byte holds the entries k and k + 64 of each half
    return torch.cat([_fields(low, (2, 2, 64), 4), _fields(q >> 4, (2, 4, 32), 2), _filled(q, 1, 16), _half(s)], 1)


def _q8_0(q: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_half(s), q ^ 128], 1)  # two's complement of q - 128


class Type(NamedTuple):
    """A block type: ggml's number, the width of its codes, the entries of a block.

    ``pack`` makes blocks, as bytes, from ``q = codes + 2^(bits-1)``, uint8 ``(n, block)``, and the scales ``(n,)``.
    """

    number: int
    bits: int
    block: int
    pack: Callable[[Tensor, Tensor], Tensor]

    def blocks(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the rows of a matrix as bytes, from codes ``(out, in)`` and scales ``(out, groups)``."""
        each = scale.repeat_interleave(codes.shape[1] // scale.shape[1] // self.block, 1).flatten()
        q = (codes.to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8).reshape(-1, self.block)
        return self.pack(q, each).reshape(len(codes), -1)


TYPES = {
    "TQ2_0": Type(35, 2, 256, _tq2_0),
    "Q2_0": Type(42, 2, 64, _q2_0),
    "Q2_K": Type(10, 2, 256, _q2_k),
    "Q3_K": Type(11, 3, 256, _q3_k),
    "Q4_0": Type(2, 4, 32, _q4_0),
    "Q5_0": Type(6, 5, 32, _q5_0),
    "Q6_K": Type(14, 6, 256, _q6_k),
    "Q8_0": Type(8, 8, 32, _q8_0),
}
"""All types by name, the smallest first."""


class Patched(NamedTuple):
    """A tensor of a GGUF file that holds integers: its name and type there, the weight, its blocks as bytes.

    Its rows are ``layer.matrix()`` at ``rows``.
    """

    tensor: str
    type: str
    layer: Layer
    rows: Tensor
    blocks: Tensor


@torch.no_grad()
def export_gguf(
    model: nn.Module,
    float_gguf: str | os.PathLike[str],
    path: str | os.PathLike[str],
    types: Sequence[str] | None = None,
) -> list[Patched]:
    """Write a GGUF file with the trained integers, from the float file that llama.cpp's converter made of the model.

    Everything but the quantized tensors is copied: metadata, tokenizer, floats. The file is written under another name
    and renamed. llama.cpp rounds the inputs of these layers by itself, to 8 bits per block.

    Args:
        model: A quantized model whose weights hold Q(w) and whose scales are fp16 numbers (:func:`round_scales_`).
        float_gguf: ``convert_hf_to_gguf.py --outtype f32`` (or f16) of the model, before or after ``round_scales_``.
        path: The new file.
        types: Names of the block types that may be used; None: all but TQ2_0. Each weight gets the smallest that holds
            its codes and groups.

    Returns:
        The tensors that were written as integers.

    Raises:
        ValueError: a layer that is no matrix, groups that no type holds, scales that are no fp16 numbers, or a float
            file of other weights; nothing has been written then.
        FileNotFoundError: there is no ``float_gguf``.
        RuntimeError: as :func:`integers`.
    """
    import gguf

    for name in types or ():
        if name not in TYPES:
            raise ValueError(f"`types` must name some of {', '.join(TYPES)}, got {name!r}.{nearest(name, list(TYPES))}")
    if not Path(float_gguf).is_file():
        raise FileNotFoundError(
            f"there is no {str(float_gguf)!r}: make it with llama.cpp's convert_hf_to_gguf.py --outtype f32."
        )
    if Path(path).resolve() == Path(float_gguf).resolve():
        raise ValueError(f"{str(path)!r} is the float file itself: give another path.")
    allowed = {name: kind for name, kind in TYPES.items() if (name in types if types else name != "TQ2_0")}
    chosen = [(layer, _chosen(layer, allowed)) for layer in integers(model) if not layer.shares]
    reader = gguf.GGUFReader(float_gguf)
    names, heads = _names(reader), _heads(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    patched = []
    for layer, kind in chosen:
        own = names.get_name(layer.name, try_suffixes=(".weight",))
        if own not in tensors:
            raise ValueError(f"{layer.name!r} has no tensor in {str(float_gguf)!r}: keep it float in `rules`.")
        rows = _rows(layer, tensors[own], heads)
        codes, scale = layer.matrix()
        patched.append(Patched(own, kind, layer, rows, TYPES[kind].blocks(codes[rows], scale[rows])))
    warn_of_inputs([layer for layer, _ in chosen], "GGUF")
    _write(reader, Path(path), {each.tensor: each for each in patched})
    return patched


def _chosen(layer: Layer, allowed: dict[str, Type]) -> str:
    """Return the name of the smallest type that holds a weight."""
    is_matrix = isinstance(layer.module, nn.Linear | nn.Embedding) or is_hf_conv1d(layer.module)
    if not is_matrix or layer.attr != "weight":
        raise ValueError(
            f"{layer.name!r} is the {layer.attr} of {type(layer.module).__name__}, and GGUF has types for matrices of "
            "Linear, Conv1D and Embedding: keep it float in `rules`, or use deploy.save."
        )
    codes, scale = layer.matrix()
    columns, group = codes.shape[1], codes.shape[1] // scale.shape[1]
    wide = {name: kind for name, kind in allowed.items() if kind.bits >= layer.bits}
    fitting = [name for name, kind in wide.items() if columns % kind.block == 0 and group % kind.block == 0]
    if not fitting:
        blocks = ", ".join(f"{name} has blocks of {kind.block}" for name, kind in wide.items())
        raise ValueError(
            f"{layer.name!r} has rows of {columns} and a scale per {group} of {layer.bits} bits, which no block type "
            f"divides ({blocks or 'none has so many bits'}): use groups of a multiple of 32, or of 64 for Q2_0, or "
            "keep it float in `rules`."
        )
    if not torch.equal(scale.half().float(), scale):
        raise ValueError(
            f"{layer.name!r} has scales that are no fp16 numbers, and GGUF's are: call "
            "deploy.round_scales_(model, torch.float16) (--scales fp16) and evaluate again."
        )
    return fitting[0]


def _names(reader: Any) -> Any:
    """Return gguf's map from names of transformers to its own, for the architecture of a file."""
    import gguf

    arch = reader.fields["general.architecture"].contents()
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if kind is None:
        raise ValueError(f"the package gguf does not know the architecture {arch!r}: install a newer one.")
    return gguf.get_tensor_name_map(kind, int(reader.fields[f"{arch}.block_count"].contents()))


def _heads(reader: Any) -> list[int]:
    """Return the numbers of heads of queries, and of keys and values."""
    arch = reader.fields["general.architecture"].contents()
    fields = [reader.fields.get(f"{arch}.attention.{name}") for name in ("head_count", "head_count_kv")]
    found = [field.contents() for field in fields if field is not None]
    return sorted({int(n) for value in found for n in (value if isinstance(value, list) else [value]) if int(n) > 0})


ROUNDING = 2.0**-9
"""Of a weight, what scales and floats in fp16 may have moved it by; the next code is at least 2^-7 away."""


def _rows(layer: Layer, tensor: Any, heads: list[int]) -> Tensor:
    """Return the order in which the float tensor has the rows of a weight."""
    own = layer.floats()
    there = torch.from_numpy(tensor.data.copy()) if tensor.tensor_type.name in {"F32", "F16"} else own[:0]
    for rows in _orders(len(own), heads) if there.shape == own.shape else ():
        if bool(((own[rows] - there).abs() <= ROUNDING * own[rows].abs()).all()):
            return rows
    raise ValueError(
        f"{tensor.name!r} in the float GGUF does not hold the values of {layer.name!r}, in any order of rows that is "
        "known: convert this model, with --outtype f32."
    )


def _orders(rows: int, heads: list[int]) -> Iterator[Tensor]:
    """Yield the orders that the converter gives rows: as they are, or pairs of a rotary head side by side."""
    yield torch.arange(rows)
    for count in heads:
        if rows % (2 * count) == 0:
            yield torch.arange(rows).reshape(count, 2, -1).transpose(1, 2).flatten()


def _write(reader: Any, path: Path, patched: dict[str, Patched]) -> None:
    import gguf
    import numpy as np

    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(scratch, reader.fields["general.architecture"].contents())
    writer.data_alignment = reader.alignment
    if "general.quantization_version" not in reader.fields:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    try:
        data = []
        for tensor in reader.tensors:
            found = patched.get(tensor.name)
            values = tensor.data if found is None else found.blocks.numpy()
            kind: Any = tensor.tensor_type if found is None else TYPES[found.type].number
            shape = [int(size) for size in reversed(tensor.shape)]
            # any dtype but uint8: of that the writer would look the type up, and gguf 0.19 does not know all of them
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), values.nbytes, raw_dtype=kind)
            data.append(values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in data:
            writer.write_tensor_data(values)
        writer.close()
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
