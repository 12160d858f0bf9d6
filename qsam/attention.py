"""Which modules are attention, and which layers are never called: there something stays float, and Coverage says so.

Nothing in a module tells that it multiplies two activations, so attention is recognised by names.
"""

from __future__ import annotations

import re

from torch import nn

_CLASS = re.compile("Attention|Attn")
_NAME = re.compile(r"(^|_)(attn|attention)\d*$")


def find_attention(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that are attention by the name of their class or their own, innermost only.

    A module without Parameters (an attention dropout) is none.

    Example:
        >>> find_attention(nn.TransformerEncoderLayer(8, 2, 16))
        ('self_attn',)
    """
    found = [name for name, module in model.named_modules() if _is_attention(name, module)]
    outer = {name[: match.start()] for name in found for match in re.finditer(r"\.", name)}
    return tuple(name for name in found if name not in outer and (name or len(found) == 1))


def _is_attention(name: str, module: nn.Module) -> bool:
    named = _CLASS.search(type(module).__name__) or _NAME.search(name.rpartition(".")[2])
    is_one = isinstance(module, nn.MultiheadAttention) or named is not None
    return is_one and not isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None


def never_called(model: nn.Module) -> dict[int, str]:
    """Return the ids of the layers whose weights another module uses without calling them, with the reason.

    A pre-hook on them never runs: an input quantizer there would never see a batch, and DistributedDataParallel would
    wait for its gradient.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found[id(module.out_proj)] = "weights only: MultiheadAttention never calls its out_proj"
        # timm's BEiT, EVA and Swin V2, with q_bias and v_bias: F.linear(x, self.qkv.weight, bias)
        elif getattr(module, "qkv_bias_separate", None) is False and getattr(module, "q_bias", None) is not None:
            reason = "weights only: timm uses the weight without calling the layer"
            found[id(module.qkv)] = f"{reason} (set `qkv_bias_separate = True` on its attention before quantize_)"
    return found
