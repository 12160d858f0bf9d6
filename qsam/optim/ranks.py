"""One model, many processes that hold all of it (DistributedDataParallel): what they must agree on.

    first step      rank 0's latents, scales and noise seeds go to all (DDP broadcasts p alone)
    each check      one flag: if somebody else wrote a weight on one rank, all ranks raise and none waits for ever
    scope="rank"    the first pass under no_sync: each rank perturbs with its own gradient (SAM's m-sharpness)

Without a process group of more than one process nothing here costs anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from qsam.layers import unwrap_model
from qsam.shards import in_process_group

if TYPE_CHECKING:
    from qsam.latent import Latents

SCOPES = ("global", "rank")

DataParallel = DistributedDataParallel | bool | None


class Ranks:
    """The processes that train copies of one model.

    Args:
        model: What the user gave the optimizer: the model, or a wrapper round it.
        ddp: The DistributedDataParallel model, where ``model`` is not in one. None: every process of the default group
            trains the same model, once there is a group. False: this process trains a model of its own.
        scope: ``"global"``: one e for all. ``"rank"``: each rank its own.

    Raises:
        TypeError: ``ddp`` of the wrong kind.
        ValueError: ``ddp`` is round another model; ``"rank"`` without it, or with its ``static_graph``.
    """

    def __init__(self, model: nn.Module, ddp: DataParallel, scope: str = "global") -> None:
        if not (ddp is None or ddp is False or isinstance(ddp, DistributedDataParallel)):
            raise TypeError(
                "`ddp` must be the DistributedDataParallel model, None, or False where each process trains a model of "
                f"its own, got {type(ddp).__name__}."
            )
        if isinstance(ddp, DistributedDataParallel) and unwrap_model(ddp) is not unwrap_model(model):
            raise ValueError("`ddp` must be round the model that the optimizer is given, and it is round another one.")
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
        self._met: distributed.ProcessGroup | None = None
        self._unverified = False

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The processes, if there is more than one."""
        if self.ddp is False or not in_process_group():
            return None
        group = self.ddp.process_group if isinstance(self.ddp, DistributedDataParallel) else distributed.group.WORLD
        return group if group is not None and group.size() > 1 else None

    def first_pass(self) -> contextlib.AbstractContextManager[None]:
        """Keep the gradients of a first pass apart, forward and backward, where each rank has its own e."""
        if self.scope == "rank":
            assert isinstance(self.ddp, DistributedDataParallel)
            return self.ddp.no_sync()
        return contextlib.nullcontext()

    def meet(self, latents: Latents, steps: int, groups: Sequence[dict[str, Any]]) -> None:
        """Take rank 0's latents, scales, seeds and rates of the scales, once a process group.

        Args:
            latents: What the optimizer owns.
            steps: How many it has taken.
            groups: Its parameter groups; balanced rates of scales come from the weights, which may have differed.

        Raises:
            RuntimeError: on all ranks, if they are at different steps.
        """
        group = self.group
        if group is None or group is self._met or latents.sharded:
            return
        device = _device(latents)
        if not _equal(torch.tensor([steps], device=device), group):
            raise RuntimeError(
                f"the ranks are at different steps ({steps} here): load the optimizer's checkpoint on every rank."
            )
        for tensor in _owned(latents):
            _broadcast(tensor, group)
        _share_rates([g for g in groups if "qsam_scales" in g], group, device)
        self._met, self._unverified = group, True

    def any(self, flag: bool, latents: Latents) -> bool:
        """Whether ``flag`` is set on any rank."""
        group = self.group
        if group is None or latents.sharded:
            return flag
        seen = torch.tensor([int(flag)], device=_device(latents))
        distributed.all_reduce(seen, distributed.ReduceOp.MAX, group)
        return bool(seen)

    def mean(self, grads: Mapping[int, Tensor], order: Sequence[Tensor]) -> dict[int, Tensor]:
        """Average gradients that come from a pass that was not synchronized, in one communication.

        Args:
            grads: By the id of the tensor; one that is missing on some ranks counts as 0 there.
            order: The tensors, in an order that all ranks share.
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

    def verify(self, latents: Latents) -> None:
        """See, after the first step only, that the ranks hold the same: without DDP their gradients are not averaged.

        Raises:
            RuntimeError: on all ranks, if they differ.
        """
        group = self.group
        if not self._unverified or group is None or latents.sharded:
            return
        self._unverified = False
        sums = [_bits(t) for t in (*_owned(latents), *latents.root.parameters())]
        if not _equal(torch.stack([n.to(_device(latents)) for n in sums]), group):
            raise RuntimeError(
                "the ranks hold different weights after a step: wrap the model in DistributedDataParallel after "
                "quantize_ (and run the wrapper, not the model inside), or give `ddp=False` where each process trains "
                "a model of its own."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Forget the process group: a copy meets the others anew."""
        return {**self.__dict__, "_met": None}


def _wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def _device(latents: Latents) -> torch.device:
    return next(latents.root.parameters()).device


def _owned(latents: Latents) -> Iterable[Tensor]:
    """Yield what DDP does not know of, and what must be equal before it averages anything."""
    for slot in latents.slots:
        yield slot.latent.detach()
    for quantizer in latents.quantizers:
        yield from quantizer.state_dict(keep_vars=True).values()


def _share_rates(groups: Sequence[dict[str, Any]], group: distributed.ProcessGroup, device: torch.device) -> None:
    """Give all ranks rank 0's balance of the scales' rates: it was taken from weights that may have differed."""
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
    """Return a sum over the bits, which no rounding touches."""
    flat = tensor.detach().contiguous().flatten()
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.view(words[flat.element_size()]).sum(dtype=torch.int64)


def _equal(numbers: Tensor, group: distributed.ProcessGroup) -> bool:
    ends = torch.cat([numbers, -numbers])
    distributed.all_reduce(ends, distributed.ReduceOp.MAX, group)
    high, low = ends.chunk(2)
    return torch.equal(high, -low)


def owned_copy(gradient: Tensor) -> Tensor:
    """Return a gradient that nobody overwrites: with ``gradient_as_bucket_view`` DDP reuses the place of the last."""
    if gradient.is_sparse or hasattr(gradient, "device_mesh"):
        return gradient
    return gradient if gradient.untyped_storage().nbytes() == gradient.nbytes else gradient.clone()
