"""BatchNorm's running statistics, taken again from data: after training they lag behind the last weights.

A quantized weight that oscillates between two codes moves the statistics of its output at each step, and the running
averages show a mixture of what the last weights and those before them gave (Nagel et al. 2022, section 5).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qsam.batches import in_eval_mode, refuse_empty, require_batches, run_each
from qsam.coverage import coverage_of, owner_of
from qsam.inputs import data_parallel_group, is_sharded, shown
from qsam.latent import open_block
from qsam.layers import unwrap_model
from qsam.optim.snapshot import buffers_kept


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What one BatchNorm averaged: mean and unbiased variance of its input, one entry a channel, over so many calls."""

    mean: Tensor
    var: Tensor
    count: Tensor

    @staticmethod
    def of(norm: _BatchNorm) -> Statistics:
        """Return a copy of the running statistics."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        return Statistics(norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone())

    def over(self, group: distributed.ProcessGroup) -> Statistics:
        """Return the average over all calls in all processes, whichever number of them each process had."""
        weight = self.count.to(self.mean.dtype)
        sums = torch.cat([self.mean * weight, self.var * weight, weight[None]])
        distributed.all_reduce(sums, group=group)
        mean, var = (sums[:-1] / sums[-1].clamp_min(1)).chunk(2)
        return Statistics(mean, var, sums[-1].to(self.count.dtype))

    def write_(self, norm: _BatchNorm) -> None:
        """Make these the running statistics, in place."""
        for name, value in (("mean", self.mean), ("var", self.var)):
            norm.get_buffer(f"running_{name}").copy_(value)
        norm.get_buffer("num_batches_tracked").copy_(self.count)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of every BatchNorm anew: the plain average over some batches, at the present weights.

        running_mean <- 1/n sum_i mean(x_i)        running_var <- 1/n sum_i var(x_i)        (unbiased)

    x_i is the layer's input in batch i; each batch counts alike, whatever its size. Call it after training, before the
    model is evaluated or saved, with batches as in training: some dozens are enough. The BatchNorms normalize by the
    batch while this runs, as in training; everything else is in eval mode (no dropout). Nothing but ``running_mean``,
    ``running_var`` and ``num_batches_tracked`` (which becomes n) changes: weights, latents, scales, gradients,
    ``momentum`` and modes are as before; after an exception these statistics are too.

    All subclasses of torch's BatchNorm that keep running statistics are meant, timm's ``BatchNormAct2d`` and
    ``SyncBatchNorm`` among them. One that is in eval mode inside a model in training mode counts as frozen and stays as
    it is; in a model that is in eval mode nothing tells a frozen one apart, and all are set.

    Args:
        model: A quantized model, owned by an optimizer or not; a float one too. Given a DistributedDataParallel model,
            every process calls this with batches of its own, and all get the average over the batches of all.
        batches: Inputs: a dict is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, anything else
            as ``model(batch)``.

    Raises:
        TypeError: no module, or batches that cannot be iterated over.
        ValueError: no BatchNorm to set, no batch, one that no batch reached, or statistics that are not finite; from
            torch itself, a batch with a single value a channel (a last batch of one image: drop it).
        RuntimeError: inside a block of the optimizer, or the model is sharded (FSDP2).

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> reestimate_batchnorm(
        ...     model, [torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[4.0, 1.0], [8.0, 3.0]])]
        ... )
        >>> model.running_mean, model.running_var
        (tensor([3.5000, 1.5000]), tensor([5., 1.]))

    References:
        Nagel, Fournarakis, Bondarenko, Blankevoort, "Overcoming Oscillations in Quantization-Aware Training",
        arXiv 2203.11086, section 5.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    require_batches(batches)
    root = unwrap_model(model)
    _refuse_where_it_would_go_wrong(root)
    norms = _norms(root)
    # What the model computes with in between, its other buffers too, is put back whatever happens.
    with buffers_kept(root), in_eval_mode(model) as plain, _averaging(norms.values()):
        count = run_each(plain, batches)
        found = {name: Statistics.of(norm) for name, norm in norms.items()}
    if (group := data_parallel_group(model)) is not None:
        count = _sum(count, next(iter(norms.values())), group)
        found = {name: statistics.over(group) for name, statistics in found.items()}
    refuse_empty(count, "reestimate_batchnorm")
    _check(found)
    for name, norm in norms.items():
        found[name].write_(norm)


def _refuse_where_it_would_go_wrong(root: nn.Module) -> None:
    coverage = coverage_of(root)
    owner = None if coverage is None else owner_of(coverage)
    if owner is not None:
        owner._refuse_inside_block("reestimate_batchnorm")
    if (block := open_block(root)) is not None:
        raise RuntimeError(f"reestimate_batchnorm() inside the block {block}(): leave the block first.")
    if is_sharded(root.modules()):
        raise RuntimeError(
            "the model is sharded, and each process would get statistics of its own: gather its state_dict, load it "
            "into a model of its own and call reestimate_batchnorm there."
        )


def _norms(root: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms that keep running statistics, by their path, without the frozen ones."""
    named = root.named_modules()
    found = {name: m for name, m in named if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not found:
        raise ValueError("the model has no BatchNorm with running statistics: leave reestimate_batchnorm out.")
    live = {name: norm for name, norm in found.items() if norm.training or not root.training}
    if not live:
        raise ValueError(
            "every BatchNorm is in eval mode inside a model in training mode, thus frozen: call model.eval() before "
            "reestimate_batchnorm to set them all the same."
        )
    return live


@contextlib.contextmanager
def _averaging(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let each BatchNorm start anew and take the cumulative average, which is what torch does for ``momentum=None``."""
    kept = [(norm, norm.momentum) for norm in norms]
    try:
        for norm, _ in kept:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True  # itself only: its children (timm has a dropout there) stay in eval mode
        yield
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum


def _sum(count: int, norm: _BatchNorm, group: distributed.ProcessGroup) -> int:
    total = torch.tensor(count, device=norm.get_buffer("running_mean").device)
    distributed.all_reduce(total, group=group)
    return int(total)


def _check(found: Mapping[str, Statistics]) -> None:
    """Raise ValueError before anything is written."""
    missed = [shown(name) for name, statistics in found.items() if not bool(statistics.count)]
    if missed:
        raise ValueError(
            f"no batch reached the BatchNorm {', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}: give batches "
            "that use it, or leave it out (in a model in training mode one in eval mode keeps its statistics)."
        )
    for name, statistics in found.items():
        if not bool((statistics.mean.isfinite() & statistics.var.isfinite()).all()):
            raise ValueError(
                f"the statistics of the BatchNorm {shown(name)} over these batches are not finite, and the old ones "
                "are kept: look for NaN or infinity in the batches and in the layers before it."
            )
