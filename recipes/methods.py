"""Which method to train, as a command line writes it: a registered name and its settings.

    fp32   rtn   lsq   lsq2x   saq   saq:case=1   squat:schedule=fused,direction=asam   qat:weights=diffq   sam

``lsq`` is ``qat`` under the name of its default quantizer. ``2x`` gives a method twice the steps, to compare methods at
equal passes. The settings after the colon go to ``quantize_`` if they are arguments of it, else to the optimizer.
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

LEVELS = {"fp32": "full precision", "rtn": "rounded to nearest, without training"}
"""The two rows of a table that are no methods of qsam."""

_ALIASES = {"lsq": "qat"}
_QUANTIZATION = ("weights", "activations", "bits", "activation_bits", "granularity", "group_size", "init")
_SHARED = ("rho", "schedule", "scale_lr")
_NOT_SETTINGS = {"params", "scale_optimizer", "perturbation_scope", "ddp"}


@dataclass(frozen=True)
class Method:
    """One method with its settings.

    Attributes:
        text: The method as it was written; it names folders and rows of tables.
        name: ``"fp32"``, ``"rtn"``, or the registered name of an optimizer.
        factor: How many times the usual number of steps.
        settings: The settings after the colon.
    """

    text: str
    name: str
    factor: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantizes(self) -> bool:
        """Whether the result is a quantized model."""
        return self.name == "rtn" or (self.trains and OPTIMIZERS.get(self.name).quantizes)

    @property
    def trains(self) -> bool:
        """Whether an optimizer of qsam runs."""
        return self.name not in LEVELS

    def configured(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings of this method: its own, and those of ``shared`` that it takes.

        Which it takes is tried on a model of one layer.

        Raises:
            ValueError: with the method's text, if a setting does not exist or makes no sense.
        """
        own = {key: value for key, value in shared.items() if self.quantizes and key in _QUANTIZATION} | dict(
            self.settings
        )
        for key in _SHARED if self.trains else ():
            if key in shared and key not in own and self._takes({key: shared[key]}):
                own[key] = shared[key]
        for key, value in self.settings.items():
            known = self.quantizes if key in _QUANTIZATION else self.trains and key not in _NOT_SETTINGS
            if not known or (key not in _QUANTIZATION and not self._takes({key: value})):
                raise ValueError(f"`--method {self.text}`: {self.name} has no setting {key!r}.")
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
        """Return the method's optimizer over a model.

        Args:
            model: The model, quantized if the method quantizes.
            base: The base optimizer's class.
            config: Settings by name: the shared ones, and the method's own.
            arguments: Keywords of the base; the method's own settings go before them.
        """
        names = [key for key in (*_SHARED, *self.settings) if key in config and key not in _QUANTIZATION]
        settings = {key: config[key] for key in names}
        rates = settings.get("scale_lr")
        if isinstance(rates, list):
            settings["scale_lr"] = tuple(rates) if len(rates) == 2 else rates[0] if rates else None
        optimizer: torch.optim.Optimizer = OPTIMIZERS.get(self.name)(model, base, **{**arguments, **settings})
        return optimizer

    def _takes(self, setting: Mapping[str, Any]) -> bool:
        try:
            self._try(setting)
        except TypeError:
            return False
        except ValueError:  # it exists, and the value is wrong or wants another setting beside it
            return True
        return True

    def _try(self, config: Mapping[str, Any]) -> None:
        model = nn.Sequential(nn.Linear(int(config.get("group_size") or 8), 8))
        if self.quantizes:
            self.quantize_(model, config, rules=[("*", {})])
        if self.trains:
            self.optimizer(model, torch.optim.Adam, config, lr=1e-3)


def parse_method(text: str) -> Method:
    """Read one method as the command line writes it.

    Raises:
        ValueError: if there is no such method, or a setting has no value.

    Example:
        >>> parse_method("saq:case=1,rho=.02")
        Method(text='saq:case=1,rho=.02', name='saq', factor=1.0, settings={'case': 1, 'rho': 0.02})
        >>> parse_method("lsq1.5x").name, parse_method("lsq1.5x").factor
        ('qat', 1.5)
    """
    head, _, tail = text.partition(":")
    match = re.fullmatch(r"([a-z][a-z0-9_]*?)(?:(\d+(?:\.\d+)?)x)?", head)
    name = _ALIASES.get(match[1], match[1]) if match else head
    if match is None or (name not in LEVELS and name not in OPTIMIZERS):
        raise ValueError(f"`--method {text}`: the methods are {', '.join([*LEVELS, *_ALIASES, *OPTIMIZERS])}.")
    factor = float(match[2] or 1)
    if factor <= 0 or (factor != 1 and name in LEVELS):
        raise ValueError(f"`--method {text}`: {name} cannot have {factor:g} times the steps.")
    return Method(text, name, factor, dict(_setting(text, word) for word in tail.split(",") if tail))


def _setting(text: str, word: str) -> tuple[str, Any]:
    key, _, value = word.partition("=")
    if not (key and value):
        raise ValueError(f"`--method {text}`: after the colon comes setting=value, got {word!r}.")
    for read in (json.loads, float, str):  # 2, false and null; .5; any other word
        try:
            return key.replace("-", "_"), read(value)
        except ValueError:
            continue
    raise AssertionError("str() reads any word")
