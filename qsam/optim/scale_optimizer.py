r"""The optimizer of the scales, and its learning rates: in balance with the weights', or as given.

``scale_lr=None`` balances the rates by one rule: **the relative step of a scale equals the relative step of the
weights**.

A base optimizer of Adam's kind moves each weight by about ``lr`` per step, so the weights move by ``lr / rms(w)`` of
their size. The scales then take relative steps of that length along their normalized gradient::

    s <- s - s * clip(r * ds / sqrt(v), -c, c),    r = lr / rms(w),    v = an average of ds^2,    c = .01

``torch.optim.SGD`` moves w by ``lr * ||g|| / ||w||`` of its size, and LSQ's gradient scale makes ``|ds| / s`` about
``||g|| / ||w||``. Beside SGD the scales therefore take plain gradient steps with the weights' ``lr / (1 - momentum)``,
clipped at the same c. (Without the clip, 200 steps of a small network at lr .05 and momentum .9 moved single scales by
more than a thousand times their size.)

A balanced rate is computed before each step of the scales::

    r = balance * mean(lr)

``mean(lr)`` is the mean over the quantized weights of the present ``lr`` in the base's groups. ``balance`` is
``1 / rms(w)`` beside Adam and 1 beside SGD; it is computed when the optimizer is built and kept in the scales' groups
as ``qsam_balance``. So the scales follow the base through every scheduler, and a value written into ``lr`` of a
balanced group is replaced. Weights that are all zero have no rms yet: see :func:`follow_base_`.

A fixed rate does not work: plain SGD with ``lr=1e-2`` beside Adam at 2e-5 leaves all scales where they began.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from qsam.coverage import Coverage
from qsam.distributed import local, whole
from qsam.latents import Slot
from qsam.quantizers import Quantizer

MAX_RELATIVE_STEP = 1e-2
"""c: no balanced step is longer than this share of the scale."""

_DECAY = 0.999
"""b, the decay of the average of ds^2: Adam's default."""

ScaleRate = float | tuple[float, float] | None
Group = dict[str, Any]


