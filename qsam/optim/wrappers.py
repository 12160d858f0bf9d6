"""The optimizer inside the wrappers that training frameworks put around it."""

from __future__ import annotations

from typing import Any

from qsam.optim.optimizer import QuantizedOptimizer

_INSIDE = ("_optimizer", "optimizer")
"""Where Lightning and Accelerate keep what they wrap."""


def unwrap(optimizer: Any) -> QuantizedOptimizer:
    """Return the qsam optimizer inside Accelerate's or Lightning's wrappers, or the optimizer itself.

    The wrappers pass ``step`` and ``state_dict`` on; the blocks, ``latents()`` and ``diagnostics()`` are called on what
    this returns. Wrappers around wrappers are followed.

    Args:
        optimizer: A qsam optimizer, an ``AcceleratedOptimizer``, a ``LightningOptimizer``, or any object that keeps
            the optimizer it wraps as ``optimizer`` or ``_optimizer``.

    Returns:
        The qsam optimizer.

    Raises:
        TypeError: there is no qsam optimizer inside.

    Example:
        >>> import torch
        >>> import qsam
        >>> optimizer = qsam.QAT(torch.nn.Linear(4, 4), torch.optim.SGD, lr=0.1)
        >>> qsam.unwrap(optimizer) is optimizer
        True
    """
    inner, seen = optimizer, []
    while not _is_ours(inner):
        seen.append(inner)
        found = [vars(inner)[name] for name in _INSIDE if name in getattr(inner, "__dict__", {})]
        if not found or any(found[0] is known for known in seen):
            raise TypeError(
                f"`optimizer` must be a qsam optimizer or a wrapper around one, got {type(optimizer).__name__}: "
                "build it as in `optimizer = qsam.SQuAT(model, AdamW)`."
            )
        inner = found[0]
    ours: QuantizedOptimizer = inner
    return ours


def _is_ours(optimizer: Any) -> bool:
    # Lightning's proxy borrows the class of what it wraps, and has no state of its own.
    return isinstance(optimizer, QuantizedOptimizer) and "latents_of" in vars(optimizer)
