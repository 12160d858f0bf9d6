"""Initial scales: rules that compute one step size per row from data.

Each rule maps rows ``(R, n)`` to scales ``(R,)``, in units of the row's largest magnitude, so that rows of 1e-30 and of
1e+30 are treated alike. A row of zeros has no scale and gets 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qsam.functional import SCALE_FLOOR
from qsam.registry import nearest

_SEARCH_ENTRIES = 2**18
"""Entries of one row that the MSE search uses; a longer row is sampled."""


def initial_scale(rows: Tensor, quant_min: float, quant_max: float, init: str) -> Tensor:
    """Return the initial step size of each row.

    Args:
        rows: Shape ``(R, n)``, any floating dtype; each row shares one scale.
        quant_min: Qn, the lowest level in units of the step.
        quant_max: Qp, the highest. The levels are one step apart: whole numbers, or all shifted by 1/2.
        init: ``"mse"`` (least squared error), ``"lsq"`` (``2 * mean|x| / sqrt(Qp)``, the LSQ paper's), ``"absmax"``
            (``max|x| / Qp``) or ``"percentile"`` (99.9 % of ``|x|``, over Qp).

    Returns:
        Shape ``(R,)``, fp32, finite; positive, but 0 for a row of zeros, which has no scale yet.

    Raises:
        ValueError: The rule is unknown, or the data is not finite.

    Example:
        >>> initial_scale(torch.tensor([[-7.0, 3.5, 0.0]]), -8, 7, "absmax")
        tensor([1.])
    """
    if init not in INIT_RULES:
        raise ValueError(
            f"`init` must be one of {', '.join(INIT_RULES)}, got {init!r}.{nearest(str(init), list(INIT_RULES))}"
        )
    rows = rows.detach().to(torch.float64)  # in which 1e-45 is still a normal number
    largest = rows.abs().amax(dim=1, keepdim=True) if rows.numel() else rows.new_zeros(rows.shape[0], 1)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("the scale cannot be set from data that holds NaN or infinity.")
    empty = largest == 0
    unit = (rows / largest.masked_fill(empty, 1)).to(torch.float32)
    scale = INIT_RULES[init](unit, quant_min, quant_max).to(torch.float64) * largest.squeeze(1)
    scale = scale.clamp(SCALE_FLOOR, torch.finfo(torch.float32).max)
    return scale.masked_fill(empty.squeeze(1), 0.0).to(torch.float32)


def _lsq(rows: Tensor, quant_min: float, quant_max: float) -> Tensor:
    return 2 * rows.abs().mean(dim=1) / math.sqrt(quant_max)


def _absmax(rows: Tensor, quant_min: float, quant_max: float) -> Tensor:
    return rows.abs().amax(dim=1) / quant_max if rows.numel() else rows.new_ones(rows.shape[0])


def _percentile(rows: Tensor, quant_min: float, quant_max: float) -> Tensor:
    if not rows.numel():
        return rows.new_ones(rows.shape[0])
    rank = max(1, round(0.999 * rows.shape[1]))
    value = rows.abs().kthvalue(rank, dim=1).values
    return torch.where(value > 0, value, 1.0) / quant_max


def _mse(rows: Tensor, quant_min: float, quant_max: float) -> Tensor:
    """Search 24 log-spaced steps, then 48 between the neighbours of the best, then alternate as Lloyd's algorithm does.

    Its two halves, "round" and "best step for these codes", are least-squares solutions, and neither raises the error.
    """
    rows = _sampled(rows)
    offset = quant_min % 1  # 1/2 if the levels are shifted by 1/2

    def codes(step: Tensor) -> Tensor:
        return torch.round((rows / step).clamp(quant_min, quant_max) - offset) + offset

    def better(best: Tensor, least: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        found = (codes(step) * step - rows).square().sum(dim=1, keepdim=True)
        return torch.where(found < least, step, best), torch.minimum(found, least)

    one = rows.new_ones(rows.shape[0], 1)
    best, least = better(one, one * torch.inf, one / max(quant_max, -quant_min))
    coarse = [one * ratio / quant_max for ratio in torch.logspace(0, -2.5, 24, dtype=torch.float32).tolist()]
    for step in [*coarse, _lsq(rows, quant_min, quant_max).unsqueeze(1)]:
        best, least = better(best, least, step)
    centre = best
    for ratio in torch.logspace(-2.5 / 23, 2.5 / 23, 48, dtype=torch.float32).tolist():
        best, least = better(best, least, centre * ratio)
    for _ in range(8):
        q = codes(best)
        step = (q * rows).sum(1, keepdim=True) / q.square().sum(1, keepdim=True)
        best = torch.where(torch.isfinite(step) & (step > 0), step, best)
    return best.squeeze(1)


def _sampled(rows: Tensor) -> Tensor:
    """Return at most _SEARCH_ENTRIES columns, drawn with a fixed seed; a stride would hit few channels of a matrix."""
    if rows.shape[1] <= _SEARCH_ENTRIES:
        return rows
    chosen = torch.randint(rows.shape[1], (_SEARCH_ENTRIES,), generator=torch.Generator().manual_seed(0))
    return rows[:, chosen.to(rows.device)]


INIT_RULES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "mse": _mse,
    "lsq": _lsq,
    "absmax": _absmax,
    "percentile": _percentile,
}