@dataclasses.dataclass(eq=False, frozen=True)
class ScaleSlot:
    """One trainable parameter of a quantizer, at the path "encoder.layer.0.query.weight_quantizer.scale"."""

    path: str
    quantizer: Quantizer
    attr: str

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter, as it is now."""
        return getattr(self.quantizer, self.attr)  # type: ignore[no-any-return]


def scale_slots(coverage: Coverage | None) -> tuple[list[ScaleSlot], list[ScaleSlot]]:
    """Return the trainable parameters of all quantizers: of the weights', and of the inputs'."""
    if coverage is None:
        return [], []
    weights = [(row.name + "_quantizer", row.quantizer) for row in coverage.quantized]
    inputs = [(f"{row.name}.input_quantizer".lstrip("."), row.quantizer) for row in coverage.inputs]
    return _scale_slots(weights), _scale_slots(inputs)


def _scale_slots(named: Iterable[tuple[str, Quantizer | None]]) -> list[ScaleSlot]:
    return [
        ScaleSlot(f"{path}.{attr}", quantizer, attr)
        for path, quantizer in named
        if quantizer is not None
        for attr, _ in quantizer.named_parameters()
    ]


class BalancedSGD(Optimizer):
    r"""Gradient descent that moves no entry by more than 1 % of itself per step.

    Normalized, in units of the entry: ``s <- s * (1 - lr * ds / sqrt(v))``, with ``v <- b v + (1 - b) ds^2``,
    ``b = .999``, corrected for its start at 0: the step is about ``lr`` times the entry, whatever the scale of the
    loss. Not normalized: ``s <- s - lr * ds``. A positive entry stays positive either way.

    The state holds ``root = sqrt(v / (1 - b))``, not v: a square of 1e-22 is no longer an fp32 number, and ``root`` is
    at least ``|ds|``.

    Args:
        params: Positive parameters, or groups of them.
        lr: The relative step, or the rate of plain descent.
        normalized: Which of the two.

    Example:
        >>> s = torch.nn.Parameter(torch.tensor([2.0]))
        >>> s.grad = torch.tensor([1e-30])
        >>> BalancedSGD([s], lr=0.005).step()
        >>> round(s.item(), 5)
        1.99
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, *, normalized: bool = True) -> None:
        super().__init__(params, {"lr": lr, "normalized": normalized})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; files written before ``root`` was kept hold v as ``square``."""
        super().__setstate__(state)
        for entry in self.state.values():
            if "square" in entry:
                entry["root"] = (entry.pop("square") / (1 - _DECAY)).sqrt()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}
            for s in group["params"]:
                if s.grad is not None:
                    alike.setdefault((s.dtype, s.device), []).append(s)
            for scales in alike.values():
                self._move(group, scales)
        return loss

    def _move(self, group: Group, scales: list[Tensor]) -> None:
        """Step scales of one dtype and device as one vector, because hundreds of them may have one entry each."""
        values = [local(s) for s in scales]
        s, ds = _flat(values), _flat([local(scale.grad) for scale in scales if scale.grad is not None])
        if group["normalized"]:
            ds = self._normalized(scales, ds) * s
        limits = s.abs() * MAX_RELATIVE_STEP
        _scatter(s - torch.maximum(torch.minimum(ds * group["lr"], limits), -limits), values)

    def _normalized(self, scales: list[Tensor], ds: Tensor) -> Tensor:
        """Update v, and return ``ds / sqrt(v)``, corrected for the start at 0.

        Only numbers in [0, 1] are squared, and scaling by a power of two is exact, so the result does not depend on the
        unit of the loss.
        """
        states = [self.state[s] for s in scales]
        for scale, state in zip(scales, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["root"] = torch.zeros_like(scale)
            state["step"] += 1
        roots: list[Tensor] = [local(state["root"]) for state in states]
        root = _flat(roots)
        unit = torch.maximum(root, ds.abs()).clamp_min_(torch.finfo(ds.dtype).tiny)
        root = (_DECAY * (root / unit).square_() + (ds / unit).square_()).sqrt_() * unit
        _scatter(root, roots)
        steps = torch.stack([state["step"] for state in states]).tolist()
        starts = [math.sqrt((1 - _DECAY**step) / (1 - _DECAY)) for step in steps]
        ratio = ds / torch.where(root == 0, 1, root)
        if len(set(starts)) == 1:
            return ratio * starts[0]
        # Some scales had no gradient in some step.
        return _flat([part * start for part, start in zip(_parts(ratio, roots), starts, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split(flat, [t.numel() for t in like])


def _scatter(flat: Tensor, targets: Sequence[Tensor]) -> None:
    """Copy the parts of a vector into these tensors."""
    for part, target in zip(_parts(flat, targets), targets, strict=True):
        target.copy_(part.view(target.shape))


def build_scale_optimizer(
    weights: Sequence[ScaleSlot],
    inputs: Sequence[ScaleSlot],
    *,
    scale_lr: ScaleRate,
    scale_optimizer: type[Optimizer],
    base: Optimizer,
    slots: Sequence[Slot],
) -> Optimizer | None:
    """Return the optimizer of the scales, with one group for the weights' and one for the inputs', or None."""
    if not (isinstance(scale_optimizer, type) and issubclass(scale_optimizer, Optimizer)):
        raise TypeError(f"`scale_optimizer` must be a torch Optimizer class, got {scale_optimizer!r}.")
    rates = _checked_rates(scale_lr)
    if rates is None and scale_optimizer is not SGD:
        raise ValueError(
            f"scale_lr=None (balanced rates) goes with SGD; give `scale_lr` a number for {scale_optimizer.__name__}."
        )
    groups: list[Group] = [
        {"params": [slot.parameter for slot in found], "qsam_scales": kind}
        for kind, found in (("weights", weights), ("inputs", inputs))
        if found
    ]
    if not groups:
        return None
    if rates is None:
        optimizer: Optimizer = BalancedSGD(groups, lr=0.0, normalized=not isinstance(base, SGD))
        take_balance_(optimizer.param_groups, base, slots)
    else:
        for group in groups:
            group["lr"] = rates[group["qsam_scales"] == "inputs"]
        optimizer = scale_optimizer(groups)  # type: ignore[call-arg]
    for group in optimizer.param_groups:
        group["qsam_scale_class"] = type(optimizer).__name__
        # AdamW and its like decay by default; a decayed scale would shrink its grid.
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    return optimizer


def take_balance_(groups: Iterable[Group], base: Optimizer, slots: Sequence[Slot]) -> None:
    """Compute the balance and the rates of these groups of scales from the present weights.

    Example:
        >>> w = torch.nn.Parameter(torch.full((4, 4), 0.1))
        >>> slot = Slot("w", torch.nn.ParameterDict({"w": w}), "w", torch.nn.Parameter(w.detach().clone()))
        >>> group = {"normalized": True}
        >>> take_balance_([group], torch.optim.Adam([w], lr=2e-5), [slot])
        >>> round(group["qsam_balance"], 5), round(group["lr"], 9)
        (10.0, 0.0002)
    """
    owned = _owned(base, slots)
    started = any("initial_lr" in group for group, _ in owned)
    for group in groups:
        group.update(qsam_balance=_balance(base, owned), qsam_balance_due=0)
        group["lr"] = _rate(group, _mean_lr(base, owned))
        if started:  # a scheduler has noted the weights' initial rates, and reads this group's too
            group["initial_lr"] = _rate(group, _mean_lr(base, owned, "initial_lr"))


def restore_balance_(groups: Iterable[Group], base: Optimizer, slots: Sequence[Slot]) -> None:
    """Compute the balance of groups from a file that lacks it, as their rate over the weights' rate."""
    owned = _owned(base, slots)
    for group in groups:
        for key in ("lr", "initial_lr"):
            mean = _mean_lr(base, owned, key)
            if mean > 0 and group.get(key, 0) > 0:
                group.update(qsam_balance=group[key] / mean, qsam_balance_due=0)
                break
        else:
            group.update(qsam_balance=_balance(base, owned), qsam_balance_due=0)


