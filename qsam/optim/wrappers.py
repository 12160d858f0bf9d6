"""Get the optimizer out of the wrappers of training frameworks, and present its scales as a separate optimizer."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from qsam.optim.optimizer import QuantizedOptimizer

_INSIDE = ("_optimizer", "optimizer")
"""The attributes in which Lightning and Accelerate keep the wrapped optimizer."""


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
        TypeError: There is no qsam optimizer inside.

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
    from qsam.optim.optimizer import QuantizedOptimizer  # which gives each optimizer the class below

    # Lightning's proxy borrows the class of what it wraps, without its state.
    return isinstance(optimizer, QuantizedOptimizer) and "_latents" in vars(optimizer)


class ScaleFacade(Optimizer):
    """``optimizer.scales``, through which a ``GradScaler`` unscales and steps the scales alone.

    Its one group holds every tensor that has a gradient in the scales' pass; its ``step`` is ``step_scales``.
    """

    def __init__(self, owner: QuantizedOptimizer) -> None:
        self.__setstate__({"owner": owner, "defaults": {}, "state": defaultdict(dict)})

    @property
    def owner(self) -> QuantizedOptimizer:
        """The optimizer, by a weak reference, so that deleting the optimizer frees it at once."""
        owner: QuantizedOptimizer | None = self._owner()
        if owner is None:
            raise RuntimeError("the optimizer of these scales is gone: keep it, and use its `optimizer.scales`.")
        return owner

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """One group with every tensor that has a gradient; refused between the passes of scope "rank"."""
        if self.owner.ranks.scope == "rank" and self.owner._gradients_of == "first_pass":
            raise RuntimeError(
                "each rank's GradScaler would check its own first pass for infinities, so ranks could take different "
                "steps: with perturbation_scope='rank' and schedule='fused' use bf16 autocast, or another schedule."
            )
        return [{"params": [p for p in self.owner._parameters() if p.requires_grad], "lr": 0.0}]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the scales."""
        self.owner.step_scales()

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "defaults": {}, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._owner = weakref.ref(state["owner"])
        super().__setstate__({key: value for key, value in state.items() if key != "owner"})
