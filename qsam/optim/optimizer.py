"""The optimizer around an optimizer: it owns the full-precision weights w, and the model holds Q(w).

A step is a list of phases, passes and updates, that each method names::

    QAT      first_pass                 update
    SAQ      first_pass   perturbed     update
    SQuAT    first_pass   perturbed     update   scale_phase   step_scales

``step(closure)`` walks through the list and calls the closure in each pass. A loop by hand opens the passes as blocks
and calls ``step()`` for the updates; ``blocks`` names the passes that are due. Between the phases two values say where
a step is: ``_block``, the block that is open, and ``_gradients_of``, the pass whose gradients the Parameters hold.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from qsam.distributed import DataParallel, Ranks, any_process, follow_fsdp, in_process_group, local, owned_copy
from qsam.inputs import frozen
from qsam.latents import Latents, coverage_for, pointed_at_latents, undone_if_refused
from qsam.optim import checkpoint
from qsam.optim.diagnostics import noise_figures, perturbation_figures, unseen_inputs
from qsam.optim.directions import Ascent, Direction
from qsam.optim.groups import Base, build_base, needs_closure, without_scales
from qsam.optim.options import (
    PERTURBATION_KEYWORDS,
    SamOptions,
    Selection,
    check_options,
    checked_modules,
    checked_rho,
)
from qsam.optim.perturbation import Perturbation
from qsam.optim.scale_optimizer import ScaleRate, ScaleSlot, build_scale_optimizer, follow_base_, scale_slots
from qsam.optim.snapshot import RandomState, buffers_kept, modules_of, same_random_numbers
from qsam.optim.wrappers import ScaleFacade
from qsam.plan import FORMAT
from qsam.registry import Registry

Closure = Callable[[], Any]
PASSES = ("first_pass", "perturbed", "scale_phase")
_READS_REQUIRES_GRAD = ("CompiledFunction", "CheckpointFunction")
"""Parts of the names of graph nodes that read ``requires_grad``. ``torch.compile`` would compile again, and a reentrant
checkpoint returns no gradient if no input requires one."""


class QuantizedOptimizer(Optimizer):
    """The optimizer that all methods share; a method is a subclass that names its phases.

    Args:
        model: The model; a plain one is quantized with the defaults of :func:`qsam.quantize_`.
        base: A torch Optimizer class, given ``arguments``, or an instance.
        rho: Radius of the perturbation: the L2 norm of e over everything that is perturbed, in units of the weights.
            Finite, >= 0. It grows with the square root of the number of weights; a group may have its own
            (``"rho"`` in ``params``), and a schedule may write ``group["qsam_rho"]``.
        direction: The name of a registered direction, or a :class:`~qsam.Direction`; ``"sam"`` is the gradient.
        perturb: ``"quantized"`` (the quantized weights), ``"all"`` (these and every other trainable parameter), or a
            predicate ``(name, parameter) -> bool``. Scales are never perturbed.
        every: Perturb each k-th step; the others are plain QAT steps. An integer >= 1.
        start: The first step that is perturbed, counted from 0.
        reuse: ``"perturbation"``: the steps that ``every`` leaves out take the last e again, in one pass each.
        normalize_weights: e in units of each tensor's standard deviation, as if its weights had unit variance.
        perturbation_scope: ``"global"``: one e for all processes. ``"rank"``: each process has its own, from its own
            part of the batch (SAM's m-sharpness); the first pass is then not averaged. It needs the
            DistributedDataParallel model.
        skip_unused_gradients: Whether ``step(closure)`` leaves out gradients that a pass does not need: those of float
            parameters in a first pass. Set it to False if the closure needs all gradients in every pass (to clip by
            their common norm, or to call ``torch.autograd.grad``).
        modules: Further modules that the passes run, such as a discriminator or a teacher in a loop by hand. Only the
            first pass may change their buffers. ``step(closure)`` finds the modules that the closure refers to.
        ste: ``"clipped"``: dw carries the quantizer's mask. ``"identity"``: dw = dL/dQ.
        rng: ``"shared"``: all passes of a step draw the same random numbers (dropout); ``"independent"``: each its own.
        max_grad_norm: Clip the pulled-back gradients to this global norm; None: no clipping.
        ddp: The DistributedDataParallel model, if ``model`` is the one inside it. False: each process of a group trains
            a different model. None: they train copies of this one.
        params: Parameters or groups for a base class; all trainable ones by default.
        scale_lr: Rate of gradient descent on the scales, one number or (weights, activations). None: the rate at which
            a scale keeps pace with the weights; see :mod:`qsam.optim.scale_optimizer`.
        scale_optimizer: The scales' optimizer class.
        arguments: The base's own keywords. If one has the name of a keyword above, give ``base`` as an instance.

    Raises:
        TypeError: An argument has the wrong type, or neither this method nor the base knows it.
        ValueError: An argument has a value outside its range.
        RuntimeError: Another optimizer owns the model's weights.
    """

    quantizes = True
    """Whether the method has quantizers."""

    perturbs = True
    """Whether the method has a perturbed pass."""

    alternates = False
    """Whether weights and scales take turns."""

    masked = inside = False
    """Whether e comes from the masked gradient, and whether it is added before the quantizer (SAQ's cases)."""

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        *,
        rho: float = 0.1,
        direction: str | Direction = "sam",
        perturb: Selection = "quantized",
        every: int = 1,
        start: int = 0,
        reuse: str | None = None,
        normalize_weights: bool = False,
        perturbation_scope: str = "global",
        skip_unused_gradients: bool = True,
        modules: Iterable[nn.Module] = (),
        ste: str = "clipped",
        rng: str = "shared",
        max_grad_norm: float | None = None,
        ddp: DataParallel = None,
        params: Iterable[Any] | None = None,
        scale_lr: ScaleRate = None,
        scale_optimizer: type[Optimizer] = SGD,
        **arguments: Any,
    ) -> None:
        self.perturbation = None
        if self.perturbs:
            options = SamOptions(
                rho=rho, direction=direction, perturb=perturb, every=every, start=start, reuse=reuse,
                normalize_weights=normalize_weights, scope=perturbation_scope, masked=self.masked, inside=self.inside,
            )  # fmt: skip
            self.perturbation = Perturbation(options)
        self._check_own_options()
        self.modules = checked_modules(modules)
        check_options(model, ste, rng, max_grad_norm)
        self.ste, self.rng, self.max_grad_norm = ste, rng, max_grad_norm
        self.skip_unused_gradients = skip_unused_gradients
        self._may_skip: bool | None = False if _is_compiled(model) else None  # None until a whole pass has been seen
        self.ranks = Ranks(model, ddp, perturbation_scope)
        with undone_if_refused(model):
            self._latents = Latents(model, self, coverage_for(model, self.quantizes))
            try:
                self._build_base(base, params, arguments, checked_rho(rho) if self.perturbs else 0.0)
                self._build_scale_optimizer(scale_lr, scale_optimizer)
            except BaseException:
                self._latents.release(into_model=True)
                raise
        self._build_groups()
        # Another optimizer may have left gradients in the Parameters: they are not this one's micro-batches.
        self._initial_gradients = {id(p.grad) for p in self._parameters() if p.grad is not None}
        self._start_passes()
        self.scales = ScaleFacade(self)

    def _check_own_options(self) -> None:
        """Refuse what a method cannot do with its perturbation, before anything is touched."""

    def _build_base(self, base: Base, params: Iterable[Any] | None, arguments: dict[str, Any], rho: float) -> None:
        keywords = set(QuantizedOptimizer.__init__.__annotations__) - {"model", "base", "arguments", "return"}
        ours = keywords if self.perturbs else keywords - set(PERTURBATION_KEYWORDS)
        name = type(self).__name__
        self.base = build_base(name, base, self._latents, params=params, arguments=arguments, ours=ours)
        for group in self.base.param_groups:
            group["qsam_rho"] = self._take_rho(group, rho)

    def _build_scale_optimizer(self, scale_lr: ScaleRate, scale_optimizer: type[Optimizer]) -> None:
        weights, inputs = scale_slots(self._latents.coverage)
        self.scale_slots: list[ScaleSlot] = [*weights, *inputs]
        self.scale_base = build_scale_optimizer(
            weights, inputs, scale_lr=scale_lr, scale_optimizer=scale_optimizer, base=self.base,
            slots=self._latents.slots,
        )  # fmt: skip

    def _build_groups(self) -> None:
        """List the base's live groups, then the scales' groups with the base's keys that schedulers write."""
        self.__setstate__({"defaults": self.base.defaults, "param_groups": []})
        self.param_groups[:] = self.base.param_groups
        for group in self.scale_base.param_groups if self.scale_base is not None else ():
            missing = {k: v for k, v in self.base.defaults.items() if k not in group}
            self.param_groups.append({**missing, **group})
        self.param_groups[0].update(
            qsam_format=FORMAT, qsam_step=0, qsam_phase=0, qsam_base_class=type(self.base).__name__,
            qsam_quantizers=_description(self._latents),
        )  # fmt: skip
        self._state_created = False

    def _start_passes(self) -> None:
        self._block: str | None = None
        self._gradients_of = ""
        self._set_aside: list[tuple[nn.Parameter, Tensor | None]] = []  # gradients of the micro-batches before this one
        self._first_seen: list[RandomState] = []  # the random state in which each micro-batch was first seen
        self._closure_modules: list[nn.Module] = []
        self._losses: dict[str, Tensor | float] = {}
        self._measure, self._measured = False, dict[str, float]()
        self._warned: set[str] = getattr(self, "_warned", set())

    # --- the step -----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Number of steps of the weights so far."""
        return int(self.param_groups[0]["qsam_step"])

    def phases(self) -> tuple[str, ...]:
        """Return the passes and updates of the next step, in order.

        A step of two passes is ``("first_pass", "perturbed", "update")``. If the direction is known before the step,
        the first pass is missing; if ``every``, ``start`` or an unknown direction leave the step out, the perturbed
        pass is.
        """
        number = 0 if self.perturbation is None else self.perturbation.passes(self.steps)
        return (*(("first_pass",), ("perturbed",), ("first_pass", "perturbed"))[number], "update")

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that are due, in order: a loop by hand runs forward and backward in each, then calls ``step()``.

        When SQuAT's scales have their turn it is ``("scale_phase",)``: ``"same_batch"`` has it after the step,
        ``"next_batch"`` before the next one.
        """
        return tuple(phase for phase in self.phases() if phase in {"first_pass", "perturbed"})

    @property
    def scales_due(self) -> bool:
        """Whether the scales have a turn of their own now: never in a method that does not alternate."""
        return False

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step: of the weights, or after :meth:`scale_phase` of the scales.

        Args:
            closure: torch's closure: it clears gradients, runs forward and backward, and returns the loss. It is called
                once per pass. Without it, or with one that runs no backward, the gradients of the passes made by hand
                are used.

        Returns:
            The closure's result of the first pass; None without a closure.

        Raises:
            TypeError: The closure cannot be called, or is missing for a base that calls it itself (LBFGS).
            RuntimeError: A block is open, there are no new gradients, a micro-batch would be lost, or something other
                than this optimizer wrote the weights.
        """
        self._refuse_inside_block("step")
        self._join_processes()
        if closure is None:
            return self._step_by_hand()
        if not callable(closure):
            raise TypeError(f"`closure` must be a function that returns the loss, got {closure!r}.")
        with torch.enable_grad():
            if any(p.grad is not None and id(p.grad) not in self._initial_gradients for p in self._parameters()):
                result, backward = self._observe(closure)
                if not backward and self._has_gradients():
                    self._step_by_hand()
                    return result
                self._warn_once(
                    "step(closure) clears the gradients that it finds: micro-batches that were accumulated before it "
                    "(Lightning with accumulate_grad_batches) are lost. Accumulate inside the closure, or by hand."
                )
            self._drop_gradients()
            try:
                return self._walk(closure)
            finally:
                self._closure_modules = []
                self._latents.end_perturbation()

    def _walk(self, closure: Closure) -> Any:
        """Run the phases of a step, and return what the closure returned in the first pass."""
        self._losses.clear()
        phases = self.phases()
        if len(phases) > 2:
            self._closure_modules = modules_of(closure)
        results: list[Any] = []
        for phase in phases:
            if results and self._is_skipped(phase):
                continue
            if phase == "update":
                self._update()
            elif phase == "step_scales":
                self.step_scales()
            else:
                with self._pass(phase, alone="perturbed" not in phases):
                    results.append(self._call(closure, phase, phases))
                if phase == "perturbed" or len(results) == 1:
                    self._note_loss("loss_perturbed" if phase == "perturbed" else "loss", results[-1])
        return results[0]

    def _is_skipped(self, phase: str) -> bool:
        """Whether to leave a phase out: the first pass left no gradient, and the step is a plain one."""
        if phase == "scale_phase":
            return not self.scales_due
        return phase in ("perturbed", "step_scales") and not self._has_gradients()

    def _pass(self, phase: str, alone: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of a pass in ``step(closure)``."""
        if phase == "perturbed":
            return self._perturbed()  # p stays at Q(w) + e until the update writes it
        if phase == "first_pass" and alone:
            return self._plain_pass()
        return self.first_pass() if phase == "first_pass" else self.scale_phase()

    def _observe(self, closure: Closure) -> tuple[Any, bool]:
        """Call ``closure`` once, restore buffers and random numbers, and return whether it ran a backward."""
        seen: list[Tensor] = []
        parameters = [p for p in self._parameters() if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(seen.append) for p in parameters]  # type: ignore[no-untyped-call]
        try:
            with buffers_kept(self._latents.root, *modules_of(closure)), same_random_numbers(RandomState.now()):
                return closure(), bool(seen)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _step_by_hand(self) -> None:
        """Step with the gradients of the passes that were made as blocks."""
        if not self._gradients_of and checkpoint.all_lr_zero(self.param_groups):
            zeros = checkpoint.no_gradient_but_zeros(self.param_groups)
            if not any_process(not zeros, self._parameters()):
                return self._create_state()
        if not self._has_gradients():
            raise RuntimeError("step() found no gradient: run a new backward before each step.")
        if self._gradients_of == "scale_phase":
            return self.step_scales()
        if needs_closure(self.base):
            raise TypeError(f"{type(self.base).__name__} calls its closure itself: use step(closure).")
        self._refuse_to_lose_micro_batches("step")
        if self._gradients_of != "perturbed" and "perturbed" in self.phases():
            self._warn_once(
                f"{type(self).__name__}.step() without first_pass() and perturbed() is a plain QAT step. A "
                "framework that does not hand its closure on (Lightning with 16-mixed, AcceleratedOptimizer) does this."
            )
        self._update()
        return None

    # --- gradients that a pass does not need --------------------------------------------------------------------

    def _needed(self, phase: str, phases: Sequence[str]) -> set[int]:
        """Return, by id, the Parameters whose gradients a pass is for: the perturbation's, the scales', or both."""
        needed: set[int] = set()
        if phase == "first_pass" and self.perturbation is not None:
            needed |= self.perturbation.selected(self._latents)
        if phase == "scale_phase" or phases[1] == "step_scales":
            needed |= {id(slot.parameter) for slot in self._latents.slots}
            needed |= {id(scale.parameter) for scale in self.scale_slots}
        return needed

    def _call(self, closure: Closure, phase: str, phases: Sequence[str]) -> Any:
        """Call ``closure``, without the gradients that the pass does not need if they can be left out safely.

        The first pass needs the gradients of what is perturbed, and the scales' pass those of the scales. Other
        parameters (an embedding, whose gradient is as large as itself) do not require a gradient meanwhile, and the
        backward ends above them. The very first pass computes all gradients, to see what the closure does.
        """
        is_for_update = phase == "perturbed" or ("perturbed" not in phases and phase != "scale_phase")
        if is_for_update or not self.skip_unused_gradients or self._may_skip is False:
            return closure()
        needed = self._needed(phase, phases)
        wanted = [p for p in self._parameters() if id(p) in needed and p.requires_grad]
        if self._may_skip is None or not wanted:
            loss = closure()
            if self._may_skip is None:
                self._may_skip = _has_plain_graph(loss) and any(p.grad is not None for p in wanted)
            return loss
        unused = [p for p in self._parameters() if id(p) not in needed and p.requires_grad and not _is_watched(p)]
        try:
            for p in unused:
                p.requires_grad_(False)
            return closure()
        except BaseException as error:
            self._may_skip = False
            error.add_note(
                "qsam had left out gradients of float parameters that this pass does not need. If that is the cause, "
                "build the optimizer with skip_unused_gradients=False; from now on this one leaves none out."
            )
            raise
        finally:
            for p in unused:
                p.requires_grad_(True)

    # --- the passes ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """The unperturbed pass, at Q(w): run forward and backward inside.

        Gradients accumulated so far are set aside, by reference, until :meth:`perturbed` puts them back.

        Raises:
            RuntimeError: It was called inside another block, or something other than this optimizer wrote the weights.
        """
        self._refuse_to_lose_micro_batches("another first_pass")
        self._see_new_batch("first_pass")
        ascends = self.blocks != ("first_pass",)  # in a plain step gradients add up as in any loop
        before = self._gradients_of
        if ascends:
            gradients = [(p, None if p.grad is None else owned_copy(p.grad)) for p in self._parameters()]
            self._drop_gradients()
            self._set_aside = gradients
        try:
            with (
                self._opened("first_pass"),
                self.ranks.first_pass() if ascends else contextlib.nullcontext(),
                self._latents.noise("first_pass", self._check_for_foreign_writes),
            ):
                yield
        except BaseException:
            self._put_back()
            self._first_seen.pop()
            self._gradients_of = before
            raise
        self._gradients_of = "first_pass" if self._has_gradients() else ""

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """The perturbed pass, at Q(w) + e: run forward and backward inside. Outside the model holds Q(w) again.

        The backward must run inside too, because a checkpointed forward is computed again during the backward.

        Raises:
            RuntimeError: It was called inside another block, or there are no gradients of a first pass.
        """
        try:
            with self._perturbed():
                yield
        finally:
            self._latents.end_perturbation()

    @contextlib.contextmanager
    def _perturbed(self) -> Iterator[None]:
        """The perturbed pass for an update that follows at once: p stays at Q(w) + e until the update writes it."""
        perturbation, latents = self.perturbation, self._latents
        if perturbation is None:
            raise RuntimeError(f"{type(self).__name__} has no perturbed pass: run one backward, then step().")
        self._refuse_inside_block("perturbed")
        self._refuse_second_point()
        passes, first = perturbation.passes(self.steps), self._gradients_of == "first_pass" and self._has_gradients()
        self._check_perturbed_may_come(passes, first)
        if not first:  # the direction is known: this pass is the first to see the batch
            self._see_new_batch("perturbed")
        try:
            with (
                self._opened("perturbed"),
                self._later_pass(self._first_seen[-1]) if first else contextlib.nullcontext(),
                frozen(),
                latents.noise("perturbed", self._check_for_foreign_writes),
            ):
                latents.open_block("perturbed")
                ascents = self._ascents(passes)
                perturbation.apply(latents, ascents, self._rho_of(), self._ascent_sign(), self.steps)
                del ascents  # frees the first pass's gradients, which are as large as all the weights
                if self._measure:
                    self._measured, self._measure = perturbation_figures(latents), False
                self._put_back()
                yield
        except BaseException:
            self._drop_gradients()
            raise
        finally:
            perturbation.restore_floats()
            latents.keep_perturbed()
        self._gradients_of = "perturbed"

    def _ascents(self, passes: int) -> list[Ascent]:
        assert self.perturbation is not None
        if passes == 2:
            return self.perturbation.gather(self._latents, self.base.state)
        return self.perturbation.gather_known(self._latents, self.base.state, self.steps)

    def _check_perturbed_may_come(self, passes: int, first: bool) -> None:
        if passes == 0:
            raise RuntimeError(
                f"step {self.steps} is not perturbed (`every`, `start`, or a direction that is not known yet): run the "
                "blocks that `optimizer.blocks` names, then step()."
            )
        if passes == 2 and not first:
            raise RuntimeError(
                "perturbed() needs gradients of a first pass: run backward inside `with "
                "optimizer.first_pass():` before."
            )

    @contextlib.contextmanager
    def scale_phase(self) -> Iterator[None]:
        """The pass of the scales, at Q(w) unperturbed: run forward and backward inside, then ``step_scales()``.

        Raises:
            RuntimeError: It was called inside another block, the method does not alternate, or something other than
                this optimizer wrote the weights.
        """
        self._refuse_inside_block("scale_phase")
        self._check_alternates("scale_phase")
        self._check_weights()
        self._refuse_to_lose_micro_batches("scale_phase")
        if self._gradients_of == "first_pass":
            raise RuntimeError(
                "scale_phase() found the gradients of first_pass(), which are not the scales': run perturbed() and "
                "step() before, or start again with zero_grad()."
            )
        if self._gradients_of == "perturbed":  # a GradScaler has skipped the step that they were for
            self._drop_gradients()
        start = self._first_seen.pop(0) if self._first_seen else None  # None: this pass is the first to see the batch
        try:
            with (
                self._opened("scale_phase"),
                contextlib.nullcontext() if start is None else self._later_pass(start),
                self._latents.noise("scale_phase", self._check_for_foreign_writes),
            ):
                yield
        except BaseException:
            self._drop_gradients()
            raise
        self._gradients_of = "scale_phase"

    @contextlib.contextmanager
    def _plain_pass(self) -> Iterator[None]:
        try:
            with self._latents.noise("step", self._check_for_foreign_writes):
                yield
        except BaseException:
            self._drop_gradients()
            raise

    def _see_new_batch(self, block: str) -> None:
        """Check that a pass may see a new batch, and remember the random state before it."""
        self._refuse_inside_block(block)
        self._refuse_second_point()
        self._check_weights()
        if not self._gradients_of or not self._has_gradients():  # the first micro-batch, also after a skipped step
            self._first_seen.clear()
        self._first_seen.append(RandomState.now())

    @contextlib.contextmanager
    def _opened(self, block: str) -> Iterator[None]:
        self._block = block
        try:
            yield
        finally:
            self._block = None

    @contextlib.contextmanager
    def _later_pass(self, start: RandomState) -> Iterator[None]:
        """Within a later pass over a batch, keep the buffers, and repeat the random numbers if they are shared."""
        models = (self._latents.root, *self.modules, *self._closure_modules)
        with buffers_kept(*models), same_random_numbers(start if self.rng == "shared" else None):
            yield

    def _put_back(self) -> None:
        for p, gradient in self._set_aside:
            p.grad = gradient
        self._set_aside = []

    def _drop_gradients(self) -> None:
        for p in self._parameters():
            p.grad = None
        self._set_aside = []
        self._gradients_of, self._latents.noisy = "", False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, as :meth:`torch.optim.Optimizer.zero_grad`; outside a block also those set aside."""
        super().zero_grad(set_to_none)
        if self._block is None:
            self._gradients_of, self._set_aside = "", []

    # --- the update ---------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Step w with the gradients in the Parameters, and s too unless it has a separate turn."""
        if self._latents.noises and not self._latents.noisy:
            self._warn_once(
                "noise quantizers draw inside first_pass(), perturbed(), scale_phase() and step(closure) only: this "
                "step's gradients were taken at the rounded weights."
            )
        self._apply_gradients(weights=True, scales=not (self.alternates and self._gradients_of == "perturbed"))

    def step_scales(self) -> None:
        """Step the scales with the gradients of :meth:`scale_phase` (of the first pass, if the schedule is fused).

        Raises:
            RuntimeError: The method does not alternate, or there are no new gradients.
        """
        self._check_alternates("step_scales")
        raise NotImplementedError

    @torch.no_grad()
    def _apply_gradients(self, *, weights: bool, scales: bool) -> None:
        """Pull the gradients back; step the latents, or the scales, or both; write Q(w)."""
        latents, perturbation = self._latents, self.perturbation
        self._check_weights()
        if weights and self.steps == 0 and (text := unseen_inputs(latents.coverage)):
            self._warn_once(text)
        try:
            if weights and perturbation is not None and perturbation.direction.learns:
                perturbation.direction.learn(perturbation.gather(latents, self.base.state))
            scale_grads = self._pull_back(weights=weights)
            step_scales = functools.partial(self._step_scales, scale_grads) if scales else None
            if weights:
                self._step_base(after=step_scales)
            elif step_scales is not None:
                step_scales()
        finally:
            # By now p may hold Q(w) + e, or the copy of w that the pull-back or the roll-back put there. Q(w) must be
            # back before the caller reads it, whatever has failed.
            self._clean_up()
        if weights:
            self._count_step()

    def _clean_up(self) -> None:
        for slot in self._latents.slots:
            slot.latent.grad = slot.inner_e = slot.parameter.grad = None
        self._latents.write()
        self._drop_gradients()

    def _count_step(self) -> None:
        self._latents.complete_scales()
        for slot in self._latents.slots:
            slot.move_state()
        if any(slot.quantizer.moves_grid for slot in self._latents.slots):
            self._latents.write()
        self._latents.move_input_noise(functools.partial(self.ranks.take_largest_, latents=self._latents))
        self.param_groups[0]["qsam_step"] += 1
        self.ranks.refuse_unequal(self._latents)

    def _pull_back(self, *, weights: bool) -> dict[int, Tensor]:
        """Return the scales' gradients by the id of the scale; if ``weights``, move dw from p to the latents."""
        owned = {id(p) for p in self._parameters()}
        for slot in self._latents.slots:
            if slot.parameter.grad is not None and id(slot.parameter) not in owned:
                raise RuntimeError(
                    f"the quantized weight {slot.path!r} has a gradient, but its Parameter is in no group: it was "
                    "unfrozen (call add_param_group), or replaced (build the optimizer afterwards)."
                )
        grads: dict[int, Tensor] = {}
        for slot, dw, ds in self._latents.pull_back(masked=weights and self.ste == "clipped"):
            if weights:
                slot.latent.grad, slot.parameter.grad = dw, None
            grads |= {id(getattr(slot.quantizer, name)): gradient for name, gradient in ds.items()}
        inputs = {id(s.parameter): s.parameter.grad for s in self.scale_slots if s.parameter.grad is not None}
        return grads | inputs

    def _step_base(self, closure: Closure | None = None, after: Callable[[], None] | None = None) -> Any:
        """Step the base on the latents; if it, or ``after``, fails, the latents are what they were before."""
        with pointed_at_latents(self.base, self._latents), self._latents.update(copies_in_p=closure is None):
            if closure is None:
                self._clip()
            result = self.base.step() if closure is None else self.base.step(closure)
            if after is not None:
                after()
            return result

    def _clip(self) -> None:
        if self.max_grad_norm is not None:
            owned = [p for group in self.base.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(owned, self.max_grad_norm)

    def _step_scales(self, grads: Mapping[int, Tensor]) -> None:
        """Step the scales' optimizer with these gradients, at their present rates."""
        if self.scale_base is None:
            return
        follow_base_(self.scale_base, self.param_groups, self.base, self._latents.slots, self.steps)
        for scale in self.scale_slots:
            gradient = grads.get(id(scale.parameter))
            scale.parameter.grad = -gradient if gradient is not None and self._ascent_sign() < 0 else gradient
        self.scale_base.step()
        for scale in self.scale_slots:
            scale.parameter.grad = None

    def _create_state(self) -> None:
        """Create the base's state and nothing else: torch.distributed.checkpoint asks for it with every lr at 0."""
        for slot in self._latents.slots:
            slot.latent.grad = torch.zeros_like(slot.latent)
        with pointed_at_latents(self.base, self._latents):
            self.base.step()
        self._step_scales({id(s.parameter): torch.zeros_like(s.parameter) for s in self.scale_slots})
        for slot in self._latents.slots:
            slot.latent.grad = None
        self._state_created = True

    # --- what users read and do ---------------------------------------------------------------------------------

    @property
    def coverage(self) -> Any:
        """The table of what is quantized, what is not, and why; None for a method without quantizers."""
        return self._latents.coverage

    @contextlib.contextmanager
    def latents(self) -> Iterator[None]:
        """Within this context the model holds the full-precision w: average them (EMA, SWA) or save them here."""
        self._refuse_inside_block("latents")
        follow_fsdp(self._latents, self.base)
        self._latents.check()
        with self._opened("latents"):
            self._latents.write_latents()
            try:
                yield
            finally:
                self._latents.write()

    def sync_latents(self) -> None:
        """Take the model's present weights as latents, and write Q(w). Call it after a merge, a load or a pruning."""
        self._refuse_inside_block("sync_latents")
        follow_fsdp(self._latents, self.base)
        self._latents.take_present_weights()
        checkpoint.balance_present_weights(self)

    def release(self) -> None:
        """Hand the model over to the next optimizer, with its scales and full-precision weights.

        The model keeps its quantizers and goes on holding Q(w). The next qsam optimizer that is built on it takes the
        latents of every weight that still holds Q of them, and the present weight elsewhere; until then the latents
        stay in memory with the model. A base optimizer that was given as an instance keeps its state and may be given
        to the next one. This optimizer can no longer be used.

        If nothing refers to an optimizer any more, no release is needed and the next one takes over, but the latents
        are lost.

        Raises:
            RuntimeError: It was called inside a block.
        """
        self._refuse_inside_block("release")
        follow_fsdp(self._latents, self.base)
        self._drop_gradients()
        self._latents.release(into_model=False)

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
        self._latents.guard.check_attached()
        found = {name: float(value) for name, value in self._losses.items()}
        if len(found) == 2:
            found["rise"] = found["loss_perturbed"] - found["loss"]
        if self.perturbation is not None and self.perturbation.norm is not None:
            found["direction_norm"] = float(self.perturbation.norm)
        self._measure = self.perturbation is not None and bool(self._latents.slots)
        return found | self._measured | noise_figures(self._latents)

    # --- a torch Optimizer --------------------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's and the scale optimizer's state by parameter, latents included; empty before the first step."""
        return checkpoint.merged_state(self)

    @state.setter
    def state(self, value: Any) -> None:
        """Ignore what torch's own ``__setstate__`` assigns, because the state lives in the two optimizers."""

    def state_dict(self) -> dict[str, Any]:
        """Return latents, scales, counters and both optimizers' state: tensors and plain Python types only.

        Raises:
            RuntimeError: It was called inside a block.
        """
        self._refuse_inside_block("state_dict")
        return checkpoint.packed(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or a bare base optimizer's. Load the model first, then this.

        The latents win over the model's weights and are written. A bare checkpoint has none: they start from the
        model's present weights, and a warning says so.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: It does not fit; nothing has been changed then.
            RuntimeError: It was called inside a block.
        """
        self._refuse_inside_block("load_state_dict")
        checkpoint.load(self, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; see :meth:`torch.optim.Optimizer.add_param_group`.

        Scales among its parameters are left to the scale optimizer, as at construction, and a warning says so.
        """
        self._latents.guard.check_attached()
        group = without_scales(param_group, self._latents)
        group["qsam_rho"] = self._take_rho(group, self.param_groups[0]["qsam_rho"])
        self.base.add_param_group(group)
        self.param_groups.append(self.base.param_groups[-1])

    def _take_rho(self, group: dict[str, Any], default: float) -> float:
        """Remove a group's radius and return it: its "rho", or "qsam_rho" if the base has a "rho" too (Adadelta)."""
        if self.perturbation is not None and "rho" not in self.base.defaults:
            default = group.pop("rho", default)
        return checked_rho(group.pop("qsam_rho", default))

    def __getstate__(self) -> dict[str, Any]:
        """Keep everything except the wrapper that a scheduler put around ``step``."""
        return {k: v for k, v in self.__dict__.items() if k not in {"step", "_opt_called"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and own the latents of the restored model."""
        super().__setstate__(state)
        self._latents.set_owner(self)

    def _release(self) -> None:
        if self._latents.sharded:
            raise RuntimeError(
                "dequantize_ cannot take the scales out of a sharded model: gather its state_dict and load it into an "
                "unsharded copy of the model first."
            )
        self._latents.release(into_model=True)

    # --- small questions ----------------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._parameters())

    def _rho_of(self) -> Callable[[nn.Parameter], float]:
        follows_lr = self.perturbation is not None and self.perturbation.direction.follows_lr
        units = [float(group.get("lr") or 0.0) if follows_lr else 1.0 for group in self.param_groups]
        radius = [float(group.get("qsam_rho", 0.0)) * u for group, u in zip(self.param_groups, units, strict=True)]
        radii = {id(p): r for group, r in zip(self.param_groups, radius, strict=True) for p in group["params"]}
        return lambda p: radii.get(id(p), radius[0])

    def _ascent_sign(self) -> float:
        return -1.0 if self.param_groups[0].get("maximize", False) else 1.0

    def _refuse_to_lose_micro_batches(self, verb: str) -> None:
        """Refuse to go on if a first pass has set gradients aside and no perturbed pass has put them back."""
        if self._block is None and any(gradient is not None for _, gradient in self._set_aside):
            raise RuntimeError(
                f"{verb}() would lose gradients: first_pass() has set those of earlier passes aside until perturbed() "
                "adds to them, and perturbed() is missing. Run it, or start again with zero_grad()."
            )

    def _check_alternates(self, verb: str) -> None:
        if not self.alternates:
            raise RuntimeError(f"{type(self).__name__} steps weights and scales together: {verb}() belongs to SQuAT.")

    def _check_weights(self) -> None:
        """Raise if something other than this optimizer wrote the weights; all processes check and raise together."""
        self._join_processes()
        self._check_for_foreign_writes()

    def _check_for_foreign_writes(self) -> None:
        self._latents.check(lambda flag: self.ranks.any(flag, self._latents))

    def _join_processes(self) -> None:
        """Follow the model into ``fully_shard``, and take rank 0's latents in a process group that is new."""
        if in_process_group():
            follow_fsdp(self._latents, self.base)
            self.ranks.share_rank_0(self._latents, self.steps, self.param_groups)

    def _refuse_inside_block(self, verb: str) -> None:
        if "_latents" not in vars(self):  # Lightning's proxy borrows our methods, and would keep what they write
            raise RuntimeError(
                f"{verb}() was called on a wrapper of the optimizer: use qsam.unwrap(optimizer).{verb}()."
            )
        self._latents.guard.check_attached()
        if self._block is not None:
            raise RuntimeError(f"{verb}() inside the block {self._block}(): leave the block first.")

    def _refuse_second_point(self) -> None:
        """Refuse to accumulate gradients that are pulled back at different points; clear e after a skipped step."""
        for slot in self._latents.slots:
            grad = slot.parameter.grad
            if slot.inner_e is not None and grad is not None and bool(local(grad).any()):
                raise RuntimeError(
                    "another pass before step(): SAQ's case 2 pulls back at w + e, and each micro-batch has its own e. "
                    "Accumulate inside one closure, or use case 3."
                )
            slot.inner_e = None

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, UserWarning, stacklevel=4)

    def _note_loss(self, name: str, loss: Any) -> None:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses[name] = loss.detach()
        elif isinstance(loss, int | float):
            self._losses[name] = float(loss)


def _description(latents: Latents) -> dict[str, str]:
    found = {s.path: f"{type(s.quantizer).__name__}({s.quantizer.extra_repr()})" for s in latents.slots}
    for row in latents.coverage.inputs if latents.coverage is not None else ():
        if row.quantizer is not None:  # its sign is not part of its identity: the first batch decides it
            found[f"{row.name}.input".lstrip(".")] = f"{type(row.quantizer).__name__}(bits={row.quantizer.bits})"
    return found


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules())


def _is_watched(p: nn.Parameter) -> bool:
    """Whether a hook on a parameter needs its gradient."""
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


def _has_plain_graph(loss: Any) -> bool:
    """Whether gradients may be left out: one process, and a graph without a node that reads ``requires_grad``."""
    if in_process_group() or not isinstance(loss, Tensor) or loss.grad_fn is None:
        return False
    seen, left = {loss.grad_fn}, [loss.grad_fn]
    while left:  # the nodes of a graph outlive the backward
        node = left.pop()
        if any(word in node.name() for word in _READS_REQUIRES_GRAD):
            return False
        below = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= below
        left += below
    return True


OPTIMIZERS: Registry[QuantizedOptimizer] = Registry("optimizer")
"""All methods by name: "qat", "sam", "joint", "saq", "squat"."""

register_optimizer = OPTIMIZERS.register
