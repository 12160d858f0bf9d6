"""Estimate BatchNorm's running statistics again, because after training they lag behind the last weights.

A quantized weight that oscillates between two codes changes the statistics of its output at each step, and the running
averages mix those of the last weights with earlier ones (Nagel et al. 2022, section 5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qsam.batches import in_eval_mode, refuse_empty, require_batches, run_each
from qsam.coverage import coverage_of, owner_of
from qsam.guard import block_of
from qsam.inputs import data_parallel_group, is_sharded, shown
from qsam.layers import unwrap_model
from qsam.optim.snapshot import buffers_kept


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of every BatchNorm to the plain average over some batches, at the present weights.

        running_mean <- 1/n sum_i mean(x_i)        running_var <- 1/n sum_i var(x_i)        (unbiased)

    x_i is the layer's input in batch i; batches of all sizes have the same weight. Call it after training, before the
    model is evaluated or saved, with some dozens of batches as in training. While it runs, the BatchNorms normalize by
    the batch, as in training; everything else is in eval mode (no dropout). Only ``running_mean``, ``running_var`` and
    ``num_batches_tracked`` (which becomes n) change, and after an exception these have their old values too.

    All subclasses of torch's BatchNorm that keep running statistics are set, such as timm's ``BatchNormAct2d`` and
    ``SyncBatchNorm``. One that is in eval mode inside a model in training mode counts as frozen and is not set. If the
    whole model is in eval mode, all are set.

    Args:
        model: A quantized or float model, with or without an optimizer. For a DistributedDataParallel model, every
            process calls this with its own batches, and all get the average over the batches of all processes.
        batches: Inputs: a dict is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, anything else
            as ``model(batch)``.

    Raises:
        TypeError: ``model`` is not a module, or ``batches`` cannot be iterated over.
        ValueError: There is no BatchNorm to set or no batch, no batch reached a BatchNorm, statistics are not finite,
            or (from torch) a batch has a single value per channel: drop a last batch of one image.
        RuntimeError: It was called inside a block of the optimizer, or the model is sharded (FSDP2).

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
    _refuse_unready(root)
    norms = _norms(root)
    # All buffers that the model writes meanwhile are restored, also after an exception.
    with buffers_kept(root), in_eval_mode(model) as plain, _averaging(norms.values()):
        count = run_each(plain, batches)
        found = {name: _statistics(norm) for name, norm in norms.items()}
    if (group := data_parallel_group(model)) is not None:
        total = torch.tensor(count, device=next(iter(found.values()))[1].device)
        distributed.all_reduce(total, group=group)
        count, found = int(total), {name: _over_ranks(*pair, group) for name, pair in found.items()}
    refuse_empty(count, "reestimate_batchnorm")
    _check(found)
    for name, norm in norms.items():
        moments, calls = found[name]
        mean, var = moments.chunk(2)
        for key, value in (("running_mean", mean), ("running_var", var), ("num_batches_tracked", calls)):
            norm.get_buffer(key).copy_(value)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance in one vector, and the number of calls they average; copies."""
    moments = torch.cat([norm.get_buffer("running_mean"), norm.get_buffer("running_var")])
    return moments, norm.get_buffer("num_batches_tracked").clone()


def _over_ranks(moments: Tensor, calls: Tensor, group: distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the average over all calls in all processes, which may have made different numbers of them."""
    weight = calls.to(moments.dtype)
    sums = torch.cat([moments * weight, weight[None]])
    distributed.all_reduce(sums, group=group)
    return sums[:-1] / sums[-1].clamp_min(1), sums[-1].to(calls.dtype)


def _refuse_unready(root: nn.Module) -> None:
    coverage = coverage_of(root)
    owner = None if coverage is None else owner_of(coverage)
    if owner is not None:
        owner._refuse_inside_block("reestimate_batchnorm")
    if (block := block_of(root)) is not None:
        raise RuntimeError(f"reestimate_batchnorm() inside the block {block}(): leave the block first.")
    if is_sharded(root.modules()):
        raise RuntimeError(
            "the model is sharded, and each process would get different statistics: gather its state_dict, load it "
            "into an unsharded copy and call reestimate_batchnorm on that."
        )


def _norms(root: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms that keep running statistics, by their path, without the frozen ones."""
    named = {name: m for name, m in root.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    live = {name: norm for name, norm in named.items() if norm.training or not root.training}
    if not live:
        raise ValueError(
            "every BatchNorm is in eval mode inside a model in training mode, and so frozen: call model.eval() before "
            "reestimate_batchnorm to set them nevertheless."
            if named
            else "the model has no BatchNorm with running statistics: leave reestimate_batchnorm out."
        )
    return live


@contextlib.contextmanager
def _averaging(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Reset each BatchNorm and let it take the cumulative average, as torch does for ``momentum=None``."""
    kept = [(norm, norm.momentum) for norm in norms]
    try:
        for norm, _ in kept:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True  # not .train(), because its children (timm has a dropout there) stay in eval mode
        yield
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum


def _check(found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError if a BatchNorm saw no batch, or its statistics are not finite."""
    missed = [shown(name) for name, (_, calls) in found.items() if not bool(calls)]
    if missed:
        raise ValueError(
            f"no batch reached the BatchNorm {', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}: give batches "
            "that use it, or leave it out (in a model in training mode one in eval mode keeps its statistics)."
        )
    for name, (moments, _) in found.items():
        if not bool(moments.isfinite().all()):
            raise ValueError(
                f"the statistics of the BatchNorm {shown(name)} over these batches are not finite, and the old ones "
                "are kept: look for NaN or infinity in the batches and in the layers before it."
            )
