"""The guard checks that only the optimizer writes quantized weights, and that their quantizers stay the same.

A write that torch counts changes a fingerprint, which the next check compares. A write through ``.data`` changes the
value only. So each verb that overwrites p (pull back, perturb, a pass with noise) first compares p with the Q(w) that
it computes anyway. The next check reads the answer, because reading it at once would wait for the device.

While a block is open, p is not Q(w), and a hook on the model refuses its ``state_dict``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qsam.coverage import Coverage, refuse_changed
from qsam.distributed import local, norms, whole
from qsam.quantizers import Identity, Quantizer

if TYPE_CHECKING:
    from qsam.latents import Slot

_OVERFLOW = (
    "the scale of {!r} has grown so much that its quantized values are beyond fp16's 65504, and the model holds "
    "infinity there: keep the parameters in fp32 under autocast, lower `scale_lr`, or start from the last checkpoint."
)


class Guard:
    """The state in which the optimizer left a model, and the differences found since.

    Attributes:
        released: Whether the optimizer has handed the model over.
    """

    def __init__(self, coverage: Coverage | None, root: nn.Module) -> None:
        self.released = False
        # A checkpoint may bring other latents than the model had at construction, so the first check examines them.
        self._is_first_check = True
        self._root = root
        self._coverage = coverage
        self._links = [] if coverage is None else _links(root)
        self._attached = [] if coverage is None else _places(coverage)
        self._fingerprints: list[tuple[Any, ...]] = []
        self._differs: list[tuple[str, Tensor | bool]] = []
        self._overflows: list[tuple[str, Tensor]] = []

    def remember(self, slots: Sequence[Slot]) -> None:
        """Remember the fingerprints of all p."""
        self._fingerprints = [slot.fingerprint() for slot in slots]

    def accept_current_weights(self) -> None:
        """Drop the differences found so far, because the present weights become the latents."""
        self._differs.clear()

    def check(
        self, slots: Sequence[Slot], agree: Callable[[bool], bool] | None, among: Callable[[bool], bool] | None
    ) -> None:
        """Raise if other code wrote p or a scale since the last :meth:`remember`.

        A changed fingerprint with equal values is not an error (DDP broadcasts at construction).

        Args:
            slots: The weights.
            agree: Returns whether a flag is set in any process; None if the other processes may not call it now.
            among: The same, among the processes that hold parts of the weights; None if each holds all.
        """
        self.check_attached()
        self._check_tree()
        _refuse_moved(slots)
        overflown = [path for path, flag in self._overflows if bool(flag)]
        self._overflows.clear()
        if overflown:
            raise ValueError(_OVERFLOW.format(overflown[0]))
        if self._is_first_check:
            self._is_first_check = False
            _warn_if_on_grid(slots)
        late = [path for path, flag in self._differs if bool(flag)]
        self._differs.clear()
        changed = [slot for slot, old in zip(slots, self._fingerprints, strict=True) if slot.fingerprint() != old]
        if among is not None:  # the comparison needs all processes, and so does the next call
            agree, changed = among, list(slots) if among(bool(changed)) else []
        foreign = list(dict.fromkeys([s.path for s in changed if not same_values(s.parameter, s.quantized())] + late))
        if bool(foreign) if agree is None else agree(bool(foreign)):
            _refuse_foreign(foreign)
        if changed:
            self.remember(slots)

    def check_attached(self) -> None:
        """Raise if the model no longer has the quantizers that this optimizer was built with, or was handed over."""
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
        """Raise if a quantized module has left the model; wrapping a module is allowed."""
        if self._coverage is not None and any(p._modules.get(name) is not child for p, name, child in self._links):
            refuse_changed(self._coverage, self._root)
            self._links = _links(self._root)

    def compare(self, slot: Slot, q: Tensor) -> None:
        """Compare p with the Q(w) just computed; NaN entries of p are no difference."""
        p, q = local(slot.parameter), local(q)
        if p.dtype == torch.float16:
            self._overflows.append((slot.path, (torch.isinf(p) & torch.isfinite(q)).any()))
        q = q.to(p.dtype)
        if p.device.type != "cpu" or not torch.equal(q, p):  # the usual case on a CPU needs one sweep
            self.report(slot, ((q == p) | torch.isnan(p)).all())

    def report(self, slot: Slot, same: Tensor | bool) -> None:
        """Note a kernel's answer whether p held Q(w)."""
        if same is not True:
            self._differs.append((slot.path, True if same is False else ~same))


def same_values(p: Tensor, expected: Tensor) -> bool:
    """Whether two tensors, or this process's parts of them, agree in dtype, shape and value; NaN equals NaN."""
    a, b = local(p), local(expected)
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())


def _links(root: nn.Module) -> list[tuple[nn.Module, str, nn.Module | None]]:
    return [(parent, name, child) for parent in root.modules() for name, child in parent._modules.items()]


def _places(coverage: Coverage) -> list[tuple[nn.Module, str, Quantizer]]:
    return [(module, name, getattr(module, name)) for module, name, _ in coverage.places]


def _refuse_foreign(paths: list[str]) -> None:
    where = repr(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") if paths else "of another rank"
    raise RuntimeError(
        f"the quantized weight {where} was written by other code since the last step. If that was meant (a "
        "checkpoint, a merge), call optimizer.sync_latents() to take the present weights as latents."
    )


def _refuse_moved(slots: Iterable[Slot]) -> None:
    """Raise if the model was moved to another kind of device and its latents were not."""
    for slot in slots:
        here, there = slot.latent.device, slot.parameter.device
        if here.type != there.type:
            raise RuntimeError(
                f"the model was moved from {here} to {there} ({slot.path!r}), and its latents were not: move the model "
                "first, then build the optimizer."
            )


def _warn_if_on_grid(slots: Sequence[Slot]) -> None:
    rows = [slot for slot in slots if not isinstance(slot.quantizer, Identity)]
    rounded = [_is_on_grid(slot) for slot in rows if bool(norms([slot.latent])[0])]
    if rounded and all(rounded):
        warnings.warn(
            "the model's weights are on the quantization grid already: training starts from rounded weights. The "
            "full-precision weights live in the optimizer only: load its state_dict to go on from them.",
            UserWarning,
            stacklevel=6,
        )


def _is_on_grid(slot: Slot) -> bool:
    """Whether quantizing the latent hardly changes it, because it was rounded before."""
    w = whole(slot.latent.detach())
    gap = (whole(slot.fake_quantize(slot.latent.detach())) - w).abs().max()
    return bool(gap <= 1e-3 * w.abs().max())


# --- blocks in which p is not Q(w) ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _OpenBlock:
    """A hook on the root module that refuses its state_dict, and whose presence shows that a block is open."""

    name: str

    def __call__(self, module: nn.Module, *_: Any) -> None:
        raise RuntimeError(
            f"model.state_dict() inside {self.name}() would save weights that are not Q(w): save outside the block."
        )


def open_block(root: nn.Module, name: str) -> None:
    """Mark the model, because from here on its p are not Q(w)."""
    close_block(root)
    root.register_state_dict_pre_hook(_OpenBlock(name))  # type: ignore[no-untyped-call]


def close_block(root: nn.Module) -> None:
    """Remove the mark."""
    for key, hook in list(root._state_dict_pre_hooks.items()):
        if isinstance(hook, _OpenBlock):
            del root._state_dict_pre_hooks[key]


def block_of(root: nn.Module) -> str | None:
    """Return the name of the block in which the model's p are not Q(w) now, or None."""
    return next((hook.name for hook in root._state_dict_pre_hooks.values() if isinstance(hook, _OpenBlock)), None)
