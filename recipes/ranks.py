"""A recipe on several processes: who they are, what each trains on, and who writes.

Started by `torchrun`; without it there is one process, and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it ends with an error; `QSAM_TIMEOUT` (seconds) replaces it."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within this context the processes that `torchrun` started are a group: NCCL with GPUs, gloo without."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    seconds = os.environ.get("QSAM_TIMEOUT")
    timeout = timedelta(seconds=float(seconds)) if seconds else TIMEOUT
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's number."""
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0


def say(text: str) -> None:
    """Print, once."""
    if is_first():
        print(text, flush=True)


def wait() -> None:
    """Wait until all are here."""
    if count() > 1:
        distributed.barrier()


def from_first(flag: bool) -> bool:
    """Return what process 0 says."""
    if count() == 1:
        return flag
    values = [flag]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Run the block in process 0, then in the others: what it downloads they find."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def everyones(value: Any) -> list[Any]:
    """Return what each process holds, by number."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def wrapped(model: nn.Module) -> nn.Module:
    """Return the model, in DistributedDataParallel where there are several processes."""
    return model if count() == 1 else DistributedDataParallel(model)


def part_ways(seed: int) -> None:
    """Give each process but the first random numbers of its own: the dropout of its rows."""
    if rank():
        torch.manual_seed(seed + 1_000_003 * rank())


def own_rows(batch: Sequence[int]) -> list[int]:
    """Return this process's rows of a batch: every `count()`-th; with fewer rows than processes some come twice."""
    padded = [*batch] + [batch[i % len(batch)] for i in range(max(0, count() - len(batch)))]
    return padded[rank() :: count()]


def weight_of(batch: Sequence[int]) -> float:
    """Return the factor of this process's mean loss, so that the average over processes is the mean over all rows."""
    return len(own_rows(batch)) * count() / max(len(batch), count())


def mean(loss: float) -> float:
    """Return the average over the processes."""
    if count() == 1:
        return loss
    total = torch.tensor([loss], dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    distributed.all_reduce(total)
    return float(total) / count()
