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
