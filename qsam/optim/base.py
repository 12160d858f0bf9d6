"""The optimizer round an optimizer: its passes, its step, and what a torch Optimizer must be able to do.

The base optimizer steps the latents; the scales have an optimizer of their own; outside the blocks the model holds
Q(w). A method says in its own file how passes and updates follow each other.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qsam.latent import Latents, coverage_for
from qsam.optim import state as packing
from qsam.optim.checkpoint import Checkpoint
from qsam.optim.diagnostics import noise_figures
from qsam.optim.groups import Base, build_base, needs_closure
from qsam.optim.perturbation import Perturbation, checked_rho
from qsam.optim.ranks import DataParallel, Ranks
from qsam.optim.scale_rates import ScaleRate, build_scale_optimizer
from qsam.optim.snapshot import RandomState, buffers_kept, same_random_numbers
from qsam.optim.update import Closure, Update
from qsam.plan import FORMAT
from qsam.registry import Registry
from qsam.shards import any_process
from qsam.slots import ScaleSlot, scale_tensors


class QuantizedOptimizer(Update, Checkpoint, Optimizer):
    """Base class of the methods: see the classes in ``qsam/optim/``.

    Args:
        model: The model; a plain one is quantized with the defaults of :func:`qsam.quantize_`.
        base: A torch Optimizer class with its ``arguments``, or an instance.
        perturbation: What is added in the second pass; None for a method of one pass.
        rho: Radius, kept in every base group as ``qsam_rho``; a schedule may change it there.
        ste: ``"clipped"``: dw carries the quantizer's mask. ``"identity"``: dw is the gradient of Q(w) itself.
        rng: ``"shared"``: all passes of a step draw the same random numbers; ``"independent"``: each its own.
        max_grad_norm: Clip the pulled-back gradients of everything the base steps to this global norm.
        ddp: The DistributedDataParallel model, None or False; see :mod:`qsam.optim.ranks`.
        params: Parameters or groups for the base class; all trainable ones by default.
        scale_lr: The scales' rate; see :mod:`qsam.optim.scale_rates`.
        scale_optimizer: The scales' optimizer class.
        arguments: The base's own keywords.
    """

    quantizes = True
    """Whether the method has quantizers."""

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        *,
        perturbation: Perturbation | None,
        rho: float,
        ste: str,
        rng: str,
        max_grad_norm: float | None,
        ddp: DataParallel,
        params: Iterable[Any] | None,
        scale_lr: ScaleRate,
        scale_optimizer: type[Optimizer],
        arguments: dict[str, Any],
        ours: set[str],
    ) -> None:
        _check_options(model, ste, rng, max_grad_norm)
        self.ranks = Ranks(model, ddp, "global" if perturbation is None else perturbation.scope)
        coverage = coverage_for(model, self.quantizes)
        self.latents_of = Latents(model, self, coverage)
        self.perturbation = perturbation
        try:
            self.base = build_base(
                type(self).__name__, base, self.latents_of, params=params, arguments=arguments, ours=ours
            )
            weights, inputs = scale_tensors(coverage)
            self.scale_slots: list[ScaleSlot] = [*weights, *inputs]
            slots = self.latents_of.slots
            self.scale_base = build_scale_optimizer(
                weights, inputs, scale_lr=scale_lr, scale_optimizer=scale_optimizer, base=self.base, slots=slots
            )
            for group in self.base.param_groups:
                group["qsam_rho"] = self._radius(group, rho)
        except BaseException:
            self.latents_of.release()
            raise
        self.ste, self.rng, self.max_grad_norm = ste, rng, max_grad_norm
        self.__setstate__({"defaults": self.base.defaults, "param_groups": []})
        self.param_groups[:] = self.base.param_groups
        if self.scale_base is not None:
            self.param_groups += [self._public_group(group) for group in self.scale_base.param_groups]
        self.param_groups[0].update(
            qsam_format=FORMAT,
            qsam_step=0,
            qsam_phase=0,
            qsam_base_class=type(self.base).__name__,
            qsam_quantizers=self._describe_quantizers(),
        )
        self._state_created = False
        # What another optimizer left in the Parameters is nobody's micro-batch.
        self._leftovers = {id(p.grad) for p in self._parameters() if p.grad is not None}
        self._start_passes()
        self.scales = ScaleFacade(self)

    # --- the step -----------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step: of the weights, or after :meth:`scale_phase` of the scales.

        Args:
            closure: torch's closure: clears gradients, runs forward and backward, returns the loss. It is called as
                often as the method has passes. Without it, or with one that runs no backward, the gradients of
                the passes made by hand are used.

        Returns:
            What the closure returned in the first pass; None without a closure.

        Raises:
            TypeError: a closure that cannot be called, or none for a base that calls it by itself (LBFGS).
            RuntimeError: called inside a block, without new gradients, or after somebody else wrote the weights.
        """
        self._refuse_inside_block("step")
        self._meet()
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"`closure` must be a function that returns the loss, got {closure!r}.")
            with torch.enable_grad():
                return self._step_with(closure)
        return self._step_by_hand()

    def _step_with(self, closure: Closure) -> Any:
        """Run the passes; if the closure runs no backward (Lightning's manual optimization), step what is there."""
        if any(p.grad is not None and id(p.grad) not in self._leftovers for p in self._parameters()):
            result, backward = self._observe(closure)
            if not backward and self._has_gradients():
                self._step_by_hand()
                return result
            self._say_once(
                "step(closure) clears the gradients that it finds: micro-batches that were accumulated before it "
                "(Lightning with accumulate_grad_batches) are lost. Accumulate inside the closure, or by hand."
            )
        self._clear_gradients()
        try:
            return self._run(closure)
        finally:
            self.latents_of.end_shift()

    def _observe(self, closure: Closure) -> tuple[Any, bool]:
        """Call ``closure`` once without a trace in buffers and random numbers, and return whether it ran a backward."""
        seen: list[Tensor] = []
        parameters = [p for p in self._parameters() if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(seen.append) for p in parameters]  # type: ignore[no-untyped-call]
        try:
            with buffers_kept(self.latents_of.root), same_random_numbers(RandomState.now()):
                return closure(), bool(seen)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _step_by_hand(self) -> None:
        """Step with the gradients of the passes that were made."""
        if (
            not self._passes_made
            and packing.all_lr_zero(self.param_groups)
            and self._all_agree(packing.no_gradient_but_zeros(self.param_groups))
        ):
            return self._create_state()
        if not self._has_gradients():
            raise RuntimeError("step() found no gradient: run a new backward before each step.")
        if self._scales_turn:
            return self.step_scales()
        if needs_closure(self.base):
            raise TypeError(f"{type(self.base).__name__} calls its closure by itself: use step(closure).")
        if self.perturbation is not None and not self._perturbed and self.perturbation.passes(self.steps):
            self._say_once(
                f"{type(self).__name__}.step() without first_pass() and perturbed() is a plain QAT step. A "
                "framework that does not hand its closure on (Lightning with 16-mixed, AcceleratedOptimizer) does this."
            )
        self._finish_step()
        return None

    def _all_agree(self, flag: bool) -> bool:
        """Whether it holds in every process that has a part of the weights; copies of a model agree by themselves."""
        return not any_process(not flag, self._parameters())

    def _run(self, closure: Closure) -> Any:
        """Make the passes of one step by calling ``closure``, and step."""
        raise NotImplementedError

    def _finish_step(self) -> None:
        """Update from the gradients in place: w and s together, in a method that does not alternate."""
        if self.latents_of.noises and not self.latents_of.noisy:
            self._say_once(
                "noise quantizers draw inside first_pass(), perturbed(), scale_phase() and "
                "step(closure) only: this step's "
                "gradients were taken at the rounded weights."
            )
        self._update(weights=True, scales=True)

    # --- what users read and do ---------------------------------------------------------------------------------

    @property
    def coverage(self) -> Any:
        """What is quantized, what is not and why; None for a method without quantizers."""
        return self.latents_of.coverage

    @contextlib.contextmanager
    def latents(self) -> Iterator[None]:
        """Within this context the model holds the full-precision w: average them (EMA, SWA) or save them here."""
        self._refuse_inside_block("latents")
        self.latents_of.settle(self.base)
        self.latents_of.check()
        self._block = "latents"
        self.latents_of.put_latents()
        try:
            yield
        finally:
            self.latents_of.write()
            self._block = None

    def sync_latents(self) -> None:
        """Take the model's present weights as latents, and write Q(w): after a merge, a load, a pruning."""
        self._refuse_inside_block("sync_latents")
        self.latents_of.settle(self.base)
        self.latents_of.take_present_weights()

    def diagnostics(self) -> dict[str, float]:
        """Return figures of the last step; those marked * are measured in the next perturbed pass after each call.

        Returns:
            ``loss`` and ``loss_perturbed`` of ``step(closure)`` and their difference ``rise``; ``direction_norm``, the
            norm by which the ascent direction was divided; ``quantization_noise_norm``, ||Q(w) - w||, and
            ``clipped_share``, the share of quantized weights whose gradient the clip mask stops;
            ``perturbation_norm``*, ||e|| as realised in the quantized weights, ``noise_perturbation_cosine``*, the
            cosine of e and Q(w) - w, and ``flipped_share``*, the share of codes that e would flip. What has not been
            measured is left out.
        """
        self.latents_of.guard.check_attached()
        found = {name: float(value) for name, value in self._losses.items()}
        if len(found) == 2:
            found["rise"] = found["loss_perturbed"] - found["loss"]
        if self.perturbation is not None and self.perturbation.norm is not None:
            found["direction_norm"] = float(self.perturbation.norm)
        self._measure = self.perturbation is not None and bool(self.latents_of.slots)
        return found | self._measured | noise_figures(self.latents_of)

    # --- a torch Optimizer --------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; see :meth:`torch.optim.Optimizer.add_param_group`."""
        group = dict(param_group)
        group["qsam_rho"] = self._radius(group, self.param_groups[0]["qsam_rho"])
        self.base.add_param_group(group)
        self.param_groups.append(self.base.param_groups[-1])

    def _radius(self, group: dict[str, Any], default: float) -> float:
        """Take a group's radius out of it: its "rho", or "qsam_rho" where the base has a "rho" too (Adadelta)."""
        if self.perturbation is not None and "rho" not in self.base.defaults:
            default = group.pop("rho", default)
        return checked_rho(group.pop("qsam_rho", default))

    def __getstate__(self) -> dict[str, Any]:
        """Keep everything, but for the wrapper that a scheduler put round ``step``."""
        return {k: v for k, v in self.__dict__.items() if k not in {"step", "_opt_called"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and own the latents of the restored model."""
        super().__setstate__(state)
        self.latents_of.claim(self)

    def _release(self) -> None:
        """Put the latents into the model for good."""
        if self.latents_of.sharded:
            raise RuntimeError(
                "dequantize_ cannot take the scales out of a sharded model: gather its state_dict and load it into a "
                "model of its own first."
            )
        self.latents_of.release()

    def _public_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the group that schedulers see: the scales', with the keys of the base's that they may write."""
        return {**{k: v for k, v in self.base.defaults.items() if k not in group}, **group}

    def _describe_quantizers(self) -> dict[str, str]:
        found = {
            slot.path: f"{type(slot.quantizer).__name__}({slot.quantizer.extra_repr()})"
            for slot in self.latents_of.slots
        }
        for row in self.coverage.inputs if self.coverage is not None else ():
            if row.quantizer is not None:  # its sign is not part of its identity: the first batch decides it
                found[f"{row.name}.input".lstrip(".")] = f"{type(row.quantizer).__name__}(bits={row.quantizer.bits})"
        return found


class ScaleFacade(Optimizer):
    """``optimizer.scales``: what ``GradScaler`` needs to unscale and step the scales by themselves.

    Its one group holds everything that has a gradient in the scales' pass; its ``step`` is ``step_scales``.
    """

    def __init__(self, owner: QuantizedOptimizer) -> None:
        self.owner = owner
        self.__setstate__({"defaults": {}, "state": defaultdict(dict)})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All tensors that have gradients: where it is fused, e comes from them next, in one unit.

        Raises:
            RuntimeError: between the passes of ``perturbation_scope="rank"``.
        """
        if self.owner.ranks.scope == "rank" and self.owner._ascent_ready:
            raise RuntimeError(
                "a GradScaler would judge each rank's own first pass, and ranks could part ways: with "
                "perturbation_scope='rank' and schedule='fused' use bf16 autocast, or another schedule."
            )
        return [{"params": [p for p in self.owner._parameters() if p.requires_grad], "lr": 0.0}]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the scales."""
        self.owner.step_scales()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the owner."""
        return {"owner": self.owner, "defaults": {}, "state": self.state}


def _check_options(model: Any, ste: str, rng: str, max_grad_norm: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}: the model comes first, then the optimizer."
        )
    if ste not in ("clipped", "identity"):
        raise ValueError(f"`ste` must be 'clipped' or 'identity', got {ste!r}.")
    if rng not in ("shared", "independent"):
        raise ValueError(f"`rng` must be 'shared' or 'independent', got {rng!r}.")
    if max_grad_norm is not None and (isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, int | float)):
        raise TypeError(f"`max_grad_norm` must be None or a number > 0, got {max_grad_norm!r}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` must be > 0, got {max_grad_norm}.")


OPTIMIZERS: Registry[QuantizedOptimizer] = Registry("optimizer")
"""All methods by name: "qat", "sam", "joint", "saq", "squat"."""

register_optimizer = OPTIMIZERS.register
