"""QAT: quantization-aware training, one pass a step.

g = dL/dQ at Q(w);   (dw, ds) = VJP of Q;   w and s step
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from qsam.optim.base import QuantizedOptimizer, register_optimizer
from qsam.optim.groups import Base, needs_closure, pointed_at_model
from qsam.optim.ranks import DataParallel
from qsam.optim.scale_optimizer import ScaleRate
from qsam.optim.update import Closure

_SAM_ONLY = {"rho", "direction", "perturb", "every", "start", "reuse", "normalize_weights", "perturbation_scope"}


@register_optimizer("qat")
class QAT(QuantizedOptimizer):
    """Plain quantization-aware training round any torch optimizer; with the quantizer ``lsq`` this is LSQ.

    Args:
        model: The model; a plain one is quantized with the defaults of :func:`qsam.quantize_`.
        base: A torch Optimizer class, given ``arguments``, or an instance.
        ste: ``"clipped"``: dw carries the quantizer's mask. ``"identity"``: dw = dL/dQ.
        rng: Of no effect with one pass; here so that methods are exchanged by name.
        max_grad_norm: Clip the pulled-back gradients to this global norm; None: no clipping.
        ddp: False where the processes of a group each train a model of their own. None: they train copies of this one.
        params: Parameters or groups for a base class; all trainable ones by default.
        scale_lr: Rate of gradient descent on the scales, one number or (weights, activations). None: the rate at
            which a scale keeps pace with the weights; see :mod:`qsam.optim.scale_optimizer`.
        scale_optimizer: The scales' optimizer class.
        arguments: The base's own keywords.

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

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        *,
        ste: str = "clipped",
        rng: str = "shared",
        max_grad_norm: float | None = None,
        ddp: DataParallel = None,
        params: Iterable[Any] | None = None,
        scale_lr: ScaleRate = None,
        scale_optimizer: type[Optimizer] = SGD,
        **arguments: Any,
    ) -> None:
        if taken := sorted(_SAM_ONLY & set(arguments)):
            raise TypeError(f"QAT has no perturbation and takes no {taken}: use SAQ or SQuAT, or drop them.")
        super().__init__(
            model, base, perturbation=None, rho=0.0, ste=ste, rng=rng, max_grad_norm=max_grad_norm, ddp=ddp,
            params=params, scale_lr=scale_lr, scale_optimizer=scale_optimizer, arguments=arguments,
            ours={"ste", "rng", "max_grad_norm", "ddp", "params", "scale_lr", "scale_optimizer"},
        )  # fmt: skip

    def _run(self, closure: Closure) -> Any:
        self._meet()
        if needs_closure(self.base):
            return self._let_base_call(closure)
        with self._plain_pass():
            loss = closure()
        self._note_loss("loss", loss)
        self._finish_step()
        return loss

    @torch.no_grad()
    def _let_base_call(self, closure: Closure) -> Any:
        """Step a base that calls the closure itself (LBFGS): each call sees Q(w) and leaves dw on the latents."""
        latents, scale_grads = self.latents_of, {}
        self._check_guard()

        def evaluate() -> Any:
            nonlocal scale_grads
            with pointed_at_model(self.base, latents):
                latents.write()
                self._clear_gradients()
                with torch.enable_grad(), latents.noise("step", self._look):
                    loss = closure()
                scale_grads = self._pull_back(self._differentiate)
            self._clip()
            return loss

        try:
            loss = self._step_base(evaluate, after=lambda: self._step_scales(scale_grads))
        finally:
            self._clean_up()
        self._note_loss("loss", loss)
        self._count_step()
        return loss
