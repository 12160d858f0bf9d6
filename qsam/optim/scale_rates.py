r"""The scales' learning rates: in balance with the weights', or as given.

``scale_lr=None`` picks rates by one rule: **the relative step of a scale equals the relative step of the weights**.

A base optimizer of Adam's kind moves each weight by about ``lr`` a step, so the weights move by ``lr / rms(w)`` of
their size. The scales then take relative steps of that length along their normalized gradient::

    s <- s - s * clip(r * ds / sqrt(v), -c, c),    r = lr / rms(w),    v = an average of ds^2,    c = .01

``torch.optim.SGD`` moves w by ``lr * ||g|| / ||w||`` of its size, and LSQ's gradient scale makes ``|ds| / s`` about
``||g|| / ||w||``: there the scales take plain gradient steps with the weights' own ``lr / (1 - momentum)``, cut at
the same c. (Without the cut, 200 steps of a small network at lr .05 and momentum .9 moved single scales by more than
a thousand times their size.)

A fixed rate does not do: plain SGD with ``lr=1e-2`` beside Adam at 2e-5 leaves all scales where they began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from qsam.shards import local, whole
from qsam.slots import ScaleSlot, Slot

MAX_RELATIVE_STEP = 1e-2
"""c: no balanced step is longer than this share of the scale, whatever the base's learning rate means."""

_AVERAGE = 0.999
"""Decay of the average of ds^2: Adam's default."""

ScaleRate = float | tuple[float, float] | None


