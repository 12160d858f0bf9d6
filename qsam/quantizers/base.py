"""What a quantizer is: the extension interface.

A quantizer maps a tensor x to Q(x), differentiably. Its Parameters are what training learns (a step size, say), its
buffers are state that moves once per optimizer step. The optimizer obtains dw and the gradients of the Parameters by
autograd of ``forward``, so a quantizer never sees a training loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qsam.functional import integer_limits
from qsam.kernels import Grid
from qsam.registry import Registry

GRANULARITIES = ("per_tensor", "per_channel", "per_group")


class Quantizer(nn.Module):
    """Base class of all quantizers.

    A subclass implements :meth:`init_` and :meth:`forward`; it may add :meth:`codes` and :meth:`update`. ``forward``
    must be a pure function of its input, the Parameters, the buffers and a seed kept in them.

    Args:
        bits: Width of the integers, in [2, 8].
        signed: Whether the grid holds negative values. None, for activations only: decided by :meth:`observe_`.
        granularity: How many entries share one set of parameters: ``"per_tensor"``, ``"per_channel"``,
            ``"per_group"``.
        axis: The channel dimension of a weight; None for an activation.
        group_size: Entries a group, for ``"per_group"``; None otherwise.

    Raises:
        TypeError: ``bits`` or ``axis`` is no integer, ``signed`` no bool.
        ValueError: bits out of range, an unknown granularity, or a combination that means nothing.
    """

    init: str = "mse"
    """The initial-scale rule that ``quantize_`` was given, for a quantizer that wants one; set before ``init_``."""

    calibrated: bool = False
    """Whether the parameters have been set from data. A plain Python flag: a tensor would break compiled graphs."""

    off_grid: bool = False
    """Whether the optimizer has perturbed its weight, so that nobody need find out that it is not on the grid."""

    offset: float = 0.0
    """What codes are shifted by, in steps: the levels of a uniform grid are ``(code + offset) * scale + shift``."""

    shift: Tensor | None = None
    """What levels are shifted by, in the unit of the data, broadcastable as ``scale`` is; None for 0."""

    dynamic: bool = False
    """Whether the scale follows from each input as it comes; ``step_size(x)`` tells it."""

    moves_grid: bool = False
    """Whether :meth:`update` changes Q: the optimizer then writes the weights again."""

    samples: list[Tensor] | None = None
    """What calibration has collected so far; None outside calibration."""

    def __init__(
        self,
        *,
        bits: int,
        signed: bool | None = True,
        granularity: str = "per_tensor",
        axis: int | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        integer_limits(bits, bool(signed))
        _check_kinds(signed, axis)
        _check_granularity(granularity, axis, group_size)
        self.bits = bits
        self.signed = signed
        self.granularity = granularity
        self.axis = axis
        self.group_size = group_size

    def init_(self, x: Tensor) -> None:
        """Set the parameters from data, in place.

        Args:
            x: The weight, or a batch of the activation; floating.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of ``x``, with its straight-through gradient."""
        raise NotImplementedError

    def step_size(self, x: Tensor) -> Tensor | None:
        """Return the distance of neighbouring grid values, broadcastable against ``x``; None without a uniform grid."""
        return None

    def grid(self, x: Tensor) -> Grid | None:
        """Return the grid, where Q is LSQ's and the fused kernels may compute it; None: autograd of ``forward``."""
        return None

    def update(self, w: Tensor) -> None:
        """Move state (ranges, counters) by one optimizer step; called once a step with the latent weight."""

    def take_observations(self) -> None:
        """Move the state of an input's quantizer by what ``forward`` has seen; called once an optimizer step."""

    @property
    def stops(self) -> tuple[float, float]:
        """Between which ``(x - shift) / scale`` the gradient of x passes: the outermost levels; infinite for all."""
        return self.quant_min + self.offset, self.quant_max + self.offset

    @property
    def quant_min(self) -> int:
        """Lowest integer of the grid."""
        return integer_limits(self.bits, self.signed is not False)[0]

    @property
    def quant_max(self) -> int:
        """Highest integer of the grid."""
        return integer_limits(self.bits, self.signed is not False)[1]

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Decide the sign where it is open, then :meth:`init_`: what calibration and the first batch call.

        Args:
            x: Data of the tensor that will be quantized.
        """
        if self.signed is None:
            self.signed = bool((x < 0).any())
        self.init_(x)
        self.calibrated = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move the tensors to another device, but keep fp32 through ``.half()``, ``.bfloat16()`` and ``.to(dtype)``."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.calibrated = self.calibrated or any(key.startswith(prefix) for key in state_dict)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        sign = {True: "signed", False: "unsigned", None: "sign open"}[self.signed]
        return f"bits={self.bits}, {sign}, {self.granularity}" + (f" of {self.group_size}" if self.group_size else "")


def _check_kinds(signed: Any, axis: Any) -> None:
    if not (signed is None or isinstance(signed, bool)):
        raise TypeError(f"`signed` must be True, False or None, got {signed!r}.")
    if not (axis is None or (isinstance(axis, int) and not isinstance(axis, bool))):
        raise TypeError(f"`axis` must be an integer, the channel dimension, or None, got {axis!r}.")


def _check_granularity(granularity: str, axis: int | None, group_size: int | None) -> None:
    if granularity not in GRANULARITIES:
        raise ValueError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
    if granularity != "per_tensor" and axis is None:
        raise ValueError(
            f"granularity {granularity!r} needs `axis`, the channel dimension; activations are per_tensor."
        )
    if granularity == "per_group" and group_size is None:
        raise ValueError(
            "granularity 'per_group' needs `group_size`, the entries that share a scale: give an integer >= 1."
        )
    if granularity != "per_group" and group_size is not None:
        raise ValueError(
            f"`group_size` belongs to granularity 'per_group' and to no other: got {group_size} with {granularity!r}."
        )
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"`group_size` must be an integer >= 1, got {group_size!r}.")


def _check_class(cls: type[Quantizer]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Quantizer)):
        raise TypeError(f"a quantizer must be a subclass of qsam.Quantizer, got {cls!r}.")
    missing = [name for name in ("init_", "forward") if getattr(cls, name) is getattr(Quantizer, name)]
    if missing:
        raise TypeError(f"the quantizer {cls.__qualname__} does not implement {' and '.join(missing)}.")


QUANTIZERS: Registry[Quantizer] = Registry("quantizer", check=_check_class, entry_points="qsam.quantizers")
"""All quantizers by name; other packages add theirs through the entry-point group ``qsam.quantizers``."""


def register_quantizer(name: str) -> Callable[[type[Quantizer]], type[Quantizer]]:
    """Return a decorator that registers a :class:`Quantizer` subclass as ``name``.

    Raises:
        TypeError: the class is no Quantizer, or lacks ``init_`` or ``forward``.
        ValueError: the name is taken.
    """
    return QUANTIZERS.register(name)


def list_quantizers() -> list[str]:
    """Return the names of all quantizers, those of installed packages included.

    Example:
        >>> import qsam
        >>> "lsq" in qsam.list_quantizers()
        True
    """
    return list(QUANTIZERS)
