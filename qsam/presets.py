"""Ready-made ``rules`` for :func:`qsam.quantize_`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from qsam.layers import boundary_modules, is_hf_conv1d, is_lora
from qsam.plan import Rules


def _encoder_linear(name: str, module: nn.Module) -> bool:
    """Whether this is a Linear of a transformer block: a module below a numbered ``layer`` list."""
    in_block = any(a in {"layer", "layers", "h"} and b.isdigit() for a, b in pairwise(name.split(".")))
    return in_block and isinstance(module, nn.Linear) and not is_lora(name)


squat_bert: Rules = ((_encoder_linear, {}), ("*", None))
"""The encoder's Linear layers; embeddings, pooler and head stay float. The paper names no layers: this is our choice.

References:
    Wang et al., SQuAT: Sharpness- and Quantization-Aware Training for BERT, arXiv 2210.07171, section 4.
"""


def _encoder_or_pooler(name: str, module: nn.Module) -> bool:
    """Whether this is a Linear of a transformer block, or the pooler's."""
    return _encoder_linear(name, module) or (isinstance(module, nn.Linear) and "pooler" in name.split("."))


q8bert: Rules = ((nn.Embedding, {}), (nn.Linear, {}), ("*", None))
"""All Linear layers and embeddings, as in Q8BERT. Take it with ``weights="minmax_ema"``, ``activations="minmax_ema"``.

References:
    Zafrir et al., Q8BERT: Quantized 8Bit BERT, arXiv 1910.06188.
"""

qbert: Rules = ((nn.Embedding, {"bits": 8}), (_encoder_linear, {}), ("*", None))
"""The encoder's Linear layers, and embeddings at 8 bits, as in Q-BERT. Take it with ``weights="qbert"``.

References:
    Shen et al., Q-BERT, arXiv 1909.05840.
"""

gobo: Rules = ((_encoder_or_pooler, {}), ("*", None))
"""The Linear layers of encoder and pooler, as in GOBO. Take it with ``weights="gobo"``, ``activations=None``.

The paper also quantizes the word embeddings; here these stay float.

References:
    Zadeh et al., GOBO, arXiv 2005.03842.
"""


# --- where the model will go: each takes the model, because its ends are found in it -------------------------------


def onnx_cpu(model: nn.Module) -> Rules:
    """Return rules that give an input convolution and the head 7 bits in place of 8; the rest is as the call says.

    Products of 8-bit weights and 8-bit inputs saturate on x86 processors without VNNI. ``deploy.export_onnx`` avoids
    it, at some cost in speed; 7 bits cannot saturate.

    Example:
        >>> import qsam
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> coverage = qsam.quantize_(model, bits=4, rules=onnx_cpu(model))
        >>> [row.quantizer.bits for row in coverage.quantized]
        [4, 7]
    """
    ends = set(boundary_modules(model))
    return ((lambda name, module: id(module) in ends, {"bits": 7, "activation_bits": 8}),) if ends else ()


_LLM = {"bits": 4, "activations": None, "granularity": "per_group", "group_size": 32}


def llm_int4(model: nn.Module) -> Rules:
    """Return rules for a language model in int4: Linear and Conv1D in groups of 32, inputs, embeddings and head float.

    This is what compressed-tensors, MLX and MatMulNBits hold exactly.
    """
    return (*_head_rule(model, None), (_matrix, _LLM), ("*", None))


def gguf_q4_0(model: nn.Module) -> Rules:
    """Return rules for llama.cpp: Linear and Conv1D as Q4_0, embeddings and head as Q8_0, in groups of 32."""
    wide = {**_LLM, "bits": 8}
    tables = ((nn.Embedding, wide),) if any(isinstance(m, nn.Embedding) for m in model.modules()) else ()
    return (*tables, *_head_rule(model, wide), (_matrix, _LLM), ("*", None))


def _head_rule(model: nn.Module, overrides: dict[str, Any] | None) -> Rules:
    heads = {key for key, role in boundary_modules(model).items() if role == "head"}
    return ((lambda name, module: id(module) in heads, overrides),) if heads else ()


def _matrix(name: str, module: nn.Module) -> bool:
    return (isinstance(module, nn.Linear) or is_hf_conv1d(module)) and not is_lora(name)