class BalancedSGD(Optimizer):
    r"""Gradient descent that moves no entry by more than 1 % of itself in a step.

    Normalized, in units of the entry: ``s <- s * (1 - lr * ds / sqrt(v))``, with ``v <- b v + (1 - b) ds^2``,
    ``b = .999``, corrected for its start at 0: one entry's step is about ``lr`` of the entry, whatever the scale of
    the loss. Not normalized: ``s <- s - lr * ds``. A positive entry stays positive either way.

    Args:
        params: Positive parameters, or groups of them.
        lr: The relative step, or the rate of plain descent.
        normalized: Which of the two.

    Example:
        >>> s = torch.nn.Parameter(torch.tensor([2.0]))
        >>> s.grad = torch.tensor([123.0])
        >>> BalancedSGD([s], lr=0.005).step()
        >>> round(s.item(), 5)
        1.99
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, *, normalized: bool = True) -> None:
        super().__init__(params, {"lr": lr, "normalized": normalized})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for alike in _alike([s for s in group["params"] if s.grad is not None]):
                self._move(group, alike)
        return loss

    def _move(self, group: dict[str, Any], scales: list[Tensor]) -> None:
        """Step scales of one dtype and device, as one vector: there may be hundreds, of one entry each."""
        values = [local(s) for s in scales]
        s, ds = _flat(values), _flat([local(scale.grad) for scale in scales if scale.grad is not None])
        if group["normalized"]:
            ds = self._normalized(scales, ds) * s
        limits = s.abs() * MAX_RELATIVE_STEP
        moves = torch.maximum(torch.minimum(ds * group["lr"], limits), -limits)
        torch._foreach_sub_(values, _parts(moves, values))

    def _normalized(self, scales: list[Tensor], ds: Tensor) -> Tensor:
        """Return ``ds / sqrt(v)``, after moving v."""
        states = [self.state[s] for s in scales]
        for scale, state in zip(scales, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["square"] = torch.zeros_like(scale)
        torch._foreach_add_([state["step"] for state in states], 1)
        squares: list[Tensor] = [local(state["square"]) for state in states]
        v = _flat(squares).lerp_(ds * ds, 1 - _AVERAGE)
        torch._foreach_copy_(squares, _parts(v, squares))
        starts = [1 - _AVERAGE**step for step in torch.stack([state["step"] for state in states]).tolist()]
        if len(set(starts)) == 1:
            v = v / starts[0]
        else:  # some were without a gradient in some step
            v = torch.cat([part.flatten() / start for part, start in zip(_parts(v, squares), starts, strict=True)])
        return ds / v.sqrt_().clamp_min_(torch.finfo(v.dtype).tiny)


def _alike(scales: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Return the scales by dtype and device."""
    found: dict[Any, list[Tensor]] = {}
    for s in scales:
        found.setdefault((s.dtype, s.device), []).append(s)
    return found.values()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all entries in one new vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a vector in the shapes of ``like``."""
    parts = torch.split(flat, [t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


def build_scale_optimizer(
    weights: Sequence[ScaleSlot],
    inputs: Sequence[ScaleSlot],
    *,
    scale_lr: ScaleRate,
    scale_optimizer: type[Optimizer],
    base: Optimizer,
    slots: Sequence[Slot],
) -> Optimizer | None:
    """Return the optimizer of the scales, with one group for the weights' and one for the inputs', or None.

    Args:
        weights: The parameters of the weights' quantizers.
        inputs: The parameters of the inputs' quantizers.
        scale_lr: The rate of plain gradient descent on s (one number, or one each for weights and inputs), or None.
        scale_optimizer: An optimizer class; SGD without momentum by default.
        base: The weights' optimizer, its groups holding the model's Parameters.
        slots: The quantized weights.

    Raises:
        TypeError: a rate or an optimizer of the wrong kind.
        ValueError: a negative or non-finite rate; None with an optimizer that has its own idea of a step.
    """
    if not (isinstance(scale_optimizer, type) and issubclass(scale_optimizer, Optimizer)):
        raise TypeError(f"`scale_optimizer` must be a torch Optimizer class, got {scale_optimizer!r}.")
    rates = _checked_rates(scale_lr)
    if rates is None and scale_optimizer is not SGD:
        raise ValueError(
            f"scale_lr=None (balanced rates) goes with SGD; give `scale_lr` a number for {scale_optimizer.__name__}."
        )
    extra: dict[str, Any] = {}
    if rates is None:
        scale_optimizer = BalancedSGD
        extra["normalized"], rate = balanced_rate(base, slots)
        rates = (rate, rate)
    groups = [
        {"params": [slot.parameter for slot in found], "lr": rate, "qsam_scales": kind}
        for kind, found, rate in (("weights", weights, rates[0]), ("inputs", inputs, rates[1]))
        if found
    ]
    if not groups:
        return None
    optimizer = scale_optimizer(groups, **extra)
    for group in optimizer.param_groups:
        # AdamW and its like decay by default; a decayed scale would shrink its grid.
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    return optimizer


def balanced_rate(base: Optimizer, slots: Sequence[Slot]) -> tuple[bool, float]:
    """Return whether to normalize, and the rate at which scales keep pace with the weights; see the module's text.

    Example:
        >>> w = torch.nn.Parameter(torch.full((4, 4), 0.1))
        >>> slot = Slot("w", torch.nn.ParameterDict({"w": w}), "w", torch.nn.Parameter(w.detach().clone()))
        >>> normalized, rate = balanced_rate(torch.optim.Adam([w], lr=2e-5), [slot])
        >>> normalized, round(rate, 9)
        (True, 0.0002)
    """
    by_parameter = {id(slot.parameter): slot for slot in slots}
    step_square, weight_square, lr_sum, count = 0.0, 0.0, 0.0, 0
    for group in base.param_groups:
        found = [by_parameter[id(p)] for p in group["params"] if id(p) in by_parameter]
        lr, entries = _learning_rate(group), sum(slot.latent.numel() for slot in found)
        step_square += lr**2 * entries
        lr_sum += lr / (1 - float(group.get("momentum") or 0.0)) * entries
        weight_square += sum(float(whole(slot.latent.detach()).square().sum()) for slot in found)
        count += entries
    if isinstance(base, SGD):
        return False, lr_sum / max(count, 1)
    if weight_square == 0:  # any step of weights that are 0 is infinitely long beside them
        return True, MAX_RELATIVE_STEP if step_square > 0 else 0.0
    relative = (step_square / weight_square) ** 0.5
    return True, min(relative, MAX_RELATIVE_STEP)


def _learning_rate(group: dict[str, Any]) -> float:
    """Return the group's rate. One that sets its rate by itself (None, or no such entry) counts as 1e-3, Adam's own."""
    lr = group.get("lr")
    return 1e-3 if lr is None else float(lr)


def _checked_rates(scale_lr: ScaleRate) -> tuple[float, float] | None:
    if scale_lr is None:
        return None
    pair = tuple(scale_lr) if isinstance(scale_lr, tuple | list) else (scale_lr, scale_lr)
    if len(pair) != 2 or any(isinstance(r, bool) or not isinstance(r, int | float) for r in pair):
        raise TypeError(f"`scale_lr` must be None, a number or a pair (weights, activations), got {scale_lr!r}.")
    if not all(0 <= r < float("inf") for r in pair):
        raise ValueError(f"`scale_lr` must be finite and >= 0, got {scale_lr!r}.")
    return float(pair[0]), float(pair[1])
