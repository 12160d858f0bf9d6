"""What a pass of a step leaves behind besides gradients: buffers and random states, kept and put back.

Of all passes of a step only the first may move BatchNorm statistics, counters and random number generators. BatchNorm's
``momentum`` is never touched: that would recompile the model and miss ``num_batches_tracked``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class RandomState:
    """The states of Python's, torch's CPU and all CUDA generators, and of NumPy's global one where it is in use."""

    python: Any
    cpu: Tensor
    cuda: list[Tensor]
    numpy: Any

    @staticmethod
    def now() -> RandomState:
        """Return the present states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        numpy = sys.modules.get("numpy")  # Wav2Vec2 draws the spans that it masks from it
        return RandomState(random.getstate(), torch.get_rng_state(), cuda, numpy and numpy.random.get_state())

    def restore(self) -> None:
        """Set the generators back to these states."""
        random.setstate(self.python)
        torch.set_rng_state(self.cpu)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextlib.contextmanager
def same_random_numbers(start: RandomState | None) -> Iterator[None]:
    """Draw the numbers that followed ``start`` again, and leave the generators as they were; None: draw new ones."""
    if start is None:
        yield
        return
    after = RandomState.now()
    start.restore()
    try:
        yield
    finally:
        after.restore()


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put every buffer of the model back at the end: identity, and values where they may have been written.

    BatchNorm writes its statistics without counting a version, so the version alone tells too little; comparing values
    would wait for the device. An expanded buffer cannot be written, and is not.
    """
    kept = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, version, values in kept:
                if buffer._version != version or (buffer.is_floating_point() and buffer.is_contiguous()):
                    buffer.copy_(values)
                module._buffers[name] = buffer
