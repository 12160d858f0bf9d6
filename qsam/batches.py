"""Batches as the functions that look at data take them, and the model as it runs on them: plain, in eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

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
    """Yield the model inside its wrappers, in eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield unwrap_model(model.eval())
    finally:
        for module, training in modes:
            module.training = training


def run_each(model: nn.Module, batches: Iterable[Any]) -> int:
    """Run the model on each batch, a dict as keywords, a tuple or list as arguments; return how many there were."""
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
