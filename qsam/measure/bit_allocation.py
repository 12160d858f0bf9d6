r"""Mixed precision: how many bits each weight gets, so that the loss rises least and the model keeps to a budget.

    minimize  sum_i rise_i(b_i)   over b_i in bits,   subject to  sum_i n_i * b_i <= budget

n_i is the number of entries of weight w_i. The expected rise is ``rise_i(b) = sensitivity_i * ||w_i - Q_b(w_i)||^2``,

    hessian   sensitivity_i = |mean(l)| + std(l) over subsets of the data; l is the eigenvalue of largest magnitude of
              the Hessian of the loss with respect to w_i alone (Q-BERT)
    fisher    sensitivity_i = mean over batches of ||dL/dw_i||^2 / n_i: the trace of the empirical Fisher, per entry

and for ``loss`` it is measured: ``rise_i(b) = L(w_i <- Q_b(w_i)) - L``, the other weights left as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from qsam.attach import _built
from qsam.batches import refuse_empty, require_batches
from qsam.coverage import coverage_of, refuse_unrecorded
from qsam.inputs import data_parallel_group, is_sharded
from qsam.layers import channel_axis, unwrap_model
from qsam.measure.probe import Probe, Progress, checked_count, checked_number, probing
from qsam.optim.snapshot import RandomState, buffers_kept, same_random_numbers
from qsam.plan import Decision, Rules, Settings, decisions_by_rules, plan_by_rules
from qsam.quantizers import Quantizer
from qsam.registry import nearest

Data = Callable[[], Tensor] | Iterable[Any]
SENSITIVITIES = ("hessian", "fisher", "loss")


@dataclasses.dataclass(frozen=True)
class AllocatedWeight:
    """One weight of an allocation.

    Attributes:
        name: Its path.
        numel: Its number of entries.
        sensitivity: As measured; None for ``"loss"``, which measures the rise itself.
        rises: The expected rise of the loss by bits; with one entry where a rule or a default has set the bits.
        bits: The bits that it gets.
    """

    name: str
    numel: int
    sensitivity: float | None
    rises: Mapping[int, float]
    bits: int


@dataclasses.dataclass(frozen=True, repr=False)
class BitAllocation:
    """The result of :func:`bit_allocation`; ``print`` shows it as a table.

    Attributes:
        weights: One row per quantized weight, in the model's order.
        sensitivity: How it was measured.
        budget: As it was given.
        rules: Give these to ``quantize_(model, rules=...)``; they hold all other settings of the call too.
        average_bits: Of one entry of the quantized weights.
        size_bytes: Bytes of the model's parameters once packed, as ``Coverage.size_bytes`` counts them.
    """

    weights: tuple[AllocatedWeight, ...]
    sensitivity: str
    budget: float | str
    rules: Rules
    average_bits: float
    size_bytes: int

    @property
    def expected_rise(self) -> float:
        """The sum of the expected rises at the chosen bits."""
        return sum(row.rises[row.bits] for row in self.weights)

    def __str__(self) -> str:
        """Return the table."""
        choices = sorted({b for row in self.weights for b in row.rises})
        lines = [["weight", "entries", "sensitivity", *(f"rise at {b}" for b in choices), "bits"]]
        for row in self.weights:
            rises = [f"{row.rises[b]:.3g}" if b in row.rises else "" for b in choices]
            size = "" if row.sensitivity is None else f"{row.sensitivity:.3g}"
            lines.append([row.name, f"{row.numel:,}", size, *rises, str(row.bits)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        head = (
            f"{self.average_bits:.3f} bits on average, {self.size_bytes / 1e6:.3f} MB (budget {self.budget}); "
            f"expected rise {self.expected_rise:.4g} ({self.sensitivity})"
        )
        cells = [[c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True))]
                 for x in lines]  # fmt: skip
        return "\n".join([head, *("  ".join(line).rstrip() for line in cells)])

    __repr__ = __str__

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a bar plot of the bits; its format follows from the ending of ``path``. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 1.2 + 0.22 * len(self.weights)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(self.weights)), [row.bits for row in self.weights])
        axes.set_yticks(range(len(self.weights)), [row.name for row in self.weights], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"bits ({self.average_bits:.2f} on average, by {self.sensitivity})")
        figure.savefig(os.fspath(path))


def bit_allocation(
    model: nn.Module,
    data: Data,
    budget: float | str,
    sensitivity: str = "hessian",
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    rules: Rules | None = None,
    subsets: int = 10,
    iterations: int = 20,
    tolerance: float = 1e-2,
    seed: int = 0,
    progress: Progress = None,
    **settings: Any,
) -> BitAllocation:
    r"""Return the bits of each weight for which the loss is expected to rise least within a budget.

    The model stays as it is: weights, buffers, gradients, modes and random generators. It is measured in float, in the
    mode (train or eval) that it is in; call ``model.eval()`` before if the dropout is not to take part. Weights that
    ``quantize_`` would keep in float stay float, and weights with bits of their own (the head and an input
    convolution have 8, a rule may give others) keep these. The knapsack is solved by scipy's ``milp``.

    Args:
        model: A float model, trained.
        data: A function that runs the forward and returns the loss WITHOUT backward; or batches, which are kept in
            memory. The loss is the mean over batches.
        budget: ``3.0`` or ``"3 bits"``: the most bits of an entry on average, over all quantized weights.
            ``"2.5 MB"``: the most megabytes (10^6 bytes) of the whole model, as ``Coverage.size_bytes`` counts them:
            codes, scales, and fp32 for what stays float.
        sensitivity: ``"hessian"``, ``"fisher"`` or ``"loss"``. In forwards and backwards over the data, with L weights
            and K choices of bits: about ``iterations * (1 + L)``, ``1``, and ``1 + L * K`` forwards.
        bits: The choices, distinct integers in [2, 8].
        loss_fn: ``(model, batch) -> loss``, for batches. None: ``model(**batch).loss``, for batches that are dicts.
        rules: As for ``quantize_``.
        subsets: The batches are divided into so many parts, whose eigenvalues are averaged (``"hessian"``): with ten
            parts each is the 10 % of Q-BERT. A function is one part, and has no deviation.
        iterations: The most steps of the power iteration, an integer >= 2.
        tolerance: The relative change of an eigenvalue at which it stops. Finite, > 0.
        seed: Of the start of the power iteration.
        progress: A progress bar: None on a terminal if tqdm is there, True always, False never; or a function, which is
            called with the number of evaluations that are done and that are to be done at most.
        settings: The other keywords of ``quantize_``: ``weights``, ``granularity``, ``group_size``, ``init``, ...

    Raises:
        TypeError: an argument of the wrong kind; a loss that is no scalar tensor.
        ValueError: an unknown sensitivity or budget, a budget below the smallest possible, no batch, a weight without
            gradient, a sensitivity that is not finite.
        RuntimeError: the model is quantized or distributed already; the closure called backward.
        ImportError: scipy is missing.

    Example:
        >>> import qsam
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, y = torch.randn(32, 8), torch.randn(32, 2)
        >>> found = qsam.bit_allocation(model, lambda: (model(x) - y).square().mean(), budget=4, sensitivity="fisher")
        >>> found.average_bits <= 4, [row.name for row in found.weights], found.weights[2].bits
        (True, ['0.weight', '2.weight', '4.weight'], 8)
        >>> coverage = qsam.quantize_(model, rules=found.rules)
        >>> coverage.size_bytes == found.size_bytes
        True

    References:
        Shen et al., Q-BERT, arXiv 1909.05840, section 3.1; Dong et al., HAWQ-V2, arXiv 1911.03852.

    Differs from the papers: Q-BERT chooses the bits by hand from the order of the sensitivities, HAWQ-V2 from a Pareto
    frontier of assignments.
    """
    _require_scipy()
    if sensitivity not in SENSITIVITIES:
        hint = nearest(str(sensitivity), list(SENSITIVITIES))
        raise ValueError(f"`sensitivity` must be one of {', '.join(SENSITIVITIES)}, got {sensitivity!r}.{hint}")
    subsets, iterations = checked_count(subsets, "subsets", 1), checked_count(iterations, "iterations", 2)
    tolerance = checked_number(tolerance, "tolerance")
    root = _float_model(model)
    candidates, other_bits = _candidates(root, bits, rules, settings)
    capacity = _capacity(budget, candidates, other_bits)
    if frozen := [c.name for c in candidates if sensitivity != "loss" and not c.parameter.requires_grad]:
        raise ValueError(
            f"{frozen[0]!r} does not require a gradient, from which its sensitivity follows: call "
            "model.requires_grad_(True), keep it float in `rules`, or take sensitivity='loss'."
        )
    losses = _losses(root, data, loss_fn)
    limits = (subsets, iterations, tolerance, seed)
    sizes, rises = _measured(root, candidates, losses, sensitivity, limits=limits, progress=progress)
    picks = _knapsack(
        [list(r.values()) for r in rises], [[c.numel * b for b in c.options] for c in candidates], capacity
    )
    chosen = [list(c.options)[pick] for c, pick in zip(candidates, picks, strict=True)]
    rows = zip(candidates, sizes, rises, chosen, strict=True)
    used = sum(c.numel * b for c, b in zip(candidates, chosen, strict=True))
    return BitAllocation(
        tuple(AllocatedWeight(c.name, c.numel, size, rise, b) for c, size, rise, b in rows),
        sensitivity,
        budget,
        (*(c.rule(b) for c, b in zip(candidates, chosen, strict=True)), *(rules or ())),
        used / sum(c.numel for c in candidates),
        -(-(used + other_bits) // 8),
    )


# --- the weights, the budget and the losses ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A weight that will be quantized, with a quantizer for each choice of its bits."""

    decision: Decision
    options: Mapping[int, Quantizer]

    @property
    def name(self) -> str:
        return self.decision.site.name

    @property
    def parameter(self) -> nn.Parameter:
        return self.decision.site.parameter

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @torch.no_grad()
    def distances(self) -> dict[int, float]:
        """Return ``||w - Q_b(w)||^2`` by bits."""
        w = self.parameter.detach()
        return {b: float((q(w).double() - w.double()).square().sum()) for b, q in self.options.items()}

    def rule(self, bits: int) -> tuple[str, dict[str, Any]]:
        """Return the rule that quantizes this weight as the call would, with these bits."""
        settings = self.decision.settings
        assert settings is not None
        own = {**vars(settings), "bits": bits}
        if own["axis"] is None:
            del own["axis"]
        if (
            channel_axis(self.decision.site.module, self.decision.site.attr) is None
            and not self.decision.input_requested
        ):
            own["activations"] = None  # as without a rule: nobody has asked for the input of a layer that is unknown
        return escape(self.name), own


