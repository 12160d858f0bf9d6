"""Ready-made ``rules`` for :func:`qsam.quantize_`."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from qsam.layers import is_lora
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
