"""What the methods with a perturbed pass share: their arguments, and the order of their two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from qsam.optim.base import QuantizedOptimizer
from qsam.optim.groups import Base
from qsam.optim.perturbation import Perturbation, Selection, checked_rho
from qsam.optim.ranks import DataParallel
from qsam.optim.scale_optimizer import ScaleRate
from qsam.optim.snapshot import RandomState
from qsam.optim.sparing import Sparing
from qsam.optim.update import Closure


class TwoPass(QuantizedOptimizer):
    """First pass at Q(w), second at Q(w) + e, one update from the second's gradients. Not a method by itself.

    Args:
        model: The model; a plain one is quantized with the defaults of :func:`qsam.quantize_`.
        base: A torch Optimizer class, given ``arguments``, or an instance.
        rho: Radius of the perturbation: the L2 norm of e over everything that is perturbed, in units of the weights.
            Finite, >= 0. It grows with the square root of the number of weights; a group may have its own
            (``"rho"`` in ``params``), and a schedule may write ``group["qsam_rho"]``.
        direction: A registered direction; ``"sam"`` is the gradient.
        perturb: ``"quantized"``, ``"all"``, or a predicate ``(name, parameter) -> bool``.
        every: Perturb each k-th step; the others are plain QAT steps.
        start: The first step that is perturbed, counted from 0.
        reuse: ``"perturbation"``: the steps that ``every`` leaves out take the last e again, in one pass each.
        normalize_weights: e in units of each tensor's standard deviation, as if its weights had unit variance.
        ste: ``"clipped"``: dw carries the quantizer's mask. ``"identity"``: dw = dL/dQ.
        rng: ``"shared"``: all passes of a step see the same dropout; ``"independent"``: each its own.
        max_grad_norm: Clip the pulled-back gradients to this global norm; None: no clipping.
        perturbation_scope: ``"global"``: one e for all processes. ``"rank"``: each its own, from its own part of the
            batch (SAM's m-sharpness); the first pass is not averaged. It needs the DistributedDataParallel model.
        ddp: The DistributedDataParallel model, if ``model`` is the one inside. False where the processes of a group
            each train a model of their own. None: they train copies of this one.
        params: Parameters or groups for a base class; all trainable ones by default.
        scale_lr: Rate of gradient descent on the scales, one number or (weights, activations). None: the rate at
            which a scale keeps pace with the weights; see :mod:`qsam.optim.scale_optimizer`.
        scale_optimizer: The scales' optimizer class.
        arguments: The base's own keywords. One that is named like a keyword here is given through an instance.

    Raises:
        TypeError: an argument of the wrong kind, or one that neither this method nor the base has.
        ValueError: a bad value.
        RuntimeError: another optimizer owns the model's weights.
    """

    masked = False
    """Whether the ascent direction is the gradient behind the quantizer's clip mask."""

    inside = False
    """Whether e is added before the quantizer."""

    spares_gradients = True
    """Whether ``step(closure)`` leaves gradients out that a pass has no use for; set it to False on an instance for a
    closure that wants all of them in every pass (to clip by their common norm, say)."""

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        *,
        rho: float = 0.1,
        direction: str = "sam",
        perturb: Selection = "quantized",
        every: int = 1,
        start: int = 0,
        reuse: str | None = None,
        normalize_weights: bool = False,
        ste: str = "clipped",
        rng: str = "shared",
        max_grad_norm: float | None = None,
        perturbation_scope: str = "global",
        ddp: DataParallel = None,
        params: Iterable[Any] | None = None,
        scale_lr: ScaleRate = None,
        scale_optimizer: type[Optimizer] = SGD,
        **arguments: Any,
    ) -> None:
        perturbation = Perturbation(
            direction=direction, perturb=perturb, every=every, start=start, reuse=reuse, scope=perturbation_scope,
            masked=self.masked, inside=self.inside, normalize_weights=normalize_weights,
        )  # fmt: skip
        ours = set(TwoPass.__init__.__annotations__) - {"model", "base", "arguments", "return"}
        super().__init__(
            model, base, perturbation=perturbation, rho=checked_rho(rho), ste=ste, rng=rng,
            max_grad_norm=max_grad_norm, ddp=ddp, params=params, scale_lr=scale_lr, scale_optimizer=scale_optimizer,
            arguments=arguments, ours=ours,
        )  # fmt: skip
        self._sparing = Sparing(model)

    def _run(self, closure: Closure) -> Any:
        loss = self._make_passes(closure)
        self._finish_step()
        return loss

    def _make_passes(self, closure: Closure) -> Any:
        """Call ``closure`` twice, once perturbed, or once plainly, as the step's number and the direction want it."""
        assert self.perturbation is not None
        self._losses.clear()
        passes = self.perturbation.passes(self.steps)
        if passes == 0:
            with self._plain_pass():
                return self._call(closure, "loss")
        if passes == 1:
            with self._perturbed_pass():
                return self._call(closure, "loss_perturbed")
        with self.first_pass():
            loss = self._spare(closure, self._needed_first)
            self._note_loss("loss", loss)
        self._between_passes()
        if self._ascent_ready and self._has_gradients():
            with self._perturbed_pass():
                self._call(closure, "loss_perturbed")
        return loss

    def _between_passes(self) -> None:
        """What a method does between the first pass and the perturbation."""

    def _needed_first(self) -> set[int]:
        """Return, by id, whose gradients a method needs of the first pass."""
        assert self.perturbation is not None
        return self.perturbation.selected(self.latents_of)

    def _spare(self, closure: Closure, needed: Callable[[], set[int]]) -> Any:
        """Call ``closure`` for the gradients of these parameters."""
        if not self.spares_gradients or self._sparing.allowed is False:
            return closure()
        start = self._random_starts[-1] if self._random_starts else RandomState.now()
        return self._sparing.call(closure, self._parameters(), needed(), start)

    def _call(self, closure: Closure, name: str) -> Any:
        loss = closure()
        self._note_loss(name, loss)
        return loss
