"""Weights that live in parts on several processes (FSDP2): what the four verbs need to work on a process's own rows.

A sharded tensor is a DTensor. Q, its pull-back and norms are computed on local rows where that gives the same as all:
    Q(w)[rows] = Q(w[rows]; s),   ds = sum over processes of ds[rows],   ||d||^2 = sum over processes of ||d[rows]||^2
and on the gathered weight, one at a time, for a quantizer that may look at more than its own entries.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call

from qsam.private import fsdp_param_dtype
from qsam.quantizers import Quantizer
from qsam.quantizers.base import LIMITS

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def in_process_group() -> bool:
    """Whether this process is one of a group (of one or more)."""
    return distributed.is_available() and distributed.is_initialized()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor, as ``fully_shard`` makes of each Parameter."""
    return "torch.distributed.tensor" in sys.modules and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part, detached and sharing memory; a plain tensor is its own part."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():  # else it is a view with a count of versions of its own, and the guard reads that
        part: Tensor = tensor.to_local()
    return part.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor gathered from all processes, which all must ask for it; a plain one as it is."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every process holds, as sharded as ``like`` is; no communication."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return this process's rows as a part of a tensor of ``like``'s shape and sharding."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each tensor, of all its parts together, in fp32 or wider, without a temporary of its size.

    One communication a process group, not one a tensor.
    """
    found = [torch.linalg.vector_norm(local(t), dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    stacked = torch.stack([n.to(found[0].device) for n in found])
    places: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if groups := _shard_groups(tensor):
            places.setdefault(tuple(groups), []).append(i)
    for key, indices in places.items():
        squares = stacked[indices].square()
        for group in key:
            distributed.all_reduce(squares, group=group)
        stacked[indices] = squares.sqrt()
    return stacked


def any_process(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether ``flag`` is set on any process that holds a part of one of ``tensors``."""
    meshes = {t.device_mesh for t in tensors if is_sharded(t)}
    for mesh in sorted(meshes, key=str):
        seen = torch.tensor([int(flag)], device=mesh.device_type)
        for group in mesh.get_all_groups():
            distributed.all_reduce(seen, distributed.ReduceOp.MAX, group)
        flag = bool(seen)
    return flag


def quantized(quantizer: Quantizer, w: Tensor) -> Tensor:
    """Return Q(w), sharded as w is."""
    if not is_sharded(w):
        return quantizer(w)  # type: ignore[no-any-return]
    part = _Part.of(quantizer, w)
    return part.place(part.run(part.x, part.leaves), w)


def step_size(quantizer: Quantizer, w: Tensor) -> Tensor | None:
    """Return the step size, broadcastable against ``w`` and, where that is sharded, sharded as it is."""
    if not is_sharded(w):
        return quantizer.step_size(w)
    leaves = {f"quantizer.{name}": whole(s) for name, s in quantizer.named_parameters()}
    found = functional_call(_Call(quantizer, "step_size"), leaves, (whole(w),))
    return None if found is None else own_part(found.expand(w.shape).contiguous(), w)


@torch.no_grad()
def apply(quantizer: Quantizer, method: str, w: Tensor) -> Any:
    """Call a method of a quantizer that sets its Parameters from a weight; both may be sharded."""
    own = dict(quantizer.named_parameters())
    if not any(map(is_sharded, [w, *own.values()])):
        return getattr(quantizer, method)(w)
    leaves = {name: whole(s).clone() for name, s in own.items()}
    found = functional_call(
        _Call(quantizer, method), {f"quantizer.{name}": s for name, s in leaves.items()}, (whole(w),)
    )
    for name, s in own.items():
        local(s).copy_(local(own_part(leaves[name], s)))
    return found


class _Call(nn.Module):
    """A method of a quantizer as a module, which ``functional_call`` needs."""

    def __init__(self, quantizer: Quantizer, method: str) -> None:
        super().__init__()
        self.quantizer, self.method = quantizer, method

    def forward(self, w: Tensor) -> Any:
        return getattr(self.quantizer, self.method)(w)