def _float_model(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    if coverage_of(model) is not None:
        raise RuntimeError(
            "bit_allocation measures a float model, and this one is quantized: call qsam.dequantize_(model, optimizer) "
            "first."
        )
    refuse_unrecorded(model)
    if data_parallel_group(model) is not None or is_sharded(model.modules()):
        raise RuntimeError(
            "the model is in DistributedDataParallel or sharded already, and each process would find other bits: call "
            "bit_allocation in one process before that, and give its rules to quantize_ in all of them."
        )
    return unwrap_model(model)


def _candidates(
    root: nn.Module, bits: Sequence[int], rules: Rules | None, settings: Mapping[str, Any]
) -> tuple[list[_Candidate], int]:
    """Return the weights that will be quantized, and the bits that everything else of the model takes."""
    if not isinstance(bits, Sequence) or not bits or len({*bits}) != len(bits):
        raise ValueError(f"`bits` must be distinct integers in [2, 8], (2, 3, 4, 8) say, got {bits!r}.")
    known = [field.name for field in dataclasses.fields(Settings) if field.name not in ("bits", "axis")]
    for name in settings:
        if name not in known:
            raise TypeError(f"bit_allocation has no argument {name!r}.{nearest(name, known)}")
    found: dict[str, tuple[Decision, dict[int, Quantizer]]] = {}
    rest = 0
    for b in bits:
        call = Settings(bits=b, **settings)
        coverage = _built(root, plan_by_rules(root, call, rules))
        decisions = {each.site.name: each for each in decisions_by_rules(root, call, rules)}
        for row in coverage.quantized:
            if row.bits < 32 and row.quantizer is not None:
                found.setdefault(row.name, (decisions[row.name], {}))[1].setdefault(row.bits, row.quantizer)
        scales = sum(p.numel() for quantizer in coverage.quantizers.values() for p in quantizer.parameters())
        rest = 32 * scales + sum(row.bits * row.numel for row in coverage.weights if row.bits == 32)
    if not found:
        raise ValueError("no weight would be quantized, so that there are no bits to allocate: name some in `rules`.")
    return [_Candidate(decision, dict(sorted(options.items()))) for decision, options in found.values()], rest


_BUDGET = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(bits|mb)\s*", re.IGNORECASE)


def _capacity(budget: float | str, candidates: Sequence[_Candidate], other_bits: int) -> int:
    """Return the most bits that the quantized weights may take together."""
    form = (
        "`budget` must be bits of an entry on average (3.0 or '3 bits') or megabytes of the whole model ('2.5 MB'), "
        f"got {budget!r}."
    )
    match = _BUDGET.fullmatch(budget) if isinstance(budget, str) else None
    if match is not None:
        amount, unit = Fraction(match[1]), match[2].lower()
    elif isinstance(budget, str):
        raise ValueError(form)
    elif isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(form)
    else:
        amount, unit = Fraction(str(checked_number(budget, "budget"))), "bits"
    numel = sum(c.numel for c in candidates)
    capacity = math.floor(amount * numel) if unit == "bits" else math.floor(amount * 10**6) * 8 - other_bits
    least = sum(c.numel * min(c.options) for c in candidates)
    if capacity < least:
        fixed = sum(len(c.options) == 1 for c in candidates)
        size = f"{least / numel:.4g} bits" if unit == "bits" else f"{-(-(least + other_bits) // 8) / 1e6:.4g} MB"
        raise ValueError(
            f"`budget` {budget!r} is below the smallest possible, {size} ({fixed} of {len(candidates)} weights have "
            "bits of their own): raise it, give smaller `bits`, or name weights in `rules`."
        )
    return capacity


def _losses(root: nn.Module, data: Data, loss_fn: Callable[[nn.Module, Any], Tensor] | None) -> list[Callable[[], Any]]:
    """Return one function per batch that returns its loss."""
    if callable(data):
        if loss_fn is not None:
            raise ValueError("`loss_fn` belongs to batches, and `data` is a function that returns the loss itself.")
        return [data]
    require_batches(data)
    with same_random_numbers(RandomState.now()):  # a DataLoader that shuffles draws its order
        batches = list(data)
    refuse_empty(len(batches), "bit_allocation")
    if loss_fn is None and not all(isinstance(batch, Mapping) for batch in batches):
        raise TypeError("give `loss_fn`, (model, batch) -> loss: only batches that are dicts have model(**batch).loss.")
    return [functools.partial(loss_fn or _own_loss, root, batch) for batch in batches]


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError("model(**batch) has no loss: put the labels into the batches, or give `loss_fn`.")
    return loss


# --- measuring --------------------------------------------------------------------------------------------------------


def _measured(
    root: nn.Module,
    candidates: Sequence[_Candidate],
    losses: Sequence[Callable[[], Any]],
    sensitivity: str,
    *,
    limits: tuple[int, int, float, int],
    progress: Progress,
) -> tuple[list[float | None], list[dict[int, float]]]:
    """Return the sensitivities, and the rises by bits; refuse what is not finite."""
    subsets, iterations, tolerance, seed = limits
    passes = {"hessian": iterations, "fisher": 1, "loss": 1 + sum(len(c.options) for c in candidates)}[sensitivity]
    weights = [c.parameter for c in candidates]
    with probing(root, losses[0], "bit_allocation", passes * len(losses), progress, chosen=weights) as probe:
        if sensitivity == "loss":
            rises = _measured_rises(probe, candidates, losses)
            _refuse_not_finite(candidates, [sum(rise.values()) for rise in rises])
            return [None] * len(candidates), rises
        if sensitivity == "fisher":
            sizes = _fisher(probe, losses)
        else:
            count, n = min(subsets, len(losses)), len(losses)
            parts = [losses[i * n // count : (i + 1) * n // count] for i in range(count)]
            values = torch.stack([_top_eigenvalues(probe, part, iterations, tolerance, seed) for part in parts])
            sizes = (values.mean(0).abs() + values.std(0, correction=0)).tolist()
    _refuse_not_finite(candidates, sizes)
    pairs = zip(candidates, sizes, strict=True)
    return [*sizes], [{b: size * distance for b, distance in c.distances().items()} for c, size in pairs]


def _refuse_not_finite(candidates: Sequence[_Candidate], sizes: Sequence[float]) -> None:
    for candidate, size in zip(candidates, sizes, strict=True):
        if not math.isfinite(size):
            raise ValueError(
                f"the sensitivity of {candidate.name!r} is {size}: look for NaN or infinity in the loss, in the "
                "batches and in the weights."
            )


@torch.no_grad()
def _measured_rises(
    probe: Probe, candidates: Sequence[_Candidate], losses: Sequence[Callable[[], Any]]
) -> list[dict[int, float]]:
    """Return how much the mean loss rises when one weight alone is quantized, by bits."""

    def loss() -> float:
        total = 0.0
        for each in losses:
            probe.closure = torch.no_grad()(each)
            total += probe.loss(None)
        return total / len(losses)

    start = loss()
    rises: list[dict[int, float]] = []
    for candidate, p, w in zip(candidates, probe.weights, probe.start, strict=True):
        rises.append({})
        for b, quantizer in candidate.options.items():
            p.copy_(quantizer(w))
            rises[-1][b] = loss() - start
        p.copy_(w)
    return rises


def _fisher(probe: Probe, losses: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the mean over batches of the squared norm of each weight's gradient, per entry."""
    sums = torch.zeros(len(probe.weights), dtype=torch.float64)
    for each in losses:
        probe.closure = each
        with buffers_kept(probe.root):
            gradients = probe.differentiable_gradient(graph=False)
        sums += torch.stack([g.double().square().mean().cpu() for g in gradients])
    return (sums / len(losses)).tolist()


def _top_eigenvalues(
    probe: Probe, losses: Sequence[Callable[[], Any]], iterations: int, tolerance: float, seed: int
) -> Tensor:
    """Return for each weight the eigenvalue of largest magnitude of its own block of the Hessian of the mean loss."""
    parts = torch.split(probe.gaussian(seed), probe.sizes)
    vectors = [v.to(p.device).view_as(p) / v.norm() for v, p in zip(parts, probe.weights, strict=True)]
    values = torch.zeros(len(vectors), dtype=torch.float64)
    left = list(range(len(vectors)))
    for count in range(iterations):
        images = _block_products(probe, losses, vectors, left)
        before = values.clone()
        for i, image in images.items():
            values[i] = float((vectors[i].double() * image.double()).sum())
            norm = image.norm()
            vectors[i] = image / norm if norm > 0 else image
        moved = (values - before).abs() > tolerance * values.abs()
        left = [i for i in left if bool(moved[i]) or not count]
        if not left:
            break
    return values


def _block_products(
    probe: Probe, losses: Sequence[Callable[[], Any]], vectors: Sequence[Tensor], which: Sequence[int]
) -> dict[int, Tensor]:
    """Return ``H_ii v_i`` of the mean loss for the weights in ``which``; a batch's graph serves all of them."""
    images = {i: torch.zeros_like(vectors[i]) for i in which}
    for each in losses:
        probe.closure = each
        with buffers_kept(probe.root):
            gradients = probe.differentiable_gradient()
            for i in which:
                if gradients[i].requires_grad:  # else it is constant
                    p, v = probe.weights[i], vectors[i].to(gradients[i])
                    product = torch.autograd.grad(gradients[i], p, v, retain_graph=True, materialize_grads=True)[0]
                    images[i] += product.to(images[i]) / len(losses)
    return images


# --- the knapsack -----------------------------------------------------------------------------------------------------


def _require_scipy() -> None:
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "bit_allocation needs scipy, which solves the knapsack: pip install scipy, or qsam with the extra measure."
        ) from error


def _knapsack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """Return one choice per row, of the least sum of costs within the capacity.

    Costs enter as differences to the least of their row and sizes without their common part and factor, because the
    solver's tolerances are absolute: about 1e-10 of the largest difference.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    starts = [0, *itertools.accumulate(map(len, costs))]
    extra = [size - min(row) for row in sizes for size in row]
    factor = math.gcd(*extra) or 1
    limit = room = (capacity - sum(map(min, sizes))) // factor
    weights = np.array([size // factor for size in extra], dtype=float)
    objective = np.array([cost - min(row) for row in costs for cost in row])
    objective *= 1e4 / (objective.max() or 1.0)
    one_each = np.zeros((len(costs), starts[-1]))
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        one_each[i, begin:end] = 1
    while True:
        constraints = [
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(weights[None] / max(1, room), -np.inf, limit / max(1, room)),
        ]
        found = milp(objective, integrality=np.ones(starts[-1]), bounds=Bounds(0, 1), constraints=constraints,
                     options={"mip_rel_gap": 0.0})  # fmt: skip
        if found.x is None:
            raise RuntimeError(f"scipy's milp found no allocation: {found.message}")
        picks = [int(np.argmax(found.x[begin:end])) for begin, end in itertools.pairwise(starts)]
        used = sum(int(weights[begin + pick]) for begin, pick in zip(starts, picks, strict=False))
        if used <= room:
            return picks
        limit -= used - room  # the solver allows a rounding error, and bits do not
