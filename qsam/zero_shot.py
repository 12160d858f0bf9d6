"""Zero-shot quantization-aware training: ZSAQ's SAM-SGA, which needs a teacher and a generator, and no data.

    min_theta  max_{||e|| <= rho}  max_omega  D(T(x), Q_{theta + e}(x)),    x = G_omega(z)

T is the full-precision teacher, Q the quantized student with weights theta, G the generator, z a random draw. One
iteration, with ``order="student_first"``:

    student      theta takes a step of its optimizer on D at a fixed x; a sharpness-aware one perturbs by e
    generator    omega <- omega + eta * dD/domega at a new z; the gradient runs through T and Q, which rest
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Adam, Optimizer

from qsam.batches import in_eval_mode
from qsam.layers import unwrap_model
from qsam.optim import SAQ, unwrap
from qsam.optim.optimizer import PASSES
from qsam.optim.snapshot import RandomState, buffers_kept, same_random_numbers

PLAYERS = {"student_first": "sg", "generator_first": "gs", "together": "t"}
SEES = ("theta", "theta+e")
COUNTS = ("iterations", "student_steps", "generator_steps", "student_passes", "generator_passes")

SEED_STRIDE = 16_000_057
"""Between the numbers of two seeds. A generator of torch takes 32 bits of a seed, so z repeats after 2^31 steps."""

Sample = Callable[[torch.Generator], Any]
"""x = G(z), with its graph, for the z that the random generator gives."""

Objective = Callable[[Any], Tensor]
"""D(T(x), Q(x)) at the weights that the student has now: a scalar with its graph."""


class GameOver(RuntimeError):
    """The game cannot go on: the message says why, and what to change."""


# --- the optimizer ----------------------------------------------------------------------------------------------------


class SamSga:
    """Sharpness-aware minimization by the student, stochastic gradient ascent by the generator.

    Args:
        student_optimizer: An optimizer of qsam: ``SAQ`` and ``SQuAT`` perturb, ``QAT`` is plain adversarial
            distillation, ``SAM`` trains a float student.
        generator_optimizer: A torch optimizer over the generator's parameters. It ascends, with ``maximize=True`` and
            without. None: the generator is frozen.
        order: ``"student_first"`` or ``"generator_first"``: in turns, each with a z of its own. ``"together"``: both
            step from one z and one pass.
        student_steps: Steps of the student per iteration, >= 1; with ``"together"`` 1.
        generator_steps: Steps of the generator per iteration, >= 0; with ``"together"`` 1.
        generator_sees: ``"theta"``: the generator's gradient is taken at the student's weights. ``"theta+e"``: at its
            perturbed weights; a turn of its own then takes one more pass, which gives e on the generator's x.
        seed: Every z follows from the seed, the player and the number of its step.

    Attributes:
        history: One entry per iteration: ``"divergence"``, D in the student's first pass; ``"generator_divergence"``, D
            before the generator's step; and under :func:`distill` the figures of x, ``"spread"`` and ``"outside"``.

    Raises:
        TypeError: The first optimizer is not qsam's, the second not torch's, or a number is not an integer.
        ValueError: An argument has a value outside its range.

    Example:
        >>> import torch
        >>> student, generator = nn.Linear(4, 3), nn.Linear(2, 4)
        >>> teacher = copy.deepcopy(student)
        >>> optimizer = SamSga(SAQ(student, Adam, lr=0.01), Adam(generator.parameters(), lr=0.01))
        >>> sample = lambda chance: generator(torch.randn(8, 2, generator=chance))
        >>> D = optimizer.step(sample, lambda x: (teacher(x) - student(x)).square().mean())
        >>> optimizer.student_passes, optimizer.generator_passes
        (2, 1)

    References:
        Zhu et al., ZSAQ, EMNLP 2023. docs/methods/zero_shot.md says which choices are sourced and which are ours.
    """

    def __init__(
        self,
        student_optimizer: Optimizer,
        generator_optimizer: Any,
        *,
        order: str = "student_first",
        student_steps: int = 1,
        generator_steps: int = 1,
        generator_sees: str = "theta",
        seed: int = 0,
    ) -> None:
        self.student_optimizer, self.generator_optimizer = unwrap(student_optimizer), generator_optimizer
        if not isinstance(generator_optimizer, Optimizer | None):
            kind = type(generator_optimizer).__name__
            raise TypeError(f"`generator_optimizer` must be a torch optimizer, or None for a frozen one, got {kind}.")
        for name, value, known in (("order", order, list(PLAYERS)), ("generator_sees", generator_sees, SEES)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        _check_integers(1, student_steps=student_steps)
        _check_integers(0, generator_steps=generator_steps, seed=seed)
        if order == "together" and (student_steps, generator_steps) != (1, 1):
            raise ValueError('order="together" is one step of both: leave `student_steps` and `generator_steps` at 1.')
        self.settings: dict[str, Any] = {
            "order": order, "student_steps": student_steps, "generator_steps": generator_steps,
            "generator_sees": generator_sees, "seed": seed,
        }  # fmt: skip
        self.iterations = self.student_steps = self.generator_steps = self.student_passes = self.generator_passes = 0
        self.history: list[dict[str, float]] = []

    def step(self, sample: Sample, divergence: Objective) -> float:
        """Run one iteration, and return D in the first pass of the student's last step.

        Args:
            sample: ``sample(chance)`` returns x = G(z), with its graph.
            divergence: ``divergence(x)`` returns D(T(x), Q(x)), a scalar.

        Raises:
            GameOver: D is not finite. The step in which that was seen has not been taken.
        """
        entry: dict[str, float] = {}
        for player in PLAYERS[self.settings["order"]]:
            if player == "t":
                entry["divergence"] = self._step_together(sample, divergence)
            elif player == "s":
                for _ in range(self.settings["student_steps"]):
                    entry["divergence"] = self._step_student(sample, divergence)
            elif self.generator_optimizer is not None:
                for _ in range(self.settings["generator_steps"]):
                    entry["generator_divergence"] = self.ascend(sample, divergence)
        self.iterations += 1
        self.history.append(entry)
        return entry["divergence"]

    def ascend(self, sample: Sample, divergence: Objective) -> float:
        """Take one step of the generator, and return D before it; for a loop that steps the student itself.

        The student's weights, gradients and buffers and the random generators stay as they were.
        """
        optimizer, first = self.student_optimizer, "first_pass" in self.student_optimizer.blocks
        with buffers_kept(optimizer._latents.root), same_random_numbers(RandomState.now()):
            x = sample(self._chance("generator"))
            if self.settings["generator_sees"] == "theta" or "perturbed" not in optimizer.blocks:
                loss, gradients = self._uphill(divergence(x))
                self.generator_passes += 1
            else:
                optimizer.zero_grad()
                try:
                    if first:
                        with optimizer.first_pass():
                            _backward(divergence(detached(x)), "generator")
                    with optimizer.perturbed():
                        loss, gradients = self._uphill(divergence(x))
                finally:
                    optimizer.zero_grad()  # the student does not step
                self.generator_passes += 1 + first
        self._step_generator(gradients)
        return loss

    def _uphill(self, loss: Tensor) -> tuple[float, list[Tensor | None]]:
        """Return D and its gradients by the generator's parameters; those of the student are not computed."""
        _check_finite(loss, "generator")
        trained = self._trained()
        gradients: list[Tensor | None] = []
        if loss.requires_grad and trained:
            gradients += torch.autograd.grad(loss, trained, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                "D does not depend on a trainable parameter of the generator: give its parameters to "
                "`generator_optimizer` and return x with its graph, or freeze it with generator_optimizer=None."
            )
        return loss.item(), gradients

    def _step_student(self, sample: Sample, divergence: Objective) -> float:
        """Step the student on one x, which all its passes see; return D of the first."""
        with torch.no_grad():
            x = detached(sample(self._chance("student")))

        def closure() -> Tensor:
            self.student_optimizer.zero_grad()
            self.student_passes += 1
            return _backward(divergence(x), "student")

        loss = float(self.student_optimizer.step(closure).detach())
        self.student_steps += 1
        return loss

    def _step_together(self, sample: Sample, divergence: Objective) -> float:
        """Step both players from one z; the pass whose weights the generator is to see gives its gradients too."""
        passes = [phase for phase in self.student_optimizer.phases() if phase in PASSES]
        perturbed = self.settings["generator_sees"] == "theta+e" and "perturbed" in passes
        seen, calls = passes.index("perturbed") if perturbed else 0, 0
        trained, gradients = self._trained(), list[Tensor | None]()

        def closure() -> Tensor:
            nonlocal calls
            self.student_optimizer.zero_grad()
            with torch.set_grad_enabled(calls == seen):
                x = sample(self._chance("student"))
            loss = _backward(divergence(x if calls == seen else detached(x)), "student")
            if calls == seen:
                gradients[:] = [p.grad for p in trained]
                for p in trained:
                    p.grad = None
            calls += 1
            self.student_passes += 1
            return loss

        loss = float(self.student_optimizer.step(closure).detach())
        self.student_steps += 1
        if gradients:
            self._step_generator(gradients)
        return loss

    def _step_generator(self, gradients: Sequence[Tensor | None]) -> None:
        """Step omega up these gradients of its trainable parameters."""
        assert self.generator_optimizer is not None
        left = iter(gradients)
        for group in self.generator_optimizer.param_groups:
            for p in group["params"]:
                gradient = next(left) if p.requires_grad else None
                p.grad = gradient if gradient is None or group.get("maximize", False) else -gradient
        self.generator_optimizer.step()
        self.generator_optimizer.zero_grad()
        self.generator_steps += 1

    def _trained(self) -> list[nn.Parameter]:
        groups = [] if self.generator_optimizer is None else self.generator_optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _chance(self, player: str) -> torch.Generator:
        """Return the random generator of a player's next z, so that no draw depends on what the other one does."""
        number = 2 * self.student_steps if player == "student" else 2 * self.generator_steps + 1
        return torch.Generator().manual_seed((SEED_STRIDE * self.settings["seed"] + number) % 2**32)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers, the counts and the history; student and generator are saved apart."""
        generator = None if self.generator_optimizer is None else self.generator_optimizer.state_dict()
        counts = {name: getattr(self, name) for name in COUNTS}
        return {"student": self.student_optimizer.state_dict(), "generator": generator, "counts": counts,
                "history": copy.deepcopy(self.history), "settings": dict(self.settings)}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, after student and generator: the game goes on as if never stopped.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: It does not fit; nothing is changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"`state_dict` must be what SamSga.state_dict() returned, got {type(state_dict).__name__}.")
        if missing := {"student", "generator", "counts", "history", "settings"} - set(state_dict):
            raise ValueError(f"the checkpoint has no {min(missing)!r}: it is not a state_dict of SamSga.")
        there, here = state_dict["settings"], self.settings
        if changed := [name for name, value in here.items() if there.get(name) != value]:
            words = ", ".join(f"{name} is {there.get(name)!r} there and {here[name]!r} here" for name in changed)
            raise ValueError(f"the checkpoint is of another game: {words}. Build SamSga with the same settings.")
        if (state_dict["generator"] is None) != (self.generator_optimizer is None):
            where = "there" if state_dict["generator"] is None else "here"
            raise ValueError(f"the generator is frozen {where} only: build SamSga with the same `generator_optimizer`.")
        kept = None if self.generator_optimizer is None else copy.deepcopy(self.generator_optimizer.state_dict())
        try:
            if self.generator_optimizer is not None:
                self.generator_optimizer.load_state_dict(state_dict["generator"])
            self.student_optimizer.load_state_dict(state_dict["student"])
        except BaseException:
            if self.generator_optimizer is not None:
                self.generator_optimizer.load_state_dict(kept)
            raise
        for name in COUNTS:
            setattr(self, name, state_dict["counts"][name])
        self.history = copy.deepcopy(state_dict["history"])


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a game has failed; each of the first two must hold for ``patience`` iterations in a row.

    Attributes:
        min_spread: The rows of x differ by less than this share of their root mean square: the generator collapsed.
        max_outside: A larger share of x is where no real input can be, as ``generator.outside`` says.
        max_growth: The mean of D over ``patience`` iterations has grown by more than this factor over the first ones.
        patience: Iterations, >= 1.
    """

    min_spread: float = 0.01
    max_outside: float = 0.5
    max_growth: float = 100.0
    patience: int = 20

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_integers(1, patience=self.patience)
        _check_finite_numbers(min_spread=self.min_spread, max_outside=self.max_outside, max_growth=self.max_growth)

    def alarm(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Return what has failed and its cure, or None."""
        last, lower = history[-self.patience :], "Lower its learning rate, or"
        if len(last) < self.patience:
            return None
        if all(entry.get("spread", math.inf) < self.min_spread for entry in last):
            return (
                f"the generator has collapsed: for {self.patience} iterations its rows have differed by less than "
                f"{self.min_spread:g} of their size. {lower} take fewer `generator_steps`."
            )
        if all(entry.get("outside", 0.0) > self.max_outside for entry in last):
            return (
                f"the generator has left the range of real inputs: for {self.patience} iterations more than "
                f"{self.max_outside:.0%} of what it makes has been outside. {lower} use soft or hard tokens."
            )
        start, now = (sum(entry["divergence"] for entry in part) for part in (history[: self.patience], last))
        if now > self.max_growth * start:
            return f"the generator wins: D has grown {now / start:.3g} times. {lower} take more `student_steps`."
        return None

    def is_good(self, entry: Mapping[str, float]) -> bool:
        """Whether an iteration's x gives no reason for an alarm."""
        return entry.get("spread", math.inf) >= self.min_spread and entry.get("outside", 0.0) <= self.max_outside


@dataclasses.dataclass(frozen=True)
class Report:
    """How a game went: its counts, the history of D, and, if it failed, why it was ``stopped``.

    A pass is one forward and backward of a batch through the student; ``teacher_passes`` are forwards of the teacher,
    in the generator's turn with a backward. The student that is left is that after ``good_iteration``.
    """

    iterations: int
    student_steps: int
    generator_steps: int
    student_passes: int
    generator_passes: int
    teacher_passes: int
    history: list[dict[str, float]]
    stopped: str | None
    good_iteration: int


def distill(
    teacher: nn.Module,
    student: nn.Module,
    generator: Any,
    optimizer: SamSga | None = None,
    *,
    divergence: str | Callable[[Any, Any], Tensor] = "auto",
    steps: int,
    rows: int = 32,
    batchnorm: float = 0.0,
    limits: Limits | None = None,
    keep_every: int = 50,
    after_step: Callable[[SamSga], None] | None = None,
) -> Report:
    """Train a quantized student to answer as its teacher does, on inputs that a generator makes.

    The teacher runs in eval mode, on its parameters without a gradient and on copies of its buffers: it stays as it is,
    its mode included. The student and the generator run in the mode that they are in. No step reads data.

    Args:
        teacher: The full-precision model.
        student: The model that ``optimizer`` trains: a copy of the teacher, quantized.
        generator: A module with ``draw(rows, chance) -> z`` and ``forward(z) -> x``, x a tensor, a tuple of arguments
            or a dict of keywords for both models; see :mod:`qsam.generators`. It may have ``outside(x) -> float``, the
            share of x that real inputs cannot reach.
        optimizer: A :class:`SamSga` on ``student``. None: SAQ around Adam with lr 1e-5 and rho 0.1 for the student, and
            Adam with lr 1e-4 for the generator.
        divergence: ``"kl"``: KL(T || Q) of the outputs, the mean over rows and positions. ``"mse"``: their squared
            error. ``"auto"``: the former, or the latter if there is one output. Or a function of both answers, such as
            ``Divergence(hidden=1.0)``.
        steps: Iterations in all. Those that ``optimizer`` has behind it count, so that the same call resumes.
        rows: Rows per batch, >= 2.
        batchnorm: The generator also lowers this weight times the squared distance of mean and variance of each
            BatchNorm's input in the teacher from its running statistics.
        limits: When the game has failed. Then the last good student is put back, and a warning says why.
        keep_every: Iterations between copies of a good student, of which the last is kept.
        after_step: Called with ``optimizer`` after each iteration: to save, or to log ``optimizer.history[-1]``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value outside its range, or teacher and student share a parameter.
    """
    _check_players(teacher, student, generator)
    _check_integers(0, steps=steps)
    _check_integers(1, keep_every=keep_every)
    optimizer = optimizer or SamSga(SAQ(student, Adam, lr=1e-5, rho=0.1), Adam(generator.parameters(), lr=1e-4))
    if unwrap_model(optimizer.student_optimizer._latents.root) is not unwrap_model(student):
        raise ValueError("`optimizer` trains another model than `student`: build its student_optimizer on `student`.")
    game = Game(teacher, student, generator, divergence, rows=rows, batchnorm=batchnorm)
    limits, good, stopped = limits or Limits(), _copied(student, optimizer), None
    with in_eval_mode(teacher):
        while optimizer.iterations < steps and stopped is None:
            try:
                optimizer.step(game.sample, game)
            except GameOver as failure:
                stopped = str(failure)
                break
            optimizer.history[-1] |= game.figures
            stopped = limits.alarm(optimizer.history)
            if optimizer.iterations % keep_every == 0 and limits.is_good(optimizer.history[-1]) and stopped is None:
                good = _copied(student, optimizer)
            if after_step is not None:
                after_step(optimizer)
    good_iteration = optimizer.iterations
    if stopped is not None:
        good_iteration = good[0]
        student.load_state_dict(good[1])
        optimizer.student_optimizer.load_state_dict(good[2])
        stopped = f"{stopped} The student is that of iteration {good_iteration}."
        warnings.warn(f"zero-shot training ended after {optimizer.iterations} iterations: {stopped}", stacklevel=2)
    return Report(**{name: getattr(optimizer, name) for name in COUNTS}, teacher_passes=game.teacher_passes,
                  history=optimizer.history, stopped=stopped, good_iteration=good_iteration)  # fmt: skip


class Game:
    """D(T(x), Q(x)) as a function of x; the teacher answers once for all passes that see the same x."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: Any, divergence: Any = "auto", *, rows: int,
        batchnorm: float = 0.0,
    ) -> None:  # fmt: skip
        _check_integers(2, rows=rows)
        _check_finite_numbers(batchnorm=batchnorm)
        self.teacher, self.student, self.generator, self.rows = teacher, student, generator, rows
        self.divergence = divergence if callable(divergence) else Divergence(divergence)
        norms = [m for m in teacher.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        if batchnorm and not norms:
            raise ValueError("`batchnorm` needs a teacher with BatchNorm and running statistics: leave it at 0.")
        self.batchnorm, self.norms = batchnorm, norms if batchnorm else []
        self._tensors = {name: p.detach() for name, p in teacher.named_parameters()}
        self._tensors |= {name: buffer.clone() for name, buffer in teacher.named_buffers()}
        self._x: Any = None
        self._answer: Any = None
        self.figures: dict[str, float] = {}
        self.teacher_passes = 0

    def sample(self, chance: torch.Generator) -> Any:
        """Return x = G(z), and keep its figures."""
        x = self.generator(self.generator.draw(self.rows, chance))
        outside = getattr(self.generator, "outside", None)
        self.figures = {"spread": spread(x), **({"outside": float(outside(x))} if outside is not None else {})}
        return x

    def __call__(self, x: Any) -> Tensor:
        """Return D; for an x with a graph, less what ``batchnorm`` asks of the generator."""
        hidden = isinstance(self.divergence, Divergence) and self.divergence.hidden > 0 and isinstance(x, Mapping)
        inputs = {**x, "output_hidden_states": True} if hidden else x
        distances: list[Tensor] = []
        if x is not self._x:
            with _watched(self.norms if _first(x).requires_grad else (), distances):
                self._answer = _called(self._run_teacher, inputs)
            self._x, self.teacher_passes = x, self.teacher_passes + 1
        D = self.divergence(self._answer, _called(self.student, inputs))
        return D - self.batchnorm * torch.stack(distances).sum() if distances else D

    def _run_teacher(self, *arguments: Any, **keywords: Any) -> Any:
        return torch.func.functional_call(self.teacher, self._tensors, arguments, keywords)


class Divergence:
    """D of two answers: of the outputs, and if asked for of the hidden states.

    D = KL(softmax(t) || softmax(q)), or mean((t - q)^2), + hidden * mean over layers of mean((h_t - h_q)^2)

    Args:
        outputs: ``"kl"``, ``"mse"`` or ``"auto"``; see :func:`distill`.
        hidden: Weight of the hidden states, >= 0: those that a transformers model returns when it is called with
            ``output_hidden_states=True``, as :func:`distill` then does.

    Example:
        >>> t, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> float(Divergence()(t, q)), float(Divergence("mse")(t, q + 2))
        (0.0, 4.0)
    """

    def __init__(self, outputs: str = "auto", hidden: float = 0.0) -> None:
        if outputs not in ("auto", "kl", "mse"):
            raise ValueError(f"`divergence` must be 'auto', 'kl', 'mse' or a function of two answers, got {outputs!r}.")
        _check_finite_numbers(hidden=hidden)
        self.outputs, self.hidden = outputs, hidden

    def __call__(self, teacher: Any, student: Any) -> Tensor:
        """Return D, computed in fp32."""
        t, q = output_of(teacher).float(), output_of(student).float()
        if self.outputs == "mse" or (self.outputs == "auto" and t.shape[-1] == 1):
            D = functional.mse_loss(q, t)
        else:
            log_t, log_q = t.log_softmax(-1), q.log_softmax(-1)
            D = functional.kl_div(log_q, log_t, reduction="none", log_target=True).sum(-1).mean()
        if not self.hidden:
            return D
        h_t, h_q = (getattr(answer, "hidden_states", None) for answer in (teacher, student))
        if h_t is None or h_q is None:
            raise ValueError(
                "`hidden` needs the hidden states of teacher and student: use models of transformers and a generator "
                "that returns a dict, or give `divergence` a function of two answers."
            )
        errors = [functional.mse_loss(b.float(), a.float()) for a, b in zip(h_t, h_q, strict=True)]
        return D + self.hidden * torch.stack(errors).mean()


# --- tensors and checks -----------------------------------------------------------------------------------------------


def output_of(answer: Any) -> Tensor:
    """Return the logits or scores of an answer: a tensor, a ModelOutput of transformers, or a tuple."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(answer, name, None), Tensor):
            return found
    found = answer[0] if isinstance(answer, tuple | list) and answer else answer
    if not isinstance(found, Tensor):
        raise TypeError(f"a {type(answer).__name__} has no known output: give `divergence` a function of two answers.")
    return found


def spread(x: Any) -> float:
    """Return how much the rows of x differ: their standard deviation over the batch, relative to their size.

    Example:
        >>> spread(torch.tensor([[1.0], [-1.0]])), spread(torch.ones(4, 3))
        (1.0, 0.0)
    """
    t = _first(x).detach().float()
    return float(t.var(0, correction=0).mean().sqrt() / t.square().mean().sqrt().clamp_min(torch.finfo(t.dtype).tiny))


@contextlib.contextmanager
def _watched(norms: Sequence[nn.Module], found: list[Tensor]) -> Iterator[None]:
    """Put ||mean - running mean||^2 + ||variance - running variance||^2 of each BatchNorm's input into ``found``."""

    def measure(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].transpose(0, 1).flatten(1)
        mean, variance = x.mean(1), x.var(1, correction=0)
        found.append((mean - norm.running_mean).square().sum() + (variance - norm.running_var).square().sum())

    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def detached(x: Any) -> Any:
    """Return x without its graph: a tensor, a tuple or a dict."""
    if isinstance(x, Mapping):
        return {name: detached(value) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return tuple(detached(value) for value in x)
    return x.detach() if isinstance(x, Tensor) else x


def _first(x: Any) -> Tensor:
    """Return the first floating tensor of x, or the first tensor if there are only integers (token ids)."""
    values = list(x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else [x])
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        raise TypeError(f"the generator must return a tensor, or a tuple or dict with one, got {type(x).__name__}.")
    return next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])


