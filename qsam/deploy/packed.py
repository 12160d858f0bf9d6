"""Packed files: every quantized weight at its true bit width, and everything else of the model as it is.

    u = codes + 2^(bits-1)          each row: the bits of u_0, u_1, ... one after the other, the lowest first

A folder holds ``qsam.json``, the plan, and ``qsam.safetensors``: packed codes as ``X_packed`` (uint8), scales, and the
float tensors of the state_dict. ``quantize_(model, spec=folder)`` reads the quantizers from it as from any other spec.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsam.attach import dequantize_, quantize_
from qsam.coverage import Coverage, coverage_of, require_coverage
from qsam.export import record_of, weights_of
from qsam.functional import integer_limits
from qsam.layers import unwrap_model
from qsam.plan import SPEC_NAME, read_spec, write_spec

PACKED = "packed"
"""Key of ``qsam.json``: the dtype of each packed weight by its name, under "dtypes", and a digest of the rest."""


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Return the codes of each row as a dense run of bits.

    Args:
        codes: Shape ``(rows, n)``; int8, packed as ``codes + 2^(bits-1)``, or uint8, packed as they are.
        bits: Width, in [2, 8].

    Returns:
        uint8 of shape ``(rows, ceil(n * bits / 8))``, on the CPU; unused bits are 0.

    Raises:
        ValueError: a code does not fit.

    Example:
        >>> pack_rows(torch.tensor([[-2, -1, 0, 1, 1]], dtype=torch.int8), 2)  # 0b11_10_01_00, 0b11
        tensor([[228,   3]], dtype=torch.uint8)
    """
    low, high = integer_limits(bits, signed=codes.dtype != torch.uint8)
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits.")
    rows, n = codes.shape
    padded = torch.zeros(rows, -(-n // 8) * 8, dtype=torch.uint8)
    padded[:, :n] = (codes.cpu().to(torch.int16) - low).to(torch.uint8)
    word = torch.zeros(rows, padded.shape[1] // 8, dtype=torch.int64)
    for i in range(8):  # eight codes are `bits` whole bytes
        word |= padded[:, i::8].to(torch.int64) << bits * i
    packed = torch.stack([(word >> 8 * j) & 255 for j in range(bits)], 2).to(torch.uint8)
    return packed.flatten(1)[:, : -(-n * bits // 8)].contiguous()


def unpack_rows(packed: Tensor, bits: int, n: int, *, signed: bool = True) -> Tensor:
    """Return the codes, ``(rows, n)``, that :func:`pack_rows` packed.

    Example:
        >>> unpack_rows(torch.tensor([[228, 3]], dtype=torch.uint8), 2, 5)
        tensor([[-2, -1,  0,  1,  1]], dtype=torch.int8)
    """
    rows, words = packed.shape[0], -(-n // 8)
    padded = torch.zeros(rows, words * bits, dtype=torch.uint8)
    padded[:, : packed.shape[1]] = packed
    byte = padded.reshape(rows, words, bits).to(torch.int64)
    word = torch.zeros(rows, words, dtype=torch.int64)
    for j in range(bits):
        word |= byte[:, :, j] << 8 * j
    low = integer_limits(bits, signed)[0]
    codes = torch.stack([((word >> bits * i) & (2**bits - 1)) + low for i in range(8)], 2)
    return codes.flatten(1)[:, :n].to(torch.int8 if signed else torch.uint8)


@torch.no_grad()
def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a quantized model, packed: any layer, any granularity, 2 to 8 bits; tied weights once.

    Each file is written under another name and renamed; ``qsam.json`` comes last and holds a digest of both.

    Args:
        model: A quantized model whose weights hold Q(w); its optimizer may live or be gone, and is not saved.
        folder: Made if there is none.

    Returns:
        The path of ``qsam.json``.

    Raises:
        RuntimeError: as :func:`qsam.export`.
        TypeError: a quantizer without integers (``gobo``), or state that is no tensor.
    """
    root = unwrap_model(model)
    coverage = require_coverage(root, "save")
    records = {record.name: record for record in weights_of(root, coverage, affine=True)}
    tensors = {f"{name}_packed": pack_rows(_rows(r.codes), r.bits) for name, r in records.items()}
    for names, value in _named_tensors(root):
        if not set(names) & records.keys():
            tensors[names[0]] = value.detach()
    dtypes = {name: str(record.dtype).removeprefix("torch.") for name, record in records.items()}
    return write_spec(Path(folder), coverage.plan, tensors, lambda spec: {PACKED: _sealed(spec, dtypes)})


@torch.no_grad()
def load(model: nn.Module, folder: str | os.PathLike[str]) -> Coverage:
    """Load a folder of :func:`save` into a float model of the same kind, which then computes the same bit for bit.

    No optimizer is needed; one that is built on the model starts from the quantized weights.

    Args:
        model: A float model with the same parameters, in the same dtypes; its weights mean nothing.
        folder: The folder.

    Returns:
        The model's coverage.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file was changed or torn, or belongs to another model. The model is then as it was.
        RuntimeError: the model is quantized already.
    """
    root = unwrap_model(model)
    if coverage_of(root) is not None:
        raise RuntimeError("the model is quantized already: load into a float model, or call qsam.dequantize_(model).")
    dtypes = _packed_dtypes(Path(folder))
    _, tensors = read_spec(folder)
    assert tensors is not None
    coverage = quantize_(root, spec=folder)
    try:
        codes = _checked_codes(root, coverage, tensors, dtypes, str(folder))
    except BaseException:
        dequantize_(root)
        raise
    state = {name: tensors[names[0]] for names, _ in _named_tensors(root) if names[0] in tensors for name in names}
    root.load_state_dict(state, strict=False)
    for row in coverage.quantized:
        if row.name in codes:
            row.parameter.copy_(record_of(row, codes[row.name].to(row.parameter.device)).dequantized())
    return coverage


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _named_tensors(root: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Return each tensor of the state_dict once, with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, value in root.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} in the model's state_dict is no tensor but {type(value).__name__}: a packed file holds "
                "tensors only."
            )
        found.setdefault(id(value), ([], value))[0].append(name)
    return list(found.values())


def _sealed(spec: Mapping[str, Any], dtypes: Any) -> dict[str, Any]:
    """Return the dtypes of the packed weights, and a digest of them and the rest of the spec."""
    content = json.dumps([spec, dtypes], sort_keys=True).encode()
    return {"dtypes": dtypes, "sha256": hashlib.sha256(content).hexdigest()}


def _packed_dtypes(folder: Path) -> dict[str, str]:
    """Return the dtype of each packed weight from a ``qsam.json`` that is as it was written."""
    path = folder / SPEC_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {str(path)!r}: qsam.deploy.save(model, folder) writes one.")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        packed = spec.pop(PACKED, None)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no spec of qsam ({error}): save the model again.") from error
    if packed is None:
        raise ValueError(
            f"{str(path)!r} has no packed weights: it was written by Coverage.save, whose folder is loaded with "
            "from_pretrained or load_state_dict, and quantize_(model, spec=folder)."
        )
    dtypes = packed.get("dtypes") if isinstance(packed, dict) else None
    if packed != _sealed(spec, dtypes):
        raise ValueError(f"{str(path)!r} was changed since it was written: save the model again, or copy it anew.")
    return dtypes or {}


def _checked_codes(
    root: nn.Module, coverage: Coverage, tensors: Mapping[str, Tensor], dtypes: Mapping[str, str], where: str
) -> dict[str, Tensor]:
    """Return the codes of each packed weight, once all tensors in the file are those of the model."""
    quantizers = {row.name: row.quantizer for row in coverage.quantized if row.name in dtypes}
    left, codes = set(tensors), {}
    for names, value in _named_tensors(root):
        packed = next((name for name in names if name in quantizers), None)
        key = names[0] if packed is None else f"{packed}_packed"
        if key not in tensors:
            raise ValueError(f"{where!r} lacks {names[0]!r}: it belongs to another model, or to one that ties others.")
        left.discard(key)
        found, dtype = tensors[key], str(value.dtype).removeprefix("torch.")
        if packed is None:
            _refuse_difference(key, "dtype", str(found.dtype).removeprefix("torch."), dtype)
            _refuse_difference(key, "shape", list(found.shape), list(value.shape))
            continue
        quantizer, n = quantizers[packed], value.numel() // max(len(value), 1)
        assert quantizer is not None
        _refuse_difference(packed, "dtype", dtypes[packed], dtype)
        _refuse_difference(key, "shape", list(found.shape), [len(value), -(-n * quantizer.bits // 8)])
        codes[packed] = unpack_rows(found, quantizer.bits, n, signed=quantizer.quant_min < 0).reshape(value.shape)
    if left:
        raise ValueError(f"{where!r} holds {min(left)!r}, which this model lacks: it belongs to another model.")
    return codes


def _refuse_difference(name: str, what: str, saved: Any, own: Any) -> None:
    if saved != own:
        raise ValueError(
            f"{name!r} was saved with {what} {saved} and has {own} in this model: build the model as it was saved"
            + (f", or call model.to(torch.{saved})." if what == "dtype" else ".")
        )
