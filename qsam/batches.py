"""Run a model on batches, unwrapped and in eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from qsam.layers import unwrap_model


def require_batches(batches: Any) -> None:
    """Raise TypeError if ``batches`` cannot be iterated over."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be an iterable of inputs, a DataLoader say, got {batches!r}.")


def refuse_empty(count: int, caller: str) -> None:
    """Raise ValueError if there was no batch."""
    if count == 0:
        raise ValueError(f"`batches` is empty: {caller} needs at least one batch.")


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model inside its wrappers, in eval mode; restore the modes of all modules afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield unwrap_model(model.eval())
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def fresh_norms_by_batch(model: nn.Module) -> Iterator[None]:
    """Within this context a BatchNorm that has seen no batch normalizes by the present one, in eval mode too.

    Its running statistics, 0 and 1, are not those of the data, and without normalization activations shrink from layer
    to layer. The buffers are removed meanwhile and restored afterwards.
    """
    norms = [(n, n.running_mean, n.running_var) for n in model.modules() if isinstance(n, _NormBase) and _is_fresh(n)]
    tracked = [norm.track_running_stats for norm, _, _ in norms]
    try:
        for norm, _, _ in norms:
            norm.running_mean = norm.running_var = None
            norm.track_running_stats = False
        yield
    except ValueError as error:
        if norms and "more than 1 value per channel" in str(error):
            raise ValueError(
                "a BatchNorm that has seen no data normalizes by the batch, and a batch has one value per channel: "
                f"give batches of two or more samples. ({error})"
            ) from error
        raise
    finally:
        for (norm, mean, var), was in zip(norms, tracked, strict=True):
            norm.running_mean, norm.running_var, norm.track_running_stats = mean, var, was


def _is_fresh(norm: _NormBase) -> bool:
    """Whether the norm has seen no batch; old files have statistics without a count of batches."""
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or count is None or bool(count):
        return False
    return not bool(mean.any()) and bool((var == 1).all())


def run_each(model: nn.Module, batches: Iterable[Any]) -> int:
    """Run the model on each batch, a dict as keywords, a tuple or list as arguments; return the number of batches."""
    count = 0
    for batch in batches:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, tuple | list):
            model(*batch)
        else:
            model(batch)
        count += 1
    return count