def _called(model: Callable[..., Any], x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def _backward(loss: Tensor, player: str) -> Tensor:
    _check_finite(loss, player)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def _check_finite(loss: Tensor, player: str) -> None:
    if not bool(loss.isfinite()):
        raise GameOver(
            f"D is {loss.item()} in a step of the {player}, which was not taken. Lower the learning rates of student "
            "and generator, or rho."
        )


def _copied(student: nn.Module, optimizer: SamSga) -> tuple[int, dict[str, Any], dict[str, Any]]:
    state = student.state_dict(), optimizer.student_optimizer.state_dict()
    return optimizer.iterations, *copy.deepcopy(state)


def _check_integers(least: int, **named: Any) -> None:
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an integer >= {least}, got {value!r}.")
        if value < least:
            raise ValueError(f"`{name}` must be an integer >= {least}, got {value}.")


def _check_finite_numbers(**named: float) -> None:
    for name, value in named.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be finite and >= 0, got {value!r}.")


def _check_players(teacher: nn.Module, student: nn.Module, generator: Any) -> None:
    if not (isinstance(generator, nn.Module) and callable(getattr(generator, "draw", None))):
        kind = type(generator).__name__
        raise TypeError(f"`generator` must be a module with draw(rows, chance) and forward(z), got {kind}.")
    owned = {id(p) for p in student.parameters()}
    for name, p in teacher.named_parameters():
        if id(p) in owned:
            raise ValueError(f"teacher and student share {name!r}: quantize a copy, copy.deepcopy(teacher).")
