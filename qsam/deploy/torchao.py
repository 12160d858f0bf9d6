"""torchao's tensors with the trained integers, for serving from torch."""

from __future__ import annotations

import copy

import torch
from torch import nn

from qsam.coverage import record_, require_coverage
from qsam.deploy.integers import integers
from qsam.layers import unwrap_model


@torch.no_grad()
def to_torchao(model: nn.Module) -> nn.Module:
    """Return a copy whose Linear weights are torchao's ``IntxUnpackedToInt8Tensor`` of the trained integers.

    One byte per weight in memory, whatever the bits. Inputs are quantized as before, by qsam's hooks. Weights of other
    layers hold their quantized values in float. The copy is for inference and has no weight quantizers.

    Args:
        model: A quantized model whose weights hold Q(w).

    Raises:
        ValueError: a weight whose codes times scale torchao computes otherwise, as in 16-bit dtypes.
        RuntimeError, TypeError: as :func:`integers`.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    twin = copy.deepcopy(unwrap_model(model))
    made: dict[str, nn.Parameter] = {}
    for layer in integers(twin):
        if not layer.is_linear:
            continue
        codes, scale = (tensor.to(layer.codes.device) for tensor in layer.matrix())
        block = (1, codes.shape[1] // scale.shape[1])
        zeros = torch.zeros_like(scale, dtype=torch.int8)
        target = getattr(torch, f"int{layer.bits}")
        weight = IntxUnpackedToInt8Tensor(
            codes, scale.to(layer.dtype).contiguous(), zeros, target, block, layer.dtype, None
        )
        whole = layer.dequantized()
        if not torch.equal(weight.dequantize(), whole):
            raise ValueError(
                f"{layer.name!r}: torchao multiplies codes by scales in {layer.dtype} and gets other weights: call "
                "model.float() and qsam.write_(model) first."
            )
        shared = layer.shares or layer.name
        made.setdefault(shared, nn.Parameter(weight, requires_grad=False))
        layer.module.register_parameter(layer.attr, made[shared])
    for row in require_coverage(twin, "to_torchao").quantized:
        delattr(row.module, f"{row.attr}_quantizer")
    record_(twin, None)
    return twin
