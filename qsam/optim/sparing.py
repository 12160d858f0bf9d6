"""Gradients that a pass has no use for are not computed: those of float parameters, while others are looked at.

The first pass of a step serves the perturbation, the scales' pass the scales. What is needed of neither (an embedding,
say, whose gradient is as large as itself) does not require a gradient there, and the backward ends above it.

It is done in ``step(closure)`` alone, and only where nobody can tell: see :func:`harmless`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from qsam.optim.snapshot import RandomState
from qsam.shards import in_process_group

_LOOKING = ("CompiledFunction", "CheckpointFunction")
"""Parts of the names of graph nodes that look at ``requires_grad``: ``torch.compile`` would compile once more, and a
reentrant checkpoint without an input that requires a gradient gives none."""


class Sparing:
    """What is known about the closure, from its first pass on.

    Args:
        model: As the optimizer was given it.

    Attributes:
        allowed: None until a whole pass has been seen.
    """

    def __init__(self, model: nn.Module) -> None:
        compiled = any(module._compiled_call_impl is not None for module in model.modules())
        self.allowed: bool | None = False if compiled or hasattr(model, "_orig_mod") else None

    def call(
        self, closure: Callable[[], Any], parameters: Iterable[nn.Parameter], needed: set[int], start: RandomState
    ) -> Any:
        """Call ``closure`` and return what it returns; the gradients that are not needed may be left out.

        Args:
            closure: Runs forward and backward.
            parameters: All that the optimizer has.
            needed: Which of them the pass is for, by id.
            start: The random state that the pass began in, for a second try.
        """
        wanted, others = _parted(parameters, needed)
        if not self.allowed or not any(p.requires_grad for p in wanted):
            found = closure()
            if self.allowed is None:
                self.allowed = harmless(found) and any(p.grad is not None for p in wanted)
            return found
        try:
            with _without_gradients(others):
                return closure()
        except RuntimeError:  # a closure that differentiates by itself, or a batch that does not reach what is needed
            self.allowed = False
        start.restore()
        return closure()


def harmless(loss: Any) -> bool:
    """Whether gradients may be left out: one process, and a graph that is known and has no node that would look.

    Args:
        loss: What the closure returned.
    """
    if in_process_group() or not isinstance(loss, Tensor) or loss.grad_fn is None:
        return False
    return not any(word in node.name() for node in _nodes(loss.grad_fn) for word in _LOOKING)


def _nodes(root: Any) -> Iterator[Any]:
    """Yield all nodes of an autograd graph; they outlive the backward."""
    seen, left = {root}, [root]
    while left:
        node = left.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                left.append(below)


def _parted(parameters: Iterable[nn.Parameter], needed: set[int]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return what is needed, and what can be left out: not what somebody has put a hook on."""
    wanted, others = [], []
    for p in parameters:
        if id(p) in needed:
            wanted.append(p)
        elif p.requires_grad and not p._backward_hooks and not p._post_accumulate_grad_hooks:
            others.append(p)
    return wanted, others


@contextlib.contextmanager
def _without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
