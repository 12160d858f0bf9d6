"""A model on several processes, sharded (FSDP2) or copied (DistributedDataParallel).

Sharded: a tensor is a DTensor. Q, its pull-back and norms are computed on a process's own rows if that gives the same
result as the whole weight,

    Q(w)[rows] = Q(w[rows]; s),   ds = sum over processes of ds[rows],   ||d||^2 = sum over processes of ||d[rows]||^2

and otherwise on the gathered weight, one weight at a time. (``local_map`` of torch.distributed.tensor.experimental
assumes that the result is split evenly, but a head of 10 classes on 4 processes is not.)

Copied: the processes must agree on the tensors that DistributedDataParallel does not know:

    first step      rank 0's latents, scales and noise seeds go to all (DDP broadcasts p only)
    each check      one flag: if a weight was written on one rank, all ranks raise, and none waits forever
    scope="rank"    the first pass under no_sync: each rank perturbs with its own gradient (SAM's m-sharpness)

In a single process nothing here costs time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from qsam import inputs
from qsam.layers import unwrap_model
from qsam.private import fsdp_param_dtype
from qsam.quantizers import Quantizer
from qsam.quantizers.base import LIMITS

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from qsam.latents import Latents

SCOPES = ("global", "rank")

DataParallel = DistributedDataParallel | bool | None


def in_process_group() -> bool:
    """Whether this process belongs to a process group."""
    return distributed.is_available() and distributed.is_initialized()


# --- a sharded tensor -------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor, as ``fully_shard`` makes of each Parameter."""
    return "torch.distributed.tensor" in sys.modules and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, or a plain tensor; detached, sharing memory."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():  # otherwise it would be a view with a separate version, which the guard reads
        part: Tensor = tensor.to_local()
    return part.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor gathered from all processes, which must all call this; a plain tensor unchanged."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every process holds as ``like`` is sharded, without communication."""
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
    """Return the L2 norm of each whole tensor, in fp32 or wider, without a temporary of its size.

    There is one communication per process group, not one per tensor.
    """
    own = [torch.linalg.vector_norm(local(t), dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    stacked = torch.stack([n.to(own[0].device) for n in own])
    places: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if groups := _shard_groups(tensor):
            places.setdefault(tuple(groups), []).append(i)
    for owners, indices in places.items():
        stacked[indices] = _sum_(stacked[indices].square(), owners).sqrt()
    return stacked


def any_process(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether ``flag`` is set on any process that holds a part of one of ``tensors``."""
    meshes = {t.device_mesh for t in tensors if is_sharded(t)}
    for mesh in sorted(meshes, key=str):
        for group in mesh.get_all_groups():
            flag = _any(flag, mesh.device_type, group)
    return flag


def _mesh_groups(tensors: Iterable[Tensor]) -> list[distributed.ProcessGroup | None]:
    """Return the groups of processes over which parts or copies of these tensors are spread."""
    meshes = {t.device_mesh for t in tensors if is_sharded(t)}
    return [group for mesh in sorted(meshes, key=str) for group in mesh.get_all_groups()]


def _shard_groups(tensor: Tensor) -> list[distributed.ProcessGroup]:
    """Return the process groups over which the rows are distributed."""
    if not is_sharded(tensor):
        return []
    return [tensor.device_mesh.get_group(i) for i, kind in enumerate(tensor.placements) if kind.is_shard()]


def _sum_(tensor: Tensor, groups: Iterable[distributed.ProcessGroup]) -> Tensor:
    for group in groups:
        distributed.all_reduce(tensor, group=group)
    return tensor


def _any(flag: bool, device: torch.device | str, group: distributed.ProcessGroup) -> bool:
    anywhere = torch.tensor([int(flag)], device=device)
    distributed.all_reduce(anywhere, distributed.ReduceOp.MAX, group)
    return bool(anywhere)


# --- a quantizer on a sharded weight ----------------------------------------------------------------------------------


def quantized(quantizer: Quantizer, w: Tensor) -> Tensor:
    """Return Q(w), sharded as w is."""
    if not is_sharded(w):
        return quantizer(w)  # type: ignore[no-any-return]
    part = _Part.of(quantizer, w)
    return part.place(part.run(part.x, part.leaves), w)


def vjp(
    quantizer: Quantizer, w: Tensor, grad: Tensor, run: Callable[[Callable[[], Tensor]], Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return Q(w), and the VJP of Q at (w, parameters) applied to ``grad``: dw, and one gradient per Parameter by name.

    ``grad`` is dL/dQ, sharded as w is; ``run`` calls the function that computes Q, with gradients enabled.
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


def step_size(quantizer: Quantizer, w: Tensor) -> Tensor | None:
    """Return the step size, broadcastable against ``w`` and, if that is sharded, sharded as it is."""
    if not is_sharded(w):
        return quantizer.step_size(w)
    step, _ = _call_whole(quantizer, "step_size", w)
    return None if step is None else own_part(step.expand(w.shape).contiguous(), w)


@torch.no_grad()
def apply(quantizer: Quantizer, method: str, w: Tensor) -> Any:
    """Call a method of a quantizer that sets its Parameters from a weight; either may be sharded."""
    own = dict(quantizer.named_parameters())
    if not any(map(is_sharded, [w, *own.values()])):
        return getattr(quantizer, method)(w)
    answer, leaves = _call_whole(quantizer, method, w)
    for name, s in own.items():
        local(s).copy_(local(own_part(leaves[f"quantizer.{name}"], s)))
    return answer


def _call_whole(quantizer: Quantizer, method: str, w: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Call a method on the gathered weight; return its answer and copies of the Parameters, which it may have set."""
    leaves = {f"quantizer.{name}": whole(s).clone() for name, s in quantizer.named_parameters()}
    return functional_call(_Call(quantizer, method), leaves, (whole(w),)), leaves


class _Call(nn.Module):
    """A method of a quantizer as a module, for ``functional_call``."""

    def __init__(self, quantizer: Quantizer, method: str) -> None:
        super().__init__()
        self.quantizer, self.method = quantizer, method

    def forward(self, w: Tensor) -> Any:
        return getattr(self.quantizer, self.method)(w)


@dataclasses.dataclass(frozen=True)
class _Part:
    """The tensors on which a process computes Q: a plain weight, its rows of a sharded one, or a gathered one."""

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
        leaves = {name: local(s) if _follows(s, w) else whole(s) for name, s in own.items()}
        return _Part(quantizer, local(w), leaves, False)

    def run(self, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        # Processes that hold no row (a weight of fewer rows than processes) take part in the communication only.
        return functional_call(self.quantizer, leaves, (x,)) if x.numel() else x.clone()

    def place(self, out: Tensor, w: Tensor) -> Tensor:
        return own_part(out, w) if self.is_whole else from_rows(out, w)

    def place_gradient(self, name: str, ds: Tensor, s: Tensor, w: Tensor) -> Tensor:
        """Sum the gradient of a parameter over the processes that computed parts of it; shard it as the parameter."""
        if self.is_whole or not is_sharded(w):
            return own_part(ds, s)
        # LSQ divides by the root of the number of entries that it sees, which are only a part here.
        total, seen = w.numel() // max(s.numel(), 1), self.x.numel() // max(self.leaves[name].numel(), 1)
        ds = ds * (self.quantizer.gradient_scale(total) / self.quantizer.gradient_scale(seen))
        return from_rows(ds, s) if _follows(s, w) else own_part(_sum_(ds, _shard_groups(w)), s)


def _works_on_rows(quantizer: Quantizer, w: Tensor) -> bool:
    """Whether Q of this process's rows needs only these rows, and its tensors are split by the same rows."""
    if not quantizer.rowwise:
        return False
    own = [t for key, t in quantizer.state_dict(keep_vars=True).items() if key != LIMITS]
    return all(t.numel() == 1 or _follows(t, w) for t in own)


def _follows(s: Tensor, w: Tensor) -> bool:
    """Whether a parameter has one entry (or row of entries) per row of w, on the same process."""
    same = is_sharded(s) and is_sharded(w) and s.device_mesh == w.device_mesh and s.placements == w.placements
    return same and s.dim() == w.dim() and s.shape[0] == w.shape[0] and s.shape[0] > 1


# --- a model under fully_shard ----------------------------------------------------------------------------------------


def follow_fsdp(latents: Latents, base: Optimizer | None = None) -> None:
    """Put a sharded model's shards in place, and shard each latent, and its state in ``base``, as its p is."""
    if not in_process_group():
        return
    root = latents.root
    if latents.sharded or inputs.is_sharded(root.modules()):
        reshard_(root)
    if latents.sharded or not any(is_sharded(p) for p in root.parameters()):
        return
    refuse_unknown(root)
    _refuse_16_bit_scales(latents)
    if base is not None:
        _refuse_stale_groups(root, base.param_groups)
    for slot in latents.slots:
        if is_sharded(slot.parameter) and not is_sharded(slot.latent):
            before = slot.latent
            slot.latent = nn.Parameter(own_part(before.detach(), slot.parameter))
            if base is not None and before in base.state:
                base.state[slot.latent] = base.state.pop(before)
    latents.sharded = True


def reshard_(root: nn.Module) -> None:
    """Replace gathered Parameters by their shards; after an evaluation FSDP2 leaves those of the root gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_unknown(root: nn.Module) -> None:
    """Refuse a model under FSDP1 or DeepSpeed's ZeRO 3, and a DTensor that is not split by rows."""
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


def _refuse_16_bit_scales(latents: Latents) -> None:
    """Refuse a ``param_dtype`` that would round the scales of inputs in the forward and change 8 % of 8-bit codes."""
    from torch.distributed.fsdp import FSDPModule

    sharders = [m for m in latents.root.modules() if isinstance(m, FSDPModule)]
    for row in latents.coverage.inputs if latents.coverage is not None else ():
        quantizer = row.quantizer
        around = [m for m in sharders if any(quantizer is below for below in m.modules())]
        dtype = fsdp_param_dtype(around[-1]) if around else None
        if dtype in (torch.float16, torch.bfloat16) and quantizer is not None and any(quantizer.named_parameters()):
            raise ValueError(
                f"the scale of the input of {row.name!r} would be {dtype} in the forward under this "
                "MixedPrecisionPolicy: call fully_shard(row.quantizer) without one for each row of coverage.inputs "
                "that has a quantizer, before the layers."
            )


def _refuse_stale_groups(root: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Refuse groups that hold Parameters from before ``fully_shard``, because a step would not train the model."""
    present = {id(p) for p in root.parameters()}
    stale = sum(id(p) not in present for group in groups for p in group["params"])
    if stale:
        raise RuntimeError(
            f"fully_shard replaced the Parameters of the model, and {stale} of the old ones are in the optimizer's "
            "groups, where they would train nothing: call fully_shard before the optimizer is built, or write the new "
            'ones into `group["params"]` in the old order (Accelerate does).'
        )


# --- copies of a model ------------------------------------------------------------------------------------------------


class Ranks:
    """The processes that train copies of one model; ``ddp`` and ``scope`` as in the optimizer."""

    def __init__(self, model: nn.Module, ddp: DataParallel, scope: str = "global") -> None:
        if not (ddp is None or ddp is False or isinstance(ddp, DistributedDataParallel)):
            raise TypeError(
                "`ddp` must be the DistributedDataParallel model, None, or False if each process trains a different "
                f"model, got {type(ddp).__name__}."
            )
        if isinstance(ddp, DistributedDataParallel) and unwrap_model(ddp) is not unwrap_model(model):
            raise ValueError(
                "`ddp` must be around the model that the optimizer is given, and it is around another one."
            )
        self.ddp = _wrapper_of(model) if ddp is None else ddp
        self.scope = scope
        if scope == "rank" and not isinstance(self.ddp, DistributedDataParallel):
            raise ValueError(
                "perturbation_scope='rank' must keep DistributedDataParallel from averaging the first pass: build that "
                "first, and give it as the model or as `ddp`."
            )
        if scope == "rank" and getattr(self.ddp, "static_graph", False):
            raise ValueError(
                "perturbation_scope='rank' runs first passes under no_sync, which DistributedDataParallel does not do "
                "with static_graph=True: build it without."
            )
        self._shared_in: distributed.ProcessGroup | None = None
        self._compares_after_step = False

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The processes, if there is more than one."""
        if self.ddp is False or not in_process_group():
            return None
        group = self.ddp.process_group if isinstance(self.ddp, DistributedDataParallel) else distributed.group.WORLD
        return group if group is not None and group.size() > 1 else None

    def first_pass(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which gradients are not averaged if each rank has its own e."""
        if self.scope == "rank":
            assert isinstance(self.ddp, DistributedDataParallel)
            return self.ddp.no_sync()
        return contextlib.nullcontext()

    def share_rank_0(self, latents: Latents, steps: int, groups: Sequence[dict[str, Any]]) -> None:
        """Take rank 0's latents, scales, seeds and rates of the scales, once per process group.

        If the ranks are at different ``steps``, all raise. ``groups`` are the optimizer's parameter groups.
        """
        group = self.group
        if group is None or group is self._shared_in or latents.sharded:
            return
        device = _device(latents)
        if not _equal(torch.tensor([steps], device=device), group):
            raise RuntimeError(
                f"the ranks are at different steps ({steps} here): load the optimizer's checkpoint on every rank."
            )
        for tensor in _owned(latents):
            _broadcast(tensor, group)
        _share_rates([g for g in groups if "qsam_scales" in g], group, device)
        self._shared_in, self._compares_after_step = group, True

    def any(self, flag: bool, latents: Latents) -> bool:
        """Whether ``flag`` is set on any rank."""
        group = self.group
        return flag if group is None or latents.sharded else _any(flag, _device(latents), group)

    def take_largest_(self, tensors: Sequence[Tensor], latents: Latents) -> None:
        """Write the entrywise largest values of all ranks into some tensors of one entry, in one communication."""
        groups = [self.group] if not latents.sharded else _mesh_groups(latents.root.parameters())
        if not tensors or groups == [None]:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        for group in groups:
            distributed.all_reduce(flat, distributed.ReduceOp.MAX, group)
        for tensor, value in zip(tensors, flat, strict=True):
            tensor.copy_(value)

    def mean(self, grads: Mapping[int, Tensor], order: Sequence[Tensor]) -> dict[int, Tensor]:
        """Average gradients of a pass that was not synchronized, in one communication.

        Args:
            grads: By the id of the tensor; one that is missing on some ranks counts as 0 there.
            order: The tensors, in the same order on all ranks.
        """
        group = self.group
        if group is None or self.scope != "rank" or not order:
            return dict(grads)
        found = [grads.get(id(t)) for t in order]
        flat = torch.cat(
            [(torch.zeros_like(t) if g is None else g).flatten() for g, t in zip(found, order, strict=True)]
        )
        flat = torch.cat([flat, flat.new_tensor([float(g is not None) for g in found])])
        distributed.all_reduce(flat, group=group)
        values, counts = flat[: -len(order)] / group.size(), flat[-len(order) :].tolist()
        means = torch.split(values, [t.numel() for t in order])
        return {id(t): v.view_as(t) for t, v, n in zip(order, means, counts, strict=True) if n > 0}

    def refuse_unequal(self, latents: Latents) -> None:
        """Raise on all ranks if they differ after the first step, because their gradients are not averaged."""
        group = self.group
        if not self._compares_after_step or group is None or latents.sharded:
            return
        self._compares_after_step = False
        sums = [_bits(t) for t in (*_owned(latents), *latents.root.parameters())]
        if not _equal(torch.stack([n.to(_device(latents)) for n in sums]), group):
            raise RuntimeError(
                "the ranks hold different weights after a step: wrap the model in DistributedDataParallel after "
                "quantize_ (and run the wrapper, not the model inside), or give `ddp=False` if each process trains a "
                "different model."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Omit the process group, so that a copy takes rank 0's latents again."""
        return {**self.__dict__, "_shared_in": None}


def _wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def _device(latents: Latents) -> torch.device:
    return next(latents.root.parameters()).device


def _owned(latents: Latents) -> Iterable[Tensor]:
    """Yield the tensors that DDP does not know, which must be equal on all ranks."""
    for slot in latents.slots:
        yield slot.latent.detach()
    for quantizer in latents.coverage.quantizers.values() if latents.coverage is not None else ():
        yield from quantizer.state_dict(keep_vars=True).values()


def _share_rates(groups: Sequence[dict[str, Any]], group: distributed.ProcessGroup, device: torch.device) -> None:
    """Give all ranks rank 0's balance of the scales' rates, because it depends on the initial weights."""
    balanced = [g for g in groups if "qsam_balance" in g]
    numbers = torch.tensor([[g["qsam_balance"], g["lr"]] for g in balanced], dtype=torch.float64, device=device)
    _broadcast(numbers, group)
    for g, (balance, lr) in zip(balanced, numbers.tolist(), strict=True):
        g.update(qsam_balance=balance, lr=lr)


@torch.no_grad()
def _broadcast(tensor: Tensor, group: distributed.ProcessGroup) -> None:
    if tensor.numel():
        distributed.broadcast(tensor, group=group, group_src=0)


def _bits(tensor: Tensor) -> Tensor:
    """Return a sum over the bits as integers, which is exact."""
    flat = tensor.detach().contiguous().flatten()
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.view(words[flat.element_size()]).sum(dtype=torch.int64)


def _equal(numbers: Tensor, group: distributed.ProcessGroup) -> bool:
    ends = torch.cat([numbers, -numbers])
    distributed.all_reduce(ends, distributed.ReduceOp.MAX, group)
    high, low = ends.chunk(2)
    return torch.equal(high, -low)


def owned_copy(gradient: Tensor) -> Tensor:
    """Return a gradient that DDP will not overwrite: with ``gradient_as_bucket_view`` it reuses their memory."""
    if gradient.is_sparse or hasattr(gradient, "device_mesh"):
        return gradient
    return gradient if gradient.untyped_storage().nbytes() == gradient.nbytes else gradient.clone()
