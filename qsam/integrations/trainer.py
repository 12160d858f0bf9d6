"""The Hugging Face Trainer: all passes of a step, for every method, schedule and option.

class QsamTrainer(TrainerMixin, Trainer): ...

passes at Q(w) and Q(w) + e    in ``training_step``, for each micro-batch
pass of the scales             after ``optimizer.step()``, on the same micro-batches, before the scheduler
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from qsam.coverage import coverage_of, quantizer_parameters
from qsam.layers import unwrap_model
from qsam.optim import QuantizedOptimizer, SQuAT, unwrap
from qsam.optim.groups import needs_closure

_log = logging.getLogger("qsam")
_OPTIMIZER_FILE = "optimizer.pt"


class TrainerMixin(Trainer):
    """A Trainer whose optimizer is one of qsam's. Put it before the Trainer: ``class T(TrainerMixin, Trainer)``.

    - The optimizer: built by you and given as ``optimizers=(optimizer, scheduler)``; or by ``qsam_method``, which is
      called with the model and the optimizer that the Trainer builds from its arguments (learning rate, weight decay).
    - ``max_grad_norm`` of the TrainingArguments (1.0 by default) clips the pulled-back gradients, as in fake
      quantization, unless the optimizer has a ``max_grad_norm`` of its own. The logged ``grad_norm`` is dL/dQ's.
    - The log has, beside the loss of the first pass, ``qsam_rise`` (what the perturbation added to the loss, the mean
      since the last log) and the other figures of ``optimizer.diagnostics()``.
    - ``save_model`` writes ``qsam.json`` and ``qsam.safetensors`` beside the model.
    - After ``load_best_model_at_end`` the optimizer holds what it held at the best checkpoint, the full-precision
      weights included; without an optimizer's file there (``save_only_model``), the loaded weights.
    - Resuming from a checkpoint is bit-identical; one of the model alone starts from its rounded weights.
    - With ``schedule="next_batch"`` a step of the scales counts as one of the Trainer's steps.

    Args:
        arguments: The Trainer's positional arguments.
        qsam_method: ``(model, base optimizer) -> optimizer``: a method's class, or ``functools.partial`` of one.
        options: The Trainer's keywords.

    Raises:
        TypeError: At ``train()``: there is no qsam optimizer, or its base calls its closure itself (LBFGS).
        ValueError: Both ``qsam_method`` and an optimizer are given; at ``train()``: ``schedule="fused"`` with
            accumulation.
    """

    def __init__(
        self,
        *arguments: Any,
        qsam_method: Callable[[nn.Module, torch.optim.Optimizer], QuantizedOptimizer] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        if qsam_method is not None and self.optimizer is not None:
            raise ValueError("give either `qsam_method` or an optimizer in `optimizers`, not both.")
        self.qsam_method = qsam_method
        self.args = copy.copy(self.args)  # its max_grad_norm is handed on to the optimizer
        self._micro_batches: list[tuple[Any, ...]] = []
        self._rises: list[Tensor] = []
        self._passes_of_batch = 1
        self._resumed_from: str | None = None
        self.callback_handler.callbacks.insert(0, _Phases(self))  # before callbacks that average or save the weights

    # --- the optimizer ------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer, if none was given, and check that the Trainer can drive it."""
        built = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*([] if model is None else [model]))
        if built and self.qsam_method is not None:
            trained: Any = self.model if model is None else model
            self.optimizer = optimizer = self.qsam_method(trained, _without_scales(optimizer, trained))
        inner = unwrap(optimizer)
        self._refuse_undrivable(inner)
        self._take_over_clipping(inner)
        if self._resumed_from is not None and not _has_optimizer(self._resumed_from):
            inner.sync_latents()  # a checkpoint of the model alone: its weights would be overwritten by older latents
        return optimizer

    def _refuse_undrivable(self, optimizer: QuantizedOptimizer) -> None:
        if needs_closure(optimizer.base):
            raise TypeError(
                f"the Trainer takes no closure, which {type(optimizer.base).__name__} wants: use AdamW or SGD."
            )
        if _is_fused(optimizer) and self.args.gradient_accumulation_steps > 1:
            raise ValueError(
                "schedule='fused' steps the scales between the passes of one batch, and gradient_accumulation_steps is "
                f"{self.args.gradient_accumulation_steps}: use schedule='same_batch' or 'next_batch'."
            )

    def _take_over_clipping(self, optimizer: QuantizedOptimizer) -> None:
        """Let the optimizer clip: the Trainer would clip dL/dQ, before the pull-back."""
        norm = self.args.max_grad_norm
        if norm is None or not norm > 0:
            return
        self.args.max_grad_norm = 0.0
        if optimizer.max_grad_norm is None:
            optimizer.max_grad_norm = float(norm)
        _log.info("qsam clips the pulled-back gradients to the norm %s.", optimizer.max_grad_norm)

    # --- the passes ---------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch through the blocks that are due; return the loss of the first."""
        optimizer = unwrap(self.optimizer)
        losses: list[Tensor] = []
        for block in optimizer.blocks:
            if losses and optimizer.scales_due:  # schedule "fused": the scales step from the first pass
                self._step_scales(optimizer)
            with getattr(optimizer, block)():
                losses.append(super().training_step(model, inputs, num_items_in_batch))
        if len(losses) == 2:
            self._rises.append(losses[1] - losses[0])
        if isinstance(optimizer, SQuAT) and optimizer.schedule == "same_batch":
            self._micro_batches.append((model, inputs, num_items_in_batch))
        self._passes_of_batch = len(losses)
        return losses[0]

    def _run_scale_phase(self) -> None:
        """Run the stashed micro-batches again, for the scales."""
        optimizer = unwrap(self.optimizer)
        batches, self._micro_batches = self._micro_batches, []
        if not (batches and optimizer.scales_due):
            return
        for number, (model, inputs, items) in enumerate(batches, 1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model), optimizer.scale_phase():
                super().training_step(model, inputs, items)
            self.current_flos += int(super().floating_point_ops(inputs))
        self._step_scales(optimizer, last=True)

    def _step_scales(self, optimizer: QuantizedOptimizer, last: bool = False) -> None:
        scaler = self.accelerator.scaler
        if scaler is None:
            optimizer.step_scales()
            return
        scaler.step(optimizer.scales)
        if last:
            scaler.update()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of all passes that this batch has made."""
        return int(super().floating_point_ops(inputs)) * self._passes_of_batch

    # --- logs and files -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the optimizer's figures to a training log."""
        if "loss" in logs and self.is_in_train:
            figures = unwrap(self.optimizer).diagnostics()
            if self._rises:
                figures["rise"] = float(torch.stack(self._rises).sum()) / self._batches_of(len(self._rises))
                self._rises.clear()
            logs.update({f"qsam_{name}": value for name, value in figures.items()})
        super().log(logs, *arguments, **options)

    def _batches_of(self, micro_batches: int) -> float:
        """Return how many batches these are: each micro-batch's loss is its share of the batch's."""
        return max(1.0, micro_batches / self.args.gradient_accumulation_steps)

    def save_model(self, *arguments: Any, **options: Any) -> None:
        """Save the model, and what rebuilds its quantizers: ``quantize_(model, spec=output_dir)``."""
        super().save_model(*arguments, **options)
        model: Any = self.model
        coverage = coverage_of(unwrap_model(model))
        if coverage is not None and self.args.should_save:
            folder: Any = arguments[0] if arguments else options.get("output_dir")
            coverage.save(str(folder or self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Train; see :meth:`transformers.Trainer.train`."""
        from transformers.trainer_utils import get_last_checkpoint

        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._resumed_from = last or None
        return super().train(resume_from_checkpoint, *arguments, **options)

    def _follow_best_model(self) -> None:
        """Give the optimizer the state that belongs to the weights which the Trainer has just loaded."""
        best = self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None:
            return
        optimizer = unwrap(self.optimizer)
        if _has_optimizer(best):
            path = os.path.join(best, _OPTIMIZER_FILE)
            optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            optimizer.sync_latents()
            _log.warning("%s has no optimizer's state: the latents are its rounded weights from now on.", best)


class _Phases(TrainerCallback):
    """Calls the mixin where the Trainer has a hook and no method to override."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget what an interrupted run has left."""
        unwrap(self.trainer.optimizer).zero_grad()
        self.trainer._micro_batches, self.trainer._rises = [], []

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Run the scales' pass after the step of the weights, before the scheduler."""
        self.trainer._run_scale_phase()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Follow the best model, which has been loaded by now."""
        self.trainer._follow_best_model()


def _without_scales(base: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Take the inputs' scales out of the groups that the Trainer has built: they have an optimizer of their own."""
    scales = {id(p) for p in quantizer_parameters(unwrap_model(model))}
    for group in base.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in scales]
    return base


def _is_fused(optimizer: QuantizedOptimizer) -> bool:
    return isinstance(optimizer, SQuAT) and optimizer.schedule == "fused"


def _has_optimizer(checkpoint: str) -> bool:
    return os.path.isfile(os.path.join(checkpoint, _OPTIMIZER_FILE))
