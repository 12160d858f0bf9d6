"""Rules: see book.py."""

from torch import nn

import qsam
from tests.wrong_calls.book import wrong


@wrong(TypeError, "`rules` must be a sequence of pairs (selector, overrides), got '*'.")
def _(model):
    qsam.quantize_(model, rules="*")


@wrong(TypeError, "`rules` must be a sequence of pairs (selector, overrides), got {'*': {}}.")
def _(model):
    qsam.quantize_(model, rules={"*": {}})


@wrong(TypeError, "`rules` must be a sequence of pairs (selector, overrides), got 3.")
def _(model):
    qsam.quantize_(model, rules=3)


@wrong(TypeError, "`rules` must be a sequence of pairs (selector, overrides), got '*' in it.")
def _(model):
    qsam.quantize_(model, rules=["*"])


@wrong(TypeError, "`rules` must be a sequence of pairs (selector, overrides), got ('*', {}, None) in it.")
def _(model):
    qsam.quantize_(model, rules=[("*", {}, None)])


@wrong(
    TypeError,
    "a rule's selector must be a glob, 're:...', a module type or a predicate (name, module) -> bool, got 3.",
)
def _(model):
    qsam.quantize_(model, rules=[(3, {})])


@wrong(
    TypeError,
    "a rule's selector must be a glob, 're:...', a module type or a predicate (name, module) -> "
    "bool, got Linear(in_features=2, out_features=2, bias=True).",
)
def _(model):
    qsam.quantize_(model, rules=[(nn.Linear(2, 2), {})])


@wrong(
    TypeError,
    "a rule's selector must be a glob, 're:...', a module type or a predicate (name, module) -> "
    "bool, got <class 'dict'>.",
)
def _(model):
    qsam.quantize_(model, rules=[(dict, {})])


@wrong(ValueError, "the rule 're:(' is not a regular expression: missing ), unterminated subpattern at position 0.")
def _(model):
    qsam.quantize_(model, rules=[("re:(", {})])


@wrong(TypeError, "a rule's overrides must be None (float) or a dict of quantize_'s keywords, got 4.")
def _(model):
    qsam.quantize_(model, rules=[("*", 4)])


@wrong(TypeError, "a rule cannot override 'bit'. Did you mean 'bits' or 'init'?")
def _(model):
    qsam.quantize_(model, rules=[("*", {"bit": 4})])


@wrong(ValueError, "in the rule '*': `bits` must be an integer in [2, 8], got 1. To keep a tensor in float, give None.")
def _(model):
    qsam.quantize_(model, rules=[("*", {"bits": 1})])


@wrong(ValueError, "'0.weight': There is no quantizer 'lsk'. Did you mean 'lsq'?")
def _(model):
    qsam.quantize_(model, rules=[("*", {"weights": "lsk"})])


@wrong(
    ValueError,
    "in the rule '*': `init` must be one of mse, lsq, absmax, percentile, got 'max'. Did you mean 'absmax'?",
)
def _(model):
    qsam.quantize_(model, rules=[("*", {"init": "max"})])


@wrong(
    ValueError,
    "the rule '3.weight' matches no parameter of two or more dimensions. Did you mean '4.weight' or "
    "'2.weight' or '0.weight'?",
)
def _(model):
    qsam.quantize_(model, rules=[("3.weight", {})])


@wrong(
    ValueError,
    "the rule 'encoder*' matches no parameter of two or more dimensions. There are: 0.weight, 2.weight, 4.weight.",
)
def _(model):
    qsam.quantize_(model, rules=[("encoder*", None)])


@wrong(
    ValueError,
    "the rule Conv2d matches no parameter of two or more dimensions. There are: 0.weight, 2.weight, 4.weight.",
)
def _(model):
    qsam.quantize_(model, rules=[(nn.Conv2d, {})])


@wrong(ValueError, "nothing was quantized: no layer that qsam knows, or every one is kept float. Name some in `rules`.")
def _(model):
    qsam.quantize_(model, rules=[("*", None)])


@wrong(
    ValueError,
    "the rule _encoder_linear matches no parameter of two or more dimensions. There are: 0.weight, 2.weight, 4.weight.",
)
def _(model):
    qsam.quantize_(model, rules=qsam.presets.squat_bert)
