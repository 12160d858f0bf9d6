"""Which method to train, as a command line writes it: a registered name and its settings.

    fp32   rtn   lsq   lsq2x   saq   saq:case=1   squat:schedule=fused,direction=asam   qat:weights=diffq   sam

``lsq`` is ``qat`` under the name of its default quantizer. ``2x`` gives a method twice the steps, to compare at equal
passes. What follows the colon goes to the optimizer, or to ``quantize_`` if it is named like an argument of that.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import qsam
from qsam.optim import DIRECTIONS, OPTIMIZERS, QuantizedOptimizer

PASSES = {"same_batch": 3.0, "next_batch": 1.5, "fused": 2.0}
"""Forward-backward passes a step of SQuAT, by schedule."""

LEVELS = {"fp32": "full precision", "rtn": "rounded to nearest, without training"}
"""What is compared with, and is no method."""

_ALIASES = {"lsq": "qat"}
_QUANTIZATION = ("weights", "activations", "bits", "activation_bits", "granularity", "group_size", "init")
_NOT_SETTINGS = {"params", "scale_optimizer", "perturbation_scope", "ddp"}


@dataclass(frozen=True)
class Method:
    """One method with its settings.

    Attributes:
        text: As it was written; it names runs and rows of tables.
        name: ``"fp32"``, ``"rtn"``, or the registered name of an optimizer.
        factor: How many times the usual number of steps.
        settings: What was written after the colon.
    """

    text: str
    name: str
    factor: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The text in characters that every file system takes."""
        return re.sub(r"[:,]", "-", self.text)

    @property
    def quantizes(self) -> bool:
        """Whether the result is a quantized model."""
        return self.name == "rtn" or (self.name in OPTIMIZERS and OPTIMIZERS.get(self.name).quantizes)

    @property
    def trains(self) -> bool:
        """Whether an optimizer of qsam runs."""
        return self.name not in LEVELS

    def configured(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Return every setting that this method has: its own, and those of ``shared`` that it takes."""
        known = self._quantization_settings() | self._optimizer_settings()
        return {key: value for key, value in shared.items() if key in known} | dict(self.settings)

    def quantization(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keywords of ``quantize_`` that ``config`` holds."""
        return {key: config[key] for key in _QUANTIZATION if key in config}

    def optimizer(
        self, model: nn.Module, base: type[torch.optim.Optimizer], config: Mapping[str, Any], **arguments: Any
    ) -> QuantizedOptimizer:
        """Return the method's optimizer with the settings in ``config``.

        Args:
            model: The model, quantized if the method quantizes.
            base: The base optimizer's class.
            config: Settings by name; what belongs to others is passed over.
            arguments: Keywords of the base.
        """
        settings = {key: config[key] for key in self._optimizer_settings() if key in config}
        rates = settings.get("scale_lr")
        if isinstance(rates, list | tuple):
            settings["scale_lr"] = tuple(rates) if len(rates) == 2 else rates[0] if rates else None
        return OPTIMIZERS.get(self.name)(model, base, **settings, **arguments)

    def check(self, shared: Mapping[str, Any]) -> None:
        """Refuse settings that make no sense, by trying them on one layer.

        Raises:
            ValueError: with the method's text and what is wrong.
        """
        known = sorted(self._quantization_settings() | self._optimizer_settings())
        for key in self.settings:
            if key not in known:
                raise ValueError(
                    f"`--method {self.text}`: {self.name} has no setting {key!r}; it has {', '.join(known) or 'none'}."
                )
        config = self.configured(shared)
        model = nn.Sequential(nn.Linear(int(config.get("group_size") or 8), 8))
        try:
            if self.quantizes:
                qsam.quantize_(model, **self.quantization(config), rules=[("*", {})])
            if self.trains:
                self.optimizer(model, torch.optim.Adam, config, lr=1e-3)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`--method {self.text}`: {error}") from error

    def _quantization_settings(self) -> set[str]:
        return set(_QUANTIZATION) if self.quantizes else set()

    def _optimizer_settings(self) -> set[str]:
        if not self.trains:
            return set()
        found: set[str] = set()
        for cls in OPTIMIZERS.get(self.name).__mro__:
            if issubclass(cls, QuantizedOptimizer) and cls is not QuantizedOptimizer:
                parameters = inspect.signature(cls.__init__).parameters.values()
                found |= {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return found - _NOT_SETTINGS


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
    name = match[1] if match else head
    name = _ALIASES.get(name, name)
    if match is None or (name not in LEVELS and name not in OPTIMIZERS):
        raise ValueError(f"`--method {text}`: the methods are {', '.join(method_names())}.")
    factor = float(match[2] or 1)
    if factor <= 0 or (factor != 1 and name in LEVELS):
        raise ValueError(f"`--method {text}`: {name} cannot have {factor:g} times the steps.")
    return Method(text, name, factor, dict(_setting(text, word) for word in tail.split(",") if tail))


def method_names() -> list[str]:
    """Return all names that a method may start with."""
    return [*LEVELS, *_ALIASES, *OPTIMIZERS]


def settings_help() -> str:
    """Return a sentence for ``--help``."""
    return (
        f"one or more of {', '.join(method_names())}; NAME2x has twice the steps; NAME:setting=value,... sets one "
        f"method's own, e.g. saq:case=1, squat:direction=asam, qat:weights=diffq (directions: {', '.join(DIRECTIONS)}; "
        f"quantizers: {', '.join(qsam.list_quantizers())}). fp32 is run for the others in any case"
    )


def _setting(text: str, word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not (key and equals and value):
        raise ValueError(f"`--method {text}`: after the colon comes setting=value, got {word!r}.")
    return key.replace("-", "_"), _value(value)


def _value(text: str) -> Any:
    """Return a number, true, false or null, else the word itself.

    Example:
        >>> _value("2"), _value(".5"), _value("false"), _value("asam")
        (2, 0.5, False, 'asam')
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
