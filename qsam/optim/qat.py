"""QAT: quantization-aware training, one pass per step.

g = dL/dQ at Q(w);   (dw, ds) = VJP of Q;   w and s step
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam.latents import pointed_at_model
from qsam.optim.groups import Base, needs_closure
from qsam.optim.optimizer import Closure, QuantizedOptimizer, register_optimizer
from qsam.optim.options import PERTURBATION_KEYWORDS


@register_optimizer("qat")
class QAT(QuantizedOptimizer):
    """Plain quantization-aware training around any torch optimizer; with the quantizer ``lsq`` this is LSQ.

    Args:
        model: As :class:`~qsam.optim.optimizer.QuantizedOptimizer`.
        base: As there. A base that calls its closure itself (LBFGS) is allowed.
        options: As there, without those of the perturbation. ``rng``, ``modules`` and ``skip_unused_gradients`` have no
            effect on a method of one pass; they are accepted, so that methods are exchanged by name.

    Raises:
        TypeError: An option of the perturbation is given.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = QAT(model, torch.optim.AdamW, lr=1e-3)
        >>> x = torch.randn(16, 4)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)

    References:
        Esser et al., Learned Step Size Quantization, ICLR 2020.
    """

    perturbs = False

    def __init__(self, model: nn.Module, base: Base, **options: Any) -> None:
        if taken := sorted(set(PERTURBATION_KEYWORDS) & set(options)):
            raise TypeError(f"QAT has no perturbation and takes no {taken}: use SAQ or SQuAT, or drop them.")
        super().__init__(model, base, **options)

    def _walk(self, closure: Closure) -> Any:
        return self._let_base_call(closure) if needs_closure(self.base) else super()._walk(closure)

    @torch.no_grad()
    def _let_base_call(self, closure: Closure) -> Any:
        """Step a base that calls the closure itself (LBFGS): each call sees Q(w) and leaves dw on the latents."""
        latents = self._latents
        scale_grads: dict[int, Tensor] = {}
        self._check_weights()

        def evaluate() -> Any:
            nonlocal scale_grads
            with pointed_at_model(self.base, latents):
                latents.write()
                self._drop_gradients()
                with torch.enable_grad(), latents.noise("step", self._check_for_foreign_writes):
                    loss = closure()
                scale_grads = self._pull_back(weights=True)
            self._clip()
            return loss

        try:
            loss = self._step_base(evaluate, after=lambda: self._step_scales(scale_grads))
        finally:
            self._clean_up()
        self._note_loss("loss", loss)
        self._count_step()
        return loss
