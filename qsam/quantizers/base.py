"""The base class of all quantizers, which is the extension interface.

A quantizer maps a tensor x to Q(x), differentiably. Training learns its Parameters (such as a step size); its buffers
are state that moves once per optimizer step. The optimizer computes dw and the gradients of the Parameters by autograd
of ``forward``, so a quantizer does not depend on the training loop.

Q depends on tensors only, so that copying the tensors of a model (``load_state_dict``, an average, a target network, a
checkpoint) copies the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qsam.functional import Axis, Grid, integer_limits, wide_dtype
from qsam.registry import Registry

GRANULARITIES = ("per_tensor", "per_channel", "per_group")

LIMITS = "limits"
"""Name of the buffer that says whether a quantizer has been set from data, and with which sign."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """The setting of one quantizer.

    Attributes:
        bits: Width of the integers, in [2, 8].
        signed: Whether the grid holds negative values. None, for activations only: the data decide it.
        granularity: How many entries share one set of parameters: ``"per_tensor"``, ``"per_channel"``,
            ``"per_group"``.
        axis: The channel dimension of a weight, or a tuple of several; None for an activation.
        group_size: Entries per group, for ``"per_group"``; None otherwise.

    Raises:
        TypeError: ``bits`` or ``axis`` is not an integer, or ``signed`` is not a bool.
        ValueError: The bits are out of range, the granularity is unknown, or the values contradict each other.

    Example:
        >>> Spec(bits=4, granularity="per_channel", axis=0).limits
        (-8, 7)
    """

    bits: int
    signed: bool | None = True
    granularity: str = "per_tensor"
    axis: Axis | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        integer_limits(self.bits, bool(self.signed))
        _check_kinds(self.signed, self.axis)
        _check_granularity(self.granularity, self.axis, self.group_size)

    @property
    def limits(self) -> tuple[int, int]:
        """The integer limits ``(Qn, Qp)``; those of a signed grid if the sign is unknown."""
        return integer_limits(self.bits, self.signed is not False)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _read_while_tracing(limits: Tensor, guard: bool | None) -> tuple[float, float]:
    """Return the two limits while a graph is traced; the graph is traced again when ``guard`` changes."""
    low, high = limits.tolist()
    return low, high


class Quantizer(nn.Module):
    """Base class of all quantizers.

    A subclass implements :meth:`init_` and :meth:`forward`; it may add :meth:`step_size`, :meth:`codes`,
    :meth:`update`, :attr:`rowwise` and :meth:`gradient_scale`. ``forward`` must be a pure function of its input, the
    Parameters, the buffers and a seed kept in them.

    Args:
        setting: The keywords of :class:`Spec`: ``bits``, ``signed``, ``granularity``, ``axis``, ``group_size``.

    Attributes:
        spec: The setting.
        limits: Buffer, fp32, shape ``(2,)``: the integer limits ``(Qn, Qp)`` once the parameters were set from data,
            ``(0, 0)`` before; ``(nan, nan)`` after loading a file that holds a scale but not its sign. They are floats
            so that averages can be read too: the grid is signed if ``limits[0] < 0``, and calibrated if
            ``limits[1] > limits[0]``; the integers themselves follow from ``bits``.
        init: The rule of the initial scale that ``quantize_`` was given; set before ``init_``.
        off_grid: Whether an optimizer has left something else than Q(w) in the weight.
        batch_first: Whether the samples of an activation with three or more dimensions lie along dimension 0 (True) or
            1 (False). None if no layer tells: dimension 0, also with two dimensions.
    """

    offset: float = 0.0
    """The shift of the codes, in steps: the levels of a uniform grid are ``(code + offset) * scale + shift``."""

    shift: Tensor | None = None
    """The shift of the levels, in units of the data, broadcastable as ``scale`` is; None for 0."""

    dynamic: bool = False
    """Whether each input has its own scale, which ``step_size(x)`` returns."""

    moves_grid: bool = False
    """Whether :meth:`update` changes Q, so that the optimizer writes the weights again."""

    init: str = "mse"
    off_grid: bool = False
    batch_first: bool | None = None
    limits: Tensor

    _seen: tuple[Any, tuple[float, float]] | None = None
    """A cache of ``limits`` on an accelerator, with the version that was read."""

    _was_calibrated: bool | None = None
    _was_signed: bool | None = None
    """The last values of ``calibrated`` and ``signed`` in eager code, by which compiled graphs are guarded."""

    _set_from: tuple[int, int] | None = None
    """A digest of the weight from which the parameters were last set, so that the search need not be repeated."""

    def __init__(self, **setting: Any) -> None:
        super().__init__()
        self.spec = Spec(**setting)
        self.register_buffer("limits", torch.zeros(2, dtype=torch.float32))

    # --- what a subclass implements -----------------------------------------------------------------------------

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
        """Return the distance between neighbouring levels, broadcastable against ``x``; None without a uniform grid."""
        return None

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``: int8 (uint8 if unsigned), of its shape, so that ``codes * step_size`` is Q(x).

        Raises:
            TypeError: The quantizer has no uniform grid.
        """
        step = self.step_size(x)
        if step is None:
            raise TypeError(
                f"{type(self).__name__} has no integer codes: it has no uniform grid. A quantizer has codes if it "
                "implements `step_size(x)`, the distance of neighbouring grid values, or `codes(x)`."
            )
        wide = wide_dtype(x.dtype)
        codes = torch.round(self(x).to(wide) / step.to(wide)).clamp(self.quant_min, self.quant_max)
        return codes.to(self.code_dtype)

    def update(self, w: Tensor) -> None:
        """Move state (ranges, counters) by one optimizer step; called once per step with the latent weight."""

    @property
    def rowwise(self) -> bool:
        """Whether ``Q(w[rows]) = Q(w)[rows]``, so that sharded weights need not be gathered.

        An entry may then depend only on itself, on Parameters of one entry, and on its own row (dimension 0) of
        Parameters that have one row per row of the weight.
        """
        return False

    def gradient_scale(self, count: int) -> float:
        """Return the factor of a Parameter's gradient if ``count`` entries share one entry of the Parameter."""
        return 1.0

    def grid(self, x: Tensor) -> Grid | None:
        """Return the grid if Q is LSQ's, so that fused kernels may compute it; None: autograd of ``forward``."""
        return None

    # --- the setting --------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Width of the integers."""
        return self.spec.bits

    @property
    def granularity(self) -> str:
        """Which entries share one set of parameters."""
        return self.spec.granularity

    @property
    def axis(self) -> Axis | None:
        """The channel dimension of a weight, or a tuple of several; None for an activation."""
        return self.spec.axis

    @property
    def group_size(self) -> int | None:
        """Entries per group, or None."""
        return self.spec.group_size

    @property
    def signed(self) -> bool | None:
        """Whether the grid holds negative values; None until data decide it."""
        if self.spec.axis is not None and self.spec.signed is not None:
            return self.spec.signed
        low, high = self._numbers(self._was_signed)
        return low < 0 if high > low else self.spec.signed

    @property
    def calibrated(self) -> bool:
        """Whether the parameters have been set from data, or loaded."""
        low, high = self._numbers(self._was_calibrated)
        return high > low

    def observations(self) -> Tensor | None:
        """Return what ``forward`` has seen of an input since the last step, of which all processes take the largest."""
        return None

    def take_observations(self) -> None:
        """Move the state of an input's quantizer after the forwards of a step; called once per optimizer step."""

    @property
    def stops(self) -> tuple[float, float]:
        """The bounds of ``(x - shift) / scale`` between which the gradient of x passes, by default the outer levels."""
        return self.quant_min + self.offset, self.quant_max + self.offset

    @property
    def quant_min(self) -> int:
        """Lowest integer of the grid."""
        return integer_limits(self.bits, self.signed is not False)[0]

    @property
    def quant_max(self) -> int:
        """Highest integer of the grid."""
        return integer_limits(self.bits, self.signed is not False)[1]

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds the integers of the grid."""
        return torch.uint8 if self.signed is False else torch.int8

    # --- being set from data ------------------------------------------------------------------------------------

    def readable_limits(self) -> tuple[float, float] | None:
        """Return ``limits`` as two numbers; None if :meth:`forward` has to compute with the tensor.

        That is so in a graph being compiled, under vmap, and on an accelerator if other code has written the buffer
        since it was read, because reading it again would wait for the device.
        """
        limits = self.limits
        if torch.compiler.is_compiling() or type(limits) is not Tensor:
            return None
        try:
            if limits.device.type == "cpu":
                low, high = limits.tolist()
                return low, high
            key = (id(limits), None if limits.is_inference() else limits._version, limits.data_ptr())
            if self._seen is None or not self._seen[1][1] > self._seen[1][0]:
                low, high = limits.tolist()
                self._seen = key, (low, high)
            return self._seen[1] if self._seen[0] == key else None
        except RuntimeError:  # a tensor without values: under vmap, on the meta device
            return None

    def _numbers(self, guard: bool | None) -> tuple[float, float]:
        if torch.compiler.is_exporting():  # a fake tensor has no values
            return integer_limits(self.bits, self._was_signed is not False) if self._was_calibrated else (0, 0)
        if torch.compiler.is_compiling():
            return _read_while_tracing(self.limits, guard)  # type: ignore[no-any-return]
        low, high = self.readable_limits() or self.limits.tolist()
        return low, high

    @torch.no_grad()
    def observe_(self, x: Tensor, signed: bool | None = None) -> None:
        """Set the sign if it is unknown, then call :meth:`init_`; calibration and the first batch call this.

        Args:
            x: Data of the tensor that will be quantized.
            signed: The sign; None: the one that was given or decided before, else that of the data.
        """
        before = self.limits.clone()
        signed = self.signed if signed is None else signed
        self.set_sign_(bool((x < 0).any()) if signed is None else signed)
        try:
            self.init_(x)
        except BaseException:
            self.limits.copy_(before)
            self._refresh()
            raise

    @torch.no_grad()
    def set_sign_(self, signed: bool | None) -> None:
        """Count as calibrated with this sign; None: as not calibrated."""
        low, high = (0, 0) if signed is None else integer_limits(self.bits, signed)
        self.limits[0].fill_(low)
        self.limits[1].fill_(high)
        self._refresh()

    @torch.no_grad()
    def init_weight_(self, w: Tensor) -> None:
        """Call :meth:`init_`, unless the parameters were last set from the same values."""
        digest = _digest(w)
        if digest != self._set_from:
            self.init_(w)
            self._set_from = digest

    @torch.no_grad()
    def set_from_weight_(self, w: Tensor) -> None:
        """Set the parameters from a weight, unless a checkpoint or a step has set them.

        From a weight of zeros they cannot be set; :meth:`complete_` does it once the weight differs from 0.
        """
        if not self.calibrated:
            self.init_weight_(w)
            if bool(w.any()):
                self.set_sign_(self.signed is not False)

    @torch.no_grad()
    def complete_(self, w: Tensor) -> bool:
        """Set the parameters once a weight of zeros differs from 0; return whether all are set.

        Args:
            w: The latent weight, after a step.
        """
        if not self.calibrated and bool(w.any()):
            self.observe_(w)
        return self.calibrated

    def _refresh(self) -> None:
        """Drop the cached values of ``limits``, which were written."""
        self._seen = None
        limits = self.readable_limits()
        self._was_calibrated = self._was_signed = None
        if limits is not None:
            self.note_limits(limits)

    def note_limits(self, limits: tuple[float, float]) -> None:
        """Note the values of ``limits``; a compiled graph is traced again if they changed."""
        calibrated, signed = limits[1] > limits[0], limits[0] < 0
        if self._was_calibrated is not calibrated or self._was_signed is not signed:
            self._was_calibrated, self._was_signed = calibrated, signed

    # --- a module -----------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, without the cache of the original's buffers."""
        super().__setstate__({**state, "_seen": None})  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move the tensors to another device, but keep fp32 through ``.half()``, ``.bfloat16()`` and ``.to(dtype)``."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._seen = None
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        """Load; the scales of an old file without ``limits`` count as calibrated."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *lists)
        key = prefix + LIMITS
        if key not in state_dict:
            if key in missing_keys:
                missing_keys.remove(key)
            values = [value for name, value in state_dict.items() if name.startswith(prefix)]
            if values:
                self._take_old_file([value for value in values if value.is_floating_point()])
        self._set_from = None
        self._refresh()

    @torch.no_grad()
    def _take_old_file(self, values: list[Tensor]) -> None:
        signed = self.signed
        if _is_placeholder(self.spec, values):
            self.set_sign_(None)
        elif signed is None:
            self.limits.fill_(torch.nan)  # until an optimizer's state_dict or calibrate sets the sign
        else:
            self.set_sign_(signed)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        sign = {True: "signed", False: "unsigned", None: "sign open"}[self.signed]
        return f"bits={self.bits}, {sign}, {self.granularity}" + (f" of {self.group_size}" if self.group_size else "")


def _digest(w: Tensor) -> tuple[int, int]:
    """Return two sums over the bits of a weight, one of which depends on their order."""
    words = w.detach().to(torch.float32).flatten().view(torch.int32).to(torch.int64)
    order = torch.arange(1, words.numel() + 1, device=words.device)
    first, second = torch.stack([words.sum(), (words * order).sum()]).tolist()
    return first, second


def _is_placeholder(spec: Spec, values: list[Tensor]) -> bool:
    """Whether an old file holds 1.0, the scale of an input that had seen no batch; no learned scale is exactly 1.0."""
    if spec.axis is not None or len(values) != 1 or values[0].numel() != 1 or hasattr(values[0], "device_mesh"):
        return False
    return bool(values[0] == 1)


def _check_kinds(signed: Any, axis: Any) -> None:
    if not (signed is None or isinstance(signed, bool)):
        raise TypeError(f"`signed` must be True, False or None, got {signed!r}.")
    axes = axis if isinstance(axis, tuple) and axis else (axis,)
    if axis is not None and not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
        raise TypeError(f"`axis` must be an integer, the channel dimension, a tuple of several, or None, got {axis!r}.")


def _check_granularity(granularity: str, axis: Axis | None, group_size: int | None) -> None:
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
        TypeError: The class is not a Quantizer, or lacks ``init_`` or ``forward``.
        ValueError: The name is taken.
    """
    return QUANTIZERS.register(name)


def build_quantizer(name: str, **setting: Any) -> Quantizer:
    """Return a new quantizer of a registered name; ``setting`` as :class:`Spec`.

    Raises:
        ValueError: The name is unknown, or the quantizer refuses the setting.
    """
    cls, own = QUANTIZERS.get(name), QUANTIZERS.options(name)
    if "granularity" in own and setting.get("granularity") == "per_group":
        raise ValueError(
            f"the quantizer {name!r} has granularity {own['granularity']!r}: use {QUANTIZERS.name_of(cls)!r} for "
            "granularity 'per_group'."
        )
    return cls(**{**setting, **own})


def list_quantizers() -> list[str]:
    """Return the names of all quantizers, including those of installed packages.

    Example:
        >>> import qsam
        >>> "lsq" in qsam.list_quantizers()
        True
    """
    return list(QUANTIZERS)
