"""SQuAT: weights and scales take turns; the weights on the perturbed loss, the scales on the plain one.

    min_{w,s} max_{||e|| <= rho} L(Q(w, s) + e)

Algorithm 1, one iteration, and the phases that do it:

    first_pass     g_Q = dL/dQ at Q(w, s);   e = rho * g_Q / ||g_Q||
    perturbed      h = dL/dQ at Q(w, s) + e
    update         w steps with M(w) * h
    scale_phase    ds at Q(w', s), unperturbed
    step_scales    s steps
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qsam.optim.groups import Base
from qsam.optim.optimizer import QuantizedOptimizer, register_optimizer

SCHEDULES = ("same_batch", "next_batch", "fused")


@register_optimizer("squat")
class SQuAT(QuantizedOptimizer):
    """Sharpness- and quantization-aware training.

    Args:
        model: As :class:`~qsam.optim.optimizer.QuantizedOptimizer`, as are all ``options``.
        base: As there.
        schedule: ``"same_batch"``: three passes per step, the third for the scales. ``"next_batch"``: the scales step
            on a batch of their own, 2 passes then 1. ``"fused"``: the first pass serves the scales too, which step
            before the perturbed pass: 2 passes.
        period: The scales step once per this many steps of the weights. An integer >= 1.
        options: As there.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = SQuAT(model, torch.optim.AdamW, lr=1e-3, rho=0.1)
        >>> optimizer.phases()
        ('first_pass', 'perturbed', 'update', 'scale_phase', 'step_scales')
        >>> x = torch.randn(16, 4)
        >>> calls = []
        >>> def closure():
        ...     calls.append(1)
        ...     optimizer.zero_grad()
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> len(calls)
        3

    References:
        Wang et al., SQuAT, arXiv 2210.07171, Algorithm 1.

    Differs from the paper: the scales descend (Algorithm 1 prints an ascent) at a rate of their own (it prints one
    rate for both); dw carries LSQ's mask (Eq 7 has none; ``ste="identity"``). ``"fused"`` is ours.
    """

    alternates = True

    def __init__(
        self, model: nn.Module, base: Base, *, schedule: str = "same_batch", period: int = 1, **options: Any
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
        if isinstance(period, bool) or not isinstance(period, int):
            raise TypeError(f"`period` must be an integer >= 1, got {period!r}.")
        if period < 1:
            raise ValueError(f"`period` must be an integer >= 1, got {period}.")
        self.schedule, self.period = schedule, period
        super().__init__(model, base, **options)
        # In a fused step the scales' turn comes before that of the weights.
        self._steps_since_scales = 1 if schedule == "fused" else 0

    def _check_own_options(self) -> None:
        assert self.perturbation is not None
        if self.schedule == "fused" and self.perturbation.direction.passes == 1:
            raise ValueError(
                "schedule='fused' takes the scales' gradient from the first pass, which a direction of one pass lacks."
            )

    def phases(self) -> tuple[str, ...]:
        """Return the passes and updates of the next step, in order."""
        if self.schedule == "next_batch" and self.scales_due:
            return "scale_phase", "step_scales"
        phases = super().phases()
        if self.schedule == "fused" and self.scales_due and phases == ("first_pass", "perturbed", "update"):
            return "first_pass", "step_scales", "perturbed", "update"
        if self.schedule == "same_batch" and "perturbed" in phases and self._steps_since_scales + 1 >= self.period:
            return *phases, "scale_phase", "step_scales"
        return phases

    @property
    def blocks(self) -> tuple[str, ...]:
        """See :attr:`~qsam.optim.optimizer.QuantizedOptimizer.blocks`."""
        return ("scale_phase",) if self.schedule != "fused" and self.scales_due else super().blocks

    @property
    def scales_due(self) -> bool:
        """Whether the scales have their turn; ``"fused"`` takes it between the passes, by :meth:`step_scales`."""
        return self._steps_since_scales >= self.period

    def _update(self) -> None:
        perturbed = self._gradients_of == "perturbed"
        super()._update()  # after a pass without perturbation w and s step together, as in QAT
        if perturbed:
            self._steps_since_scales += 1
            if self.schedule == "next_batch":
                self._first_seen.clear()

    def step_scales(self) -> None:
        """Step the scales with the gradients of :meth:`scale_phase`; of :meth:`first_pass`, if the schedule is fused.

        Raises:
            RuntimeError: There are no new gradients, or a block is open.
        """
        self._refuse_inside_block("step_scales")
        if not self._has_gradients():
            raise RuntimeError(
                "step_scales() found no gradient: run a backward inside `with optimizer.scale_phase():` before."
            )
        if self._gradients_of == "perturbed":
            raise RuntimeError(
                "step_scales() found the gradients of perturbed(), which are the weights': call step() first."
            )
        if self._gradients_of == "first_pass":
            self._step_scales_between_passes()
        else:
            self._apply_gradients(weights=False, scales=True)
        self._steps_since_scales = 0

    @torch.no_grad()
    def _step_scales_between_passes(self) -> None:
        """Step s from the first pass's gradients, and leave those of the weights for the perturbation."""
        if self.schedule != "fused":
            raise RuntimeError("step_scales() between the first and the perturbed pass is for schedule='fused'.")
        order = [scale.parameter for scale in self.scale_slots]
        try:
            self._step_scales(self.ranks.mean(self._pull_back(weights=False), order))
        except BaseException:
            self._clean_up()
            raise
        finally:
            self._latents.write()

    @property
    def _steps_since_scales(self) -> int:
        return int(self.param_groups[0]["qsam_phase"])

    @_steps_since_scales.setter
    def _steps_since_scales(self, value: int) -> None:
        self.param_groups[0]["qsam_phase"] = value
