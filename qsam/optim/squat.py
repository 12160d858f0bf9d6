"""SQuAT: weights and scales take turns; the weights on the perturbed loss, the scales on the plain one.

min_{w,s} max_{||e|| <= rho} L(Q(w, s) + e)
1  g_Q = dL/dQ at Q(w, s);   e = rho * g_Q / ||g_Q||
2  h = dL/dQ at Q(w, s) + e;   w steps with M(w) * h
3  ds at Q(w', s), unperturbed;   s steps
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qsam.optim.base import register_optimizer
from qsam.optim.groups import Base
from qsam.optim.two_pass import TwoPass
from qsam.optim.update import Closure

SCHEDULES = ("same_batch", "next_batch", "fused")


@register_optimizer("squat")
class SQuAT(TwoPass):
    """Sharpness- and quantization-aware training.

    Args:
        model: As :class:`~qsam.optim.two_pass.TwoPass`, as are all ``options``.
        base: As there.
        schedule: ``"same_batch"``: three passes a step, the third for the scales. ``"next_batch"``: the scales step on
            a batch of their own, 2 passes then 1. ``"fused"``: the first pass serves the scales too, which step
            before the perturbed pass: 2 passes.
        period: The scales step once in so many steps of the weights. An integer >= 1.
        options: As there.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = SQuAT(model, torch.optim.AdamW, lr=1e-3, rho=0.1)
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
        # Where it is fused, the scales' turn comes before the weights' in the same step.
        self._phase = 1 if schedule == "fused" else 0
        assert self.perturbation is not None
        if schedule == "fused" and self.perturbation.direction.passes == 1:
            self.latents_of.release()
            raise ValueError(
                "schedule='fused' takes the scales' gradient from the first pass, which a direction of one pass lacks."
            )

    @property
    def blocks(self) -> tuple[str, ...]:
        """See :attr:`~qsam.optim.passes.Passes.blocks`."""
        return ("scale_phase",) if self.schedule != "fused" and self.scales_due else super().blocks

    def _run(self, closure: Closure) -> Any:
        if self.schedule == "next_batch" and self.scales_due:
            self._losses.clear()
            with self.scale_phase():
                loss = self._spare(closure, self._needed_by_scales)
            self._note_loss("loss", loss)
            self.step_scales()
            return loss
        loss = self._make_passes(closure)
        alternates = self._perturbed
        self._finish_step()
        if self.schedule == "same_batch" and alternates and self.scales_due:
            with self.scale_phase():
                self._spare(closure, self._needed_by_scales)
            self.step_scales()
        return loss

    def _needed_by_scales(self) -> set[int]:
        """Return, by id, what the scales' gradients come from: they themselves, and the quantized weights."""
        weights = {id(slot.parameter) for slot in self.latents_of.slots}
        return weights | {id(scale.parameter) for scale in self.scale_slots}

    def _needed_first(self) -> set[int]:
        fused = self.schedule == "fused" and self.scales_due
        return super()._needed_first() | (self._needed_by_scales() if fused else set())

    def _between_passes(self) -> None:
        if self.schedule == "fused" and self._ascent_ready and self.scales_due:
            self.step_scales()

    def _finish_step(self) -> None:
        if not self._perturbed:  # a plain QAT step: w and s together
            super()._finish_step()
            return
        self._update(weights=True, scales=False)
        self._phase += 1
        if self.schedule == "next_batch":
            self._random_starts.clear()

    def step_scales(self) -> None:
        """Step the scales with the gradients of :meth:`scale_phase`; of :meth:`first_pass`, where it is fused.

        Raises:
            RuntimeError: without new gradients, or inside a block.
        """
        self._refuse_inside_block("step_scales")
        if not self._has_gradients():
            raise RuntimeError(
                "step_scales() found no gradient: run a backward inside `with optimizer.scale_phase():` before."
            )
        if self._perturbed:
            raise RuntimeError(
                "step_scales() found the gradients of perturbed(), which are the weights': call step() first."
            )
        if self._ascent_ready:
            self._step_scales_between_passes()
        else:
            self._update(weights=False, scales=True)
            self._passes_made = 0
        self._phase = 0

    def _step_scales_between_passes(self) -> None:
        """Step s from the first pass's gradients, and leave those of the weights for the perturbation."""
        if self.schedule != "fused":
            raise RuntimeError("step_scales() between the first and the perturbed pass is for schedule='fused'.")
        order = [scale.parameter for scale in self.scale_slots]
        try:
            self._step_scales(self.ranks.mean(self._pull_back(self.latents_of.scale_gradients), order))
        except BaseException:
            self._clean_up()
            raise
        finally:
            self.latents_of.write()

    def _check_alternates(self, verb: str) -> None:
        """Allow the scale phase."""

    @property
    def scales_due(self) -> bool:
        """Whether the scales have their turn; ``"fused"`` takes it between the passes, by :meth:`step_scales`."""
        return self._phase >= self.period

    @property
    def _phase(self) -> int:
        """Steps of the weights since the scales' last one."""
        return int(self.param_groups[0]["qsam_phase"])

    @_phase.setter
    def _phase(self, value: int) -> None:
        self.param_groups[0]["qsam_phase"] = value