def pull_back(
    quantizer: Quantizer, w: Tensor, grad: Tensor, run: Callable[[Callable[[], Tensor]], Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return Q(w), and the VJP of Q at (w, parameters) applied to ``grad``: dw, and one gradient a Parameter by name.

    Args:
        quantizer: Q.
        w: Where; sharded or not.
        grad: dL/dQ, sharded as w is.
        run: Calls what computes Q, with gradients enabled.
    """
    part = _Part.of(quantizer, w)
    x = part.x.detach().requires_grad_()
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in part.leaves.items()}
    out = run(lambda: part.run(x, leaves))
    g = whole(grad) if part.is_whole else local(grad)
    grads = torch.autograd.grad(out, [x, *leaves.values()], g.to(out.dtype), materialize_grads=True)
    own = dict(quantizer.named_parameters())
    ds = {name: part.place_gradient(name, d, own[name], w) for name, d in zip(leaves, grads[1:], strict=True)}
    return part.place(out.detach(), w), part.place(grads[0], w), ds


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a process computes Q on: a plain weight, its own rows of a sharded one, or all of it."""

    quantizer: Quantizer
    x: Tensor
    leaves: dict[str, Tensor]
    is_whole: bool

    @staticmethod
    def of(quantizer: Quantizer, w: Tensor) -> _Part:
        own: dict[str, Tensor] = dict(quantizer.named_parameters())
        if not is_sharded(w):
            return _Part(quantizer, w, own, False)
        if not _works_on_rows(quantizer, w):
            return _Part(quantizer, whole(w), {name: whole(s) for name, s in own.items()}, True)
        return _Part(
            quantizer, local(w), {name: local(s) if _follows(s, w) else whole(s) for name, s in own.items()}, False
        )

    def run(self, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        # Processes that hold no row (a weight of fewer rows than processes) take part in the communication only.
        return functional_call(self.quantizer, leaves, (x,)) if x.numel() else x.clone()

    def place(self, out: Tensor, w: Tensor) -> Tensor:
        return own_part(out, w) if self.is_whole else from_rows(out, w)

    def place_gradient(self, name: str, ds: Tensor, s: Tensor, w: Tensor) -> Tensor:
        """Sum the gradient of a parameter over the processes that computed parts of it, and shard it as that is."""
        if self.is_whole or not is_sharded(w):
            return own_part(ds, s)
        # LSQ divides by the root of the number of entries that it sees, here too few.
        total, seen = w.numel() // max(s.numel(), 1), self.x.numel() // max(self.leaves[name].numel(), 1)
        ds = ds * (self.quantizer.gradient_scale(total) / self.quantizer.gradient_scale(seen))
        if _follows(s, w):
            return from_rows(ds, s)
        for group in _shard_groups(w):
            distributed.all_reduce(ds, group=group)
        return own_part(ds, s)


def _works_on_rows(quantizer: Quantizer, w: Tensor) -> bool:
    """Whether Q of this process's rows can be computed from them: Q is so, and its tensors are there row by row."""
    if not quantizer.rowwise:
        return False
    own = [t for key, t in quantizer.state_dict(keep_vars=True).items() if key != LIMITS]
    return all(t.numel() == 1 or _follows(t, w) for t in own)


def _follows(s: Tensor, w: Tensor) -> bool:
    """Whether a parameter has one entry (or row of entries) a row of w, on the same process."""
    same = is_sharded(s) and is_sharded(w) and s.device_mesh == w.device_mesh and s.placements == w.placements
    return same and s.dim() == w.dim() and s.shape[0] == w.shape[0] and s.shape[0] > 1


def _shard_groups(tensor: Tensor) -> list[distributed.ProcessGroup]:
    """Return the groups over which the rows are spread; over the others they are repeated."""
    if not is_sharded(tensor):
        return []
    return [tensor.device_mesh.get_group(i) for i, kind in enumerate(tensor.placements) if kind.is_shard()]


# --- the model ------------------------------------------------------------------------------------------------------


def reshard_(root: nn.Module) -> None:
    """Put the gathered Parameters away: after an evaluation FSDP2 leaves those of the root where the shards belong."""
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_unknown(root: nn.Module) -> None:
    """Refuse what splits weights in another way.

    Raises:
        ValueError: FSDP1, DeepSpeed's ZeRO 3, or a DTensor that is not split by rows; names the cure.
    """
    for name, module in root.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"{name or 'the model'!r} is wrapped in FSDP1, which flattens weights: {_CURE}")
    for name, p in root.named_parameters():
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(f"{name!r} belongs to FSDP1, which flattens weights: {_CURE}")
        if hasattr(p, "ds_id"):
            raise ValueError(f"{name!r} belongs to DeepSpeed's ZeRO 3, which empties weights: {_CURE}")
        if is_sharded(p) and not all(_by_rows(kind) for kind in p.placements):
            shown = ", ".join(map(str, p.placements))
            raise ValueError(f"{name!r} is placed as ({shown}), but qsam knows Shard(0) and Replicate() only: {_CURE}")


_CURE = "use FSDP2, `torch.distributed.fsdp.fully_shard`, without tensor parallelism, or DistributedDataParallel."


def _by_rows(kind: Any) -> bool:
    return bool(kind.is_replicate() or kind.is_shard(0)) and "Strided" not in type(kind).__name__


def refuse_16_bit_scales(root: nn.Module, inputs: Iterable[tuple[str, Quantizer]]) -> None:
    """Refuse a ``param_dtype`` that would round the scales of inputs in the forward: 8 % of 8-bit codes change.

    Raises:
        ValueError: with the path and the cure.
    """
    from torch.distributed.fsdp import FSDPModule

    sharders = [m for m in root.modules() if isinstance(m, FSDPModule)]
    for path, quantizer in inputs:
        around = [m for m in sharders if any(quantizer is below for below in m.modules())]
        dtype = fsdp_param_dtype(around[-1]) if around else None
        if dtype in (torch.float16, torch.bfloat16) and any(True for _ in quantizer.parameters()):
            raise ValueError(
                f"the scale of the input of {path!r} would be {dtype} in the forward under this MixedPrecisionPolicy: "
                "call fully_shard(row.quantizer) without one for each row of coverage.inputs that has a quantizer, "
                "before the layers."
            )


def refuse_stale_groups(root: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Refuse groups that hold Parameters from before ``fully_shard``: a step would train nothing.

    Raises:
        RuntimeError: with the cure.
    """
    present = {id(p) for p in root.parameters()}
    stale = sum(id(p) not in present for group in groups for p in group["params"])
    if stale:
        raise RuntimeError(
            f"fully_shard replaced the Parameters of the model, and {stale} of the old ones are in the optimizer's "
            "groups, where they would train nothing: call fully_shard before the optimizer is built, or write the new "
            'ones into `group["params"]` in the old order (Accelerate does).'
        )
