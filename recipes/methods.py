"""Which method to train, as a command line writes it: a registered name and its settings.

    fp32   rtn   lsq   lsq2x   saq   saq:case=1   squat:schedule=fused,direction=asam   qat:weights=diffq   sam
    recommended   q8bert   qbert   gobo

``lsq`` is ``qat`` under the name of its default quantizer; the last line names presets: a method with the quantizers of
``qsam.recommended(bits)`` or of a paper, and the layers that it quantizes. ``2x`` gives a method twice the steps, to
compare methods at equal passes. The settings after the colon go to ``quantize_`` if they are arguments of it, else to
the optimizer. A word after ``@`` names the source of the inputs, for recipes that have several: ``saq:rho=.02@frozen``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import qsam
from qsam.optim import OPTIMIZERS

PASSES = {"same_batch": 3.0, "next_batch": 1.5, "fused": 2.0}
"""Forward-backward passes per step of SQuAT, by schedule."""

LEVELS = ("fp32", "rtn")
"""The rows of a table that no optimizer of qsam trains: full precision, and its weights rounded to nearest."""

PRESETS: Mapping[str, tuple[str, Mapping[str, Any], Any]] = {
    "lsq": ("qat", {}, None),
    "recommended": ("qat", {"weights": None, "granularity": "per_channel"}, None),  # the weights depend on the bits
    "q8bert": (
        "qat",
        {"weights": "minmax_ema", "activations": "minmax_ema", "bits": 8, "activation_bits": 8},
        qsam.presets.q8bert,
    ),
    "qbert": ("qat", {"weights": "qbert", "activations": "qbert"}, qsam.presets.qbert),
    "gobo": ("rtn", {"weights": "gobo", "activations": None}, qsam.presets.gobo),
}
"""The method, the settings and the rules of each preset; without rules the recipe chooses the layers."""

_QUANTIZATION = ("weights", "activations", "bits", "activation_bits", "granularity", "group_size", "init")
_SHARED = {"rho": 0.1, "schedule": "fused", "scale_lr": 0.1}  # with values to try them with
_NOT_SETTINGS = ("params", "scale_optimizer", "perturbation_scope", "ddp")


@dataclass(frozen=True)
class Method:
    """One method: as it was written, its registered name, how many times the usual steps, its settings and rules."""

    text: str
    name: str
    factor: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    rules: Any = field(default=None, repr=False)
    source: str = ""

    @property
    def trains(self) -> bool:
        """Whether an optimizer of qsam runs."""
        return self.name not in LEVELS

    @property
    def quantizes(self) -> bool:
        """Whether the result is a quantized model."""
        return self.name == "rtn" or (self.trains and OPTIMIZERS.get(self.name).quantizes)

    def configured(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings of this method: its own, and those of ``shared`` that it takes (a small model tells)."""
        for key in self.settings:
            if key in _NOT_SETTINGS or not (self.quantizes if key in _QUANTIZATION else self.trains):
                raise ValueError(f"`--method {self.text}`: {self.name} has no setting {key!r}.")
        own = {key: value for key, value in shared.items() if self.quantizes and key in _QUANTIZATION}
        own |= {key: shared[key] for key in _SHARED if key in shared and self._takes(key)}
        own |= self.settings
        if own.get("weights", "") is None:
            own["weights"] = qsam.recommended(own.get("bits", 4)).quantize["weights"]
        try:
            self._try(own)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`--method {self.text}`: {error}") from error
        return own

    def quantize_(self, model: nn.Module, config: Mapping[str, Any], rules: Any = None) -> qsam.Coverage:
        """Quantize a model with the settings in ``config``."""
        return qsam.quantize_(model, rules=rules, **{key: config[key] for key in _QUANTIZATION if key in config})

    def optimizer(
        self, model: nn.Module, base: type[torch.optim.Optimizer], config: Mapping[str, Any], **arguments: Any
    ) -> torch.optim.Optimizer:
        """Return the method's optimizer around a base with these arguments; the base itself for fp32 and rtn."""
        if not self.trains:
            return base(**{"params": model.parameters(), **arguments})
        settings = {
            key: config[key] for key in (*_SHARED, *self.settings) if key in config and key not in _QUANTIZATION
        }
        if isinstance(rates := settings.get("scale_lr"), list):
            settings["scale_lr"] = tuple(rates) if len(rates) > 1 else rates[0]
        optimizer: torch.optim.Optimizer = OPTIMIZERS.get(self.name)(model, base, **{**arguments, **settings})
        return optimizer

    def _takes(self, key: str) -> bool:
        try:
            self._try({key: _SHARED[key]})
        except TypeError:
            return False
        return self.trains

    def _try(self, config: Mapping[str, Any]) -> None:
        model = nn.Sequential(nn.Linear(int(config.get("group_size") or 8), 8))
        if self.quantizes:
            self.quantize_(model, config, rules=[("*", {})])
        self.optimizer(model, torch.optim.Adam, config, lr=1e-3)


def parse_method(text: str) -> Method:
    """Read one method as the command line writes it; ValueError if there is none, or a setting has no value.

    Example:
        >>> parse_method("saq:case=1,rho=.02")
        Method(text='saq:case=1,rho=.02', name='saq', factor=1.0, settings={'case': 1, 'rho': 0.02}, source='')
        >>> parse_method("lsq1.5x").name, parse_method("lsq1.5x").factor
        ('qat', 1.5)
    """
    written, _, source = text.partition("@")
    head, _, tail = written.partition(":")
    match = re.fullmatch(r"([a-z][a-z0-9_]*?)(?:(\d+(?:\.\d+)?)x)?", head)
    name, preset, rules = PRESETS.get(match[1], (match[1], {}, None)) if match else (head, {}, None)
    if match is None or (name not in LEVELS and name not in OPTIMIZERS):
        raise ValueError(f"`--method {text}`: the methods are {', '.join([*LEVELS, *PRESETS, *OPTIMIZERS])}.")
    factor = float(match[2] or 1)
    if factor <= 0 or (factor != 1 and name in LEVELS):
        raise ValueError(f"`--method {text}`: {name} cannot have {factor:g} times the steps.")
    if ("@" in text) != bool(source) or (source and name == "fp32"):
        raise ValueError(f"`--method {text}`: after the @ comes the source of a quantized model's inputs.")
    settings = dict(preset)
    for word in tail.split(",") if tail else ():
        key, _, value = word.partition("=")
        if not (key and value):
            raise ValueError(f"`--method {text}`: after the colon comes setting=value, got {word!r}.")
        settings[key.replace("-", "_")] = _read(value)
    return Method(text, name, factor, settings, rules, source)


def _read(value: str) -> Any:
    """Return 2, false or null; .5; or any other word as it is."""
    for read in (json.loads, float):
        try:
            return read(value)
        except ValueError:
            continue
    return value
