"""Lightning: its automatic optimization hands a closure on, which the optimizer calls once per pass.

class Lit(LightningMixin, LightningModule): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from qsam.optim import QuantizedOptimizer, unwrap

_CLIPS = "_qsam_clips"
"""Attribute of a module whose optimizer has been told to clip."""

_CURE = "or set automatic_optimization = False and use the blocks of qsam.unwrap(self.optimizers()) by hand."


class LightningMixin(LightningModule):
    """A LightningModule whose optimizer is one of qsam's. Put it first: ``class Lit(LightningMixin, LightningModule)``.

    Without the mixin training is the same, in fp32 and bf16-mixed; with it,

    - ``self.log`` in ``training_step`` and Lightning's own loss are those of the first pass, not of the last;
    - torchmetrics that are attributes of the module count the first pass only, and all buffers of the module (those of
      a discriminator or a teacher too) move in the first pass only;
    - ``qsam_rise`` and the other figures of ``optimizer.diagnostics()`` are logged;
    - ``gradient_clip_val`` clips the pulled-back gradients, unless the optimizer has a ``max_grad_norm`` of its own;
    - options that Lightning cannot combine with it are refused before training: 16-mixed and
      ``accumulate_grad_batches``, which run the closure without the optimizer (their steps would be plain QAT, or lose
      micro-batches), and clipping by value.

    With ``automatic_optimization = False`` the mixin changes and refuses nothing, because the loop by hand does all.
    """

    _qsam_pass = 0

    def configure_callbacks(self) -> list[Callback]:
        """Add the callback that checks the Trainer before training, and logs."""
        found = super().configure_callbacks()
        return [*([found] if isinstance(found, Callback) else found), QuantizedTraining()]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, and report the first pass as the step's result."""
        assert optimizer_closure is not None
        results: list[Any] = []

        def closure() -> Any:
            self._qsam_pass += 1
            with contextlib.nullcontext() if self._qsam_pass == 1 else _metrics_kept(self):
                loss = optimizer_closure()
            results.append(optimizer_closure._result)  # type: ignore[attr-defined]
            return loss

        try:
            super().optimizer_step(epoch, batch_idx, optimizer, _Counted(optimizer_closure, closure))
        finally:
            self._qsam_pass = 0
        if results:
            optimizer_closure._result = results[0]  # type: ignore[attr-defined]

    def log(self, *arguments: Any, **options: Any) -> None:
        """Log; silent in all passes but the first."""
        if self._qsam_pass <= 1:
            super().log(*arguments, **options)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Leave clipping to the optimizer, if its ``max_grad_norm`` was set before training."""
        if not getattr(self, _CLIPS, False):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


class _Counted:
    """Lightning's closure with a counter around its calls."""

    def __init__(self, inner: Any, counted: Callable[[], Any]) -> None:
        self.inner, self.counted = inner, counted

    def __call__(self) -> Any:
        return self.counted()


class QuantizedTraining(Callback):
    """Checks the Trainer's options before the first batch, and logs. :class:`LightningMixin` adds it."""

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Refuse unsupported options, and let the optimizer clip."""
        if not pl_module.automatic_optimization:
            return
        optimizers = [unwrap(optimizer) for optimizer in trainer.optimizers]
        _refuse_unsupported(trainer)
        for optimizer in optimizers:
            if pl_module not in optimizer.modules:
                optimizer.modules.append(pl_module)
        if trainer.gradient_clip_val:
            for optimizer in optimizers:
                _hand_clipping_on(optimizer, trainer)
            setattr(pl_module, _CLIPS, True)

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        """Log the figures of the last step, as often as the Trainer logs."""
        if trainer.global_step % trainer.log_every_n_steps == 0 and pl_module.automatic_optimization:
            figures = unwrap(trainer.optimizers[0]).diagnostics()
            pl_module.log_dict({f"qsam_{name}": value for name, value in figures.items()})


@contextlib.contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    """Restore the attributes of every torchmetrics metric in ``module`` at the end; its states are not buffers."""
    metrics = [m for m in module.modules() if any(c.__module__.startswith("torchmetrics.") for c in type(m).__mro__)]
    kept = [(metric, {name: _copied(value) for name, value in vars(metric).items()}) for metric in metrics]
    try:
        yield
    finally:
        for metric, attributes in kept:
            vars(metric).clear()
            vars(metric).update(attributes)


def _copied(value: Any) -> Any:
    """Return a copy of a metric's state, which is a tensor, or a list of tensors that only grows."""
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if type(value) is list else value


def _refuse_unsupported(trainer: Any) -> None:
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision={trainer.precision!r} runs the closure without the optimizer, so that its steps would be plain "
            f"QAT: use precision='bf16-mixed' or 32, {_CURE}"
        )
    counts = {trainer.accumulate_grad_batches, *_scheduled_counts(trainer)}
    if max(counts) > 1:
        raise ValueError(
            f"accumulate_grad_batches={max(counts)} gives the optimizer the last micro-batch's closure only: use "
            f"larger batches, {_CURE}"
        )
    if trainer.gradient_clip_val and str(getattr(trainer.gradient_clip_algorithm, "value", "norm")) == "value":
        raise ValueError(
            "gradient_clip_algorithm='value' would clip dL/dQ, before it is pulled back: use "
            f"gradient_clip_algorithm='norm', {_CURE}"
        )


def _scheduled_counts(trainer: Any) -> list[int]:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    found = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
    return [count for callback in found for count in callback.scheduling.values()]


def _hand_clipping_on(optimizer: QuantizedOptimizer, trainer: Any) -> None:
    if optimizer.max_grad_norm is None:
        optimizer.max_grad_norm = float(trainer.gradient_clip_val)
