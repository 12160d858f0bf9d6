"""The passes of a step by hand: first pass, perturbed pass, scale phase; and the order they may come in."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from qsam.inputs import frozen
from qsam.optim.diagnostics import perturbation_figures
from qsam.optim.perturbation import Perturbation
from qsam.optim.ranks import Ranks, owned_copy
from qsam.optim.snapshot import RandomState, buffers_kept, same_random_numbers
from qsam.shards import in_process_group, local

if TYPE_CHECKING:
    from qsam.latent import Latents


class Passes:
    """The blocks of an optimizer, and what has to be remembered between them."""

    latents_of: Latents
    base: Optimizer
    perturbation: Perturbation | None
    param_groups: list[dict[str, Any]]
    ranks: Ranks
    rng: str

    @property
    def steps(self) -> int:
        """Number of steps of the weights so far."""
        return int(self.param_groups[0]["qsam_step"])

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that are due, in order: what a loop by hand runs forward and backward in, then ``step()``.

        A step of two passes is ``("first_pass", "perturbed")``; one whose direction is known, ``("perturbed",)``; one
        that ``every`` or ``start`` leave out, ``("first_pass",)``. When SQuAT's scales have their turn it is
        ``("scale_phase",)``: ``"same_batch"`` has it after the step, ``"next_batch"`` before the next one.
        """
        passes = 0 if self.perturbation is None else self.perturbation.passes(self.steps)
        return (("first_pass",), ("perturbed",), ("first_pass", "perturbed"))[passes]

    @property
    def scales_due(self) -> bool:
        """Whether the scales have a turn of their own now: never, in a method that does not alternate."""
        return False

    def _start_passes(self) -> None:
        self._block: str | None = None
        self._ascent_ready = False
        self._perturbed = False
        self._scales_turn = False
        self._passes_made = 0
        self._aside: list[tuple[nn.Parameter, Tensor | None]] = []
        self._random_starts: list[RandomState] = []
        self._losses: dict[str, Tensor | float] = {}
        self._measure = False
        self._measured: dict[str, float] = {}
        self._said: set[str] = getattr(self, "_said", set())

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """The unperturbed pass, at Q(w): run forward and backward inside.

        Gradients accumulated so far are set aside, by reference, until :meth:`perturbed` puts them back.

        Raises:
            RuntimeError: inside another block, or after somebody else wrote the weights.
        """
        self._refuse_inside_block("first_pass")
        self._refuse_second_shift()
        self._check_guard()
        self._note_random_start()
        perturbed, self._scales_turn = self._perturbed, False
        if self.blocks != ("first_pass",):  # in a step without perturbation gradients add up as in any loop
            self._set_aside()
        self._block, self._ascent_ready = "first_pass", False
        try:
            with self.ranks.first_pass(), self.latents_of.noise("first_pass", self._look):
                yield
            self._ascent_ready = self._has_gradients()
        except BaseException:
            self._put_back()
            self._perturbed = perturbed
            self._random_starts.pop()
            raise
        finally:
            self._block = None
        self._passes_made += 1

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """The perturbed pass, at Q(w) + e: run forward and backward inside. Outside the model holds Q(w) again.

        The backward must run inside too: torch does not notice a checkpointed forward whose backward comes later.

        Raises:
            RuntimeError: inside another block, or without gradients of a first pass.
        """
        try:
            with self._perturbed_pass():
                yield
        finally:
            self.latents_of.end_shift()

    @contextlib.contextmanager
    def _perturbed_pass(self) -> Iterator[None]:
        """What :meth:`perturbed` does, for an update that follows at once: p stays at Q(w) + e until it writes."""
        perturbation = self._begin_perturbed()
        known = perturbation.passes(self.steps) == 1
        alone = known and not self._ascent_ready
        self._block, self._ascent_ready = "perturbed", False
        try:
            with (
                contextlib.nullcontext() if alone else self._later_pass(self._random_starts[-1]),
                frozen(),
                self.latents_of.noise("perturbed", self._look),
            ):
                self.latents_of.open_block("perturbed")
                gather = perturbation.gather_known if known else perturbation.gather
                ascents = gather(self.latents_of, self.base.state)
                perturbation.apply(self.latents_of, ascents, self._rho_of(), self._ascent_sign(), self.steps)
                del ascents  # else the first pass's gradients would live through this one: a copy of all the weights
                if self._measure:
                    self._measured, self._measure = perturbation_figures(self.latents_of), False
                self._put_back()
                yield
        except BaseException:
            self._clear_gradients()
            raise
        finally:
            perturbation.restore_floats()
            self.latents_of.leave_shifted()
            self._block = None
        self._perturbed = True

    def _begin_perturbed(self) -> Perturbation:
        """Check that a perturbed pass may come now; in a step of one pass it is the first to see the batch."""
        if self.perturbation is None:
            raise RuntimeError(f"{type(self).__name__} has no perturbed pass: run one backward, then step().")
        self._refuse_inside_block("perturbed")
        self._refuse_second_shift()
        self._scales_turn = False
        passes = self.perturbation.passes(self.steps)
        if passes == 0:
            raise RuntimeError(
                f"step {self.steps} is not perturbed (`every`, `start`, or a direction that is not known yet): run the "
                "blocks that `optimizer.blocks` names, then step()."
            )
        if passes == 1:
            if not self._ascent_ready:
                self._check_guard()
                self._note_random_start()
        elif not (self._ascent_ready and self._has_gradients()):
            raise RuntimeError(
                "perturbed() needs gradients of a first pass: run backward inside `with "
                "optimizer.first_pass():` before."
            )
        return self.perturbation

    @contextlib.contextmanager
    def scale_phase(self) -> Iterator[None]:
        """The pass of the scales, at Q(w) unperturbed: run forward and backward inside, then ``step_scales()``.

        Raises:
            RuntimeError: inside another block, in a method that does not alternate, or after somebody else wrote the
                weights.
        """
        self._refuse_inside_block("scale_phase")
        self._check_alternates("scale_phase")
        self._check_guard()
        if self._perturbed:  # a GradScaler skipped the weights' step: their gradients are not the scales'
            self._clear_gradients()
        start = self._random_starts.pop(0) if self._random_starts else None
        self._block = "scale_phase"
        try:
            # Without a start the batch is its own: this is the first pass that sees it.
            with contextlib.nullcontext() if start is None else self._later_pass(start):
                with self.latents_of.noise("scale_phase", self._look):
                    yield
        except BaseException:
            self._clear_gradients()
            raise
        finally:
            self._block = None
        self._passes_made += 1
        self._scales_turn = True

    def step_scales(self) -> None:
        """Step the scales with the gradients of :meth:`scale_phase` (of the first pass, where the schedule is fused).

        Raises:
            RuntimeError: in a method that does not alternate, or without new gradients.
        """
        self._check_alternates("step_scales")
        raise NotImplementedError

    def _check_alternates(self, verb: str) -> None:
        raise RuntimeError(f"{type(self).__name__} steps weights and scales together: {verb}() belongs to SQuAT.")

    def _check_guard(self) -> None:
        """Refuse to start where somebody else wrote the weights; a write through ``.data`` shows at the update.

        All processes of the training look, and raise together.
        """
        self._meet()
        self._look()

    def _look(self) -> None:
        self.latents_of.check(lambda flag: self.ranks.any(flag, self.latents_of))

    @contextlib.contextmanager
    def _plain_pass(self) -> Iterator[None]:
        """The pass of a step without perturbation, with noise where there is some."""
        try:
            with self.latents_of.noise("step", self._look):
                yield
        except BaseException:
            self._clear_gradients()
            raise

    def _meet(self) -> None:
        """Follow the model into ``fully_shard``, and take rank 0's latents in a process group that is new."""
        if in_process_group():
            self.latents_of.settle(self.base)
            self.ranks.meet(self.latents_of, self.steps, self.param_groups)

    def _refuse_second_shift(self) -> None:
        """Refuse to accumulate gradients that are pulled back at different points; forget those of a skipped step."""
        for slot in self.latents_of.slots:
            grad = slot.parameter.grad
            if slot.shift is not None and grad is not None and bool(local(grad).any()):
                raise RuntimeError(
                    "another pass before step(): SAQ's case 2 pulls back at w + e, and each micro-batch has its own e. "
                    "Accumulate inside one closure, or use case 3."
                )
            slot.shift = None

    def _note_random_start(self) -> None:
        """Remember the random state in which this batch is seen first, one a micro-batch."""
        # Without accumulated gradients this is the first micro-batch, also after a step that a GradScaler skipped.
        if not self._passes_made or not self._has_gradients():
            self._random_starts.clear()
        self._random_starts.append(RandomState.now())

    @contextlib.contextmanager
    def _later_pass(self, start: RandomState) -> Iterator[None]:
        """A pass that leaves buffers as they were, and random generators too if they are shared."""
        with buffers_kept(self.latents_of.root), same_random_numbers(start if self.rng == "shared" else None):
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, as :meth:`torch.optim.Optimizer.zero_grad`; outside a block its pass is void then."""
        super().zero_grad(set_to_none)  # type: ignore[misc]
        if self._block is None:
            self._perturbed = self._ascent_ready = self._scales_turn = False

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _set_aside(self) -> None:
        self._aside = [(p, None if p.grad is None else owned_copy(p.grad)) for p in self._parameters()]
        self._clear_gradients()

    def _put_back(self) -> None:
        for p, grad in self._aside:
            p.grad = grad
        self._aside = []

    def _clear_gradients(self) -> None:
        for p in self._parameters():
            p.grad = None
        self._perturbed = self._ascent_ready = self._scales_turn = self.latents_of.noisy = False

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._parameters())

    def _rho_of(self) -> Callable[[nn.Parameter], float]:
        follows_lr = self.perturbation is not None and self.perturbation.direction.follows_lr
        units = [float(group.get("lr") or 0.0) if follows_lr else 1.0 for group in self.param_groups]
        radius = [
            float(group.get("qsam_rho", 0.0)) * unit for group, unit in zip(self.param_groups, units, strict=True)
        ]
        radii = {id(p): r for group, r in zip(self.param_groups, radius, strict=True) for p in group["params"]}
        fallback = radius[0]
        return lambda p: radii.get(id(p), fallback)

    def _ascent_sign(self) -> float:
        return -1.0 if self.param_groups[0].get("maximize", False) else 1.0

    def _refuse_inside_block(self, verb: str) -> None:
        if "latents_of" not in vars(self):  # a proxy of Lightning's borrows our methods and keeps what they write
            raise RuntimeError(
                f"{verb}() was called on a wrapper of the optimizer: use qsam.unwrap(optimizer).{verb}()."
            )
        self.latents_of.guard.check_attached()
        if self._block is not None:
            raise RuntimeError(f"{verb}() inside the block {self._block}(): leave the block first.")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, UserWarning, stacklevel=4)

    def _note_loss(self, name: str, loss: Any) -> None:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses[name] = loss.detach()
        elif isinstance(loss, int | float):
            self._losses[name] = float(loss)