def follow_base_(
    scale_base: Optimizer, groups: Iterable[Group], base: Optimizer, slots: Sequence[Slot], step: int
) -> None:
    """Give the scale optimizer the present rates: ``balance * mean(lr)`` if they are balanced, else the public ones.

    A balance of 0 is unknown, because the weights were all zero when the optimizer was built. It is computed as soon as
    they are not, and again after 1, 2, 4, 8, ... steps because they have only begun to grow. Public groups of scales
    have an entry ``qsam_scales``, the balanced ones ``qsam_balance``.
    """
    owned = _owned(base, slots)
    public = [group for group in groups if "qsam_scales" in group]
    for own, group in zip(scale_base.param_groups, public, strict=True):
        if "qsam_balance" in group:
            if not group["qsam_balance"] or 0 < group["qsam_balance_due"] <= step:
                group.update(qsam_balance=_balance(base, owned), qsam_balance_due=max(1, 2 * step))
            group["lr"] = _rate(group, _mean_lr(base, owned))
        own["lr"], own["params"] = group["lr"], group["params"]


Owned = list[tuple[Group, list[Slot]]]
"""The base's groups, each with the quantized weights in it."""


def _owned(base: Optimizer, slots: Sequence[Slot]) -> Owned:
    found = {id(tensor): slot for slot in slots for tensor in (slot.parameter, slot.latent)}
    return [(group, [found[id(p)] for p in group["params"] if id(p) in found]) for group in base.param_groups]


def _rate(group: Group, mean: float) -> float:
    rate: float = group["qsam_balance"] * mean
    return min(rate, MAX_RELATIVE_STEP) if group["normalized"] else rate


def _mean_lr(base: Optimizer, owned: Owned, key: str = "lr") -> float:
    """Return the mean rate of the quantized weights' entries: quadratic, or of ``lr / (1 - momentum)`` for SGD."""
    plain = isinstance(base, SGD)
    total, count = 0.0, 0
    for group, slots in owned:
        entries, lr = sum(slot.latent.numel() for slot in slots), _learning_rate(group, key)
        total += (lr / (1 - float(group.get("momentum") or 0.0)) if plain else lr**2) * entries
        count += entries
    mean = total / max(count, 1)
    return mean if plain else math.sqrt(mean)


def _balance(base: Optimizer, owned: Owned) -> float:
    """Return 1 / rms(w), or 1 for SGD; 0 if the weights are all zero or not finite."""
    if isinstance(base, SGD):
        return 1.0
    slots = [slot for _, members in owned for slot in members]
    square = sum(_square_sum(whole(slot.latent.detach())) for slot in slots)
    return (sum(slot.latent.numel() for slot in slots) / square) ** 0.5 if 0 < square < math.inf else 0.0


def _square_sum(w: Tensor) -> float:
    """Return ||w||^2, computed from numbers in [-1, 1], because the square of 1e-22 underflows in fp32."""
    largest = float(torch.linalg.vector_norm(w, math.inf)) if w.numel() else 0.0
    exponent = min(max(math.frexp(largest)[1], -126), 126)
    return float((w * 2.0**-exponent).square_().sum()) * 4.0**exponent


def _learning_rate(group: Mapping[str, Any], key: str) -> float:
    """Return the group's rate; 1e-3, Adam's default, if the optimizer sets its rate itself (None, or no entry)."""
    lr = group.get(key, group.get("lr"))
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
