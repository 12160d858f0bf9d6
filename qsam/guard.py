"""The guard: nobody but the optimizer writes quantized weights, and their quantizers stay the ones it knows.

A write that torch counts shows in a fingerprint at once. One through ``.data`` shows by value, in the sweep that
compares p with Q(w) anyway, and is reported at the next look.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam import shards
from qsam.coverage import Coverage, refuse_changed
from qsam.inputs import NAME as INPUT_NAME
from qsam.quantizers import Identity, Quantizer
from qsam.slots import Slot, is_on_grid, refuse_moved, same_values

_OVERFLOW = (
    "the scale of {!r} has grown so much that its quantized values are beyond fp16's 65504, and the model holds "
    "infinity there: keep the parameters in fp32 under autocast, lower `scale_lr`, or start from the last checkpoint."
)


class Guard:
    """What was left in a model, and what has been seen there since.

    Args:
        coverage: The model's coverage; None for a float model.
        root: The model.

    Attributes:
        fresh: Whether no pass has come yet. The latents are looked at in the first one, for until then a checkpoint may
            bring others than those that the model had at construction.
        released: Whether the optimizer has handed the model over.
    """

    def __init__(self, coverage: Coverage | None, root: nn.Module) -> None:
        self.fresh = True
        self.released = False
        self._root = root
        self._coverage = coverage
        self._links = [] if coverage is None else _links(root)
        self._attached = [] if coverage is None else _places(coverage)
        self._seen: list[tuple[Any, ...]] = []
        self._suspects: list[tuple[str, Tensor | bool]] = []
        self._overflows: list[tuple[str, Tensor]] = []

    def remember(self, slots: Sequence[Slot]) -> None:
        """Remember how all p look now."""
        self._seen = [slot.fingerprint() for slot in slots]

    def forgive(self) -> None:
        """Forget what was seen: the present weights are to be the latents."""
        self._suspects.clear()

    def check(
        self, slots: Sequence[Slot], agree: Callable[[bool], bool] | None, among: Callable[[bool], bool] | None
    ) -> None:
        """Refuse to go on if somebody else wrote p or a scale since the last :meth:`remember`.

        A changed fingerprint with equal values is no alarm (DDP broadcasts at construction).

        Args:
            slots: The weights.
            agree: Tells whether a flag is set in any process; None where the others may not be asking.
            among: The same, among the processes that hold parts of the weights; None where each holds all.

        Raises:
            RuntimeError: the model's weights are not the Q(w) that were left there, its quantizers are others, or it is
                on another device.
            ValueError: an fp16 Parameter could not hold its Q(w) in the step before.
        """
        self.check_attached()
        self._check_tree()
        refuse_moved(slots)
        overflown = [path for path, flag in self._overflows if bool(flag)]
        self._overflows.clear()
        if overflown:
            raise ValueError(_OVERFLOW.format(overflown[0]))
        if self.fresh:
            self.fresh = False
            _say_if_on_grid(slots)
        late = [path for path, flag in self._suspects if bool(flag)]
        self._suspects.clear()
        changed = [slot for slot, seen in zip(slots, self._seen, strict=True) if slot.fingerprint() != seen]
        if among is not None:  # to compare takes all processes, and so does what comes next
            agree, changed = among, list(slots) if among(bool(changed)) else []
        foreign = list(dict.fromkeys([s.path for s in changed if not same_values(s.parameter, s.quantized())] + late))
        if bool(foreign) if agree is None else agree(bool(foreign)):
            _refuse_foreign(foreign)
        if changed:
            self.remember(slots)

    def check_attached(self) -> None:
        """Refuse to go on if the model no longer has the quantizers that this optimizer was built with.

        Raises:
            RuntimeError: they were taken off or replaced, or the optimizer has handed the model over.
        """
        if self.released:
            raise RuntimeError(
                "this optimizer has handed its model over (release): it can no longer be used. Go on with the "
                "optimizer that was built on the model since, or build one."
            )
        for module, name, quantizer in self._attached:
            if module._modules.get(name) is not quantizer:
                raise RuntimeError(
                    "the quantizers that this optimizer was built on have been taken off its model (dequantize_): it "
                    "can no longer be used. Build a new one; to keep its full-precision weights, call "
                    "qsam.dequantize_(model, optimizer), with the optimizer."
                )

    def _check_tree(self) -> None:
        """Refuse to go on if a quantized module has left the model; a module that was wrapped has not."""
        if self._coverage is not None and any(p._modules.get(name) is not child for p, name, child in self._links):
            refuse_changed(self._coverage, self._root)
            self._links = _links(self._root)

    def note_value(self, slot: Slot, out: Tensor) -> None:
        """Compare p with the Q(w) just computed; the verdict is read at the next check, without a device sync now."""
        p, out = shards.local(slot.parameter), shards.local(out)
        if p.dtype == torch.float16:
            self._overflows.append((slot.path, (torch.isinf(p) & torch.isfinite(out)).any()))
        if p.device.type == "cpu" and torch.equal(out.to(p.dtype), p):
            return  # the usual case in one sweep; elsewhere to read the verdict now would wait for the device
        self.note(slot, ((out.to(p.dtype) == p) | torch.isnan(p)).all())

    def note(self, slot: Slot, same: Tensor | bool) -> None:
        """Note whether p holds Q(w)."""
        if same is not True:
            self._suspects.append((slot.path, True if same is False else ~same))


def _links(root: nn.Module) -> list[tuple[nn.Module, str, nn.Module | None]]:
    """Return the tree: every module with its children."""
    return [(parent, name, child) for parent in root.modules() for name, child in parent._modules.items()]


def _places(coverage: Coverage) -> list[tuple[nn.Module, str, Quantizer]]:
    """Return every quantizer with the module and the name where it is attached."""
    weights = ((row.module, f"{row.attr}_quantizer", row.quantizer) for row in coverage.weights)
    inputs = ((row.module, INPUT_NAME, row.quantizer) for row in coverage.inputs)
    return [(module, name, quantizer) for module, name, quantizer in (*weights, *inputs) if quantizer is not None]


def _refuse_foreign(paths: list[str]) -> None:
    where = repr(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") if paths else "of another rank"
    raise RuntimeError(
        f"the quantized weight {where} was written by somebody else since the last step. If that was meant (a "
        "checkpoint, a merge), call optimizer.sync_latents() to take the present weights as latents."
    )


def _say_if_on_grid(slots: Sequence[Slot]) -> None:
    rows = [slot for slot in slots if not (slot.lacks_scale or isinstance(slot.quantizer, Identity))]
    found = [is_on_grid(slot) for slot in rows if bool(shards.norms([slot.latent])[0])]
    if found and all(found):
        warnings.warn(
            "the model's weights are on the quantization grid already: training starts from rounded weights. The "
            "full-precision weights live in the optimizer only: load its state_dict to go on from them.",
            UserWarning,
            stacklevel=6,
        )
