"""torch.distributed.checkpoint: what so many processes save, another number goes on with."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from qsam.distributed import whole
from tests.methods import (
    BY_NAME,
    FUSED,
    QAT,
    SAM,
    SAQ,
    SQUAT,
    Method,
    assert_same,
    built,
    closure_of,
    everything,
    latents,
    long_but,
    train,
)
from tests.models import CONV, EVERYWHERE, MLP
from tests.processes import Processes, running
from tests.world.test_ddp import part
from tests.world.test_fsdp import close, gathered, shard_

RESUMED = [QAT, BY_NAME["squat-next_batch"], FUSED]
STEPS = 3


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    yield from running(2)


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    yield from running(4)


@pytest.fixture
def one() -> Iterator[Processes]:
    yield from running(1)


def make(method: Method, wrapper: str, base: Any = AdamW) -> tuple[Any, nn.Module, nn.Module]:
    """Return the optimizer, the model, and what is called."""
    model = method.model(MLP, rules=[("0", {"granularity": "per_channel"}), *EVERYWHERE])
    if wrapper == "fsdp":
        shard_(model)
    called = DistributedDataParallel(model) if wrapper == "ddp" else model
    return method(called, base), model, called


def go(optimizer: Any, called: nn.Module, numbers: range, rank: int) -> None:
    for i in numbers:
        optimizer.step(closure_of(optimizer, called, MLP, part(MLP.batch(i), rank)))


def save(rank: int, folder: Path, method: Method, wrapper: str, base: Any) -> None:
    """Train, save, train on; rank 0 notes where that led."""
    optimizer, model, called = make(method, wrapper, base)
    go(optimizer, called, range(STEPS), rank)
    states, optimizers = get_state_dict(called, optimizer)
    dcp.save({"model": states, "optimizer": optimizers}, checkpoint_id=folder / "saved")
    go(optimizer, called, range(STEPS, 2 * STEPS), rank)
    found = gathered(optimizer, model)
    if rank == 0:
        torch.save(found, folder / "later.pt")


def load(rank: int, folder: Path, method: Method, wrapper: str, base: Any, exact: bool) -> None:
    """Go on from what was saved, and be where it led."""
    torch.manual_seed(5)
    optimizer, model, called = make(method, wrapper, base)
    states, optimizers = get_state_dict(called, optimizer)
    both = {"model": states, "optimizer": optimizers}
    dcp.load(both, checkpoint_id=folder / "saved")
    set_state_dict(called, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    assert optimizer.steps == (2 if method.schedule == "next_batch" else STEPS)
    go(optimizer, called, range(STEPS, 2 * STEPS), rank)
    theirs = torch.load(folder / "later.pt", weights_only=True)
    ours = gathered(optimizer, model)
    close(ours, theirs)
    if exact:
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    distributed.barrier()


@pytest.mark.parametrize("base", long_but([AdamW], [AdamW, SGD]), ids=lambda base: base.__name__)
@pytest.mark.parametrize("method", long_but(RESUMED[-1:], RESUMED), ids=str)
def test_two_processes_go_on_to_the_same_bits(method: Method, base: Any, two: Processes, tmp_path: Path) -> None:
    two(save, tmp_path, method, "fsdp", base)
    two(load, tmp_path, method, "fsdp", base, True)


@pytest.mark.long
def test_shards_go_on_as_copies_and_as_one_process(two: Processes, one: Processes, tmp_path: Path) -> None:
    two(save, tmp_path, RESUMED[-1], "fsdp", AdamW)
    two(load, tmp_path, RESUMED[-1], "ddp", AdamW, False)
    one(load, tmp_path, RESUMED[-1], "none", AdamW, False)
    one(load, tmp_path, RESUMED[-1], "fsdp", AdamW, False)


@pytest.mark.long
def test_copies_go_on_as_shards(two: Processes, tmp_path: Path) -> None:
    two(save, tmp_path, RESUMED[-1], "ddp", AdamW)
    two(load, tmp_path, RESUMED[-1], "ddp", AdamW, True)
    two(load, tmp_path, RESUMED[-1], "fsdp", AdamW, False)


@pytest.mark.long
@pytest.mark.parametrize("method", RESUMED, ids=str)
def test_two_processes_go_on_as_four(method: Method, two: Processes, four: Processes, tmp_path: Path) -> None:
    two(save, tmp_path, method, "fsdp", AdamW)
    four(load, tmp_path, method, "fsdp", AdamW, False)
    four(load, tmp_path, method, "ddp", AdamW, False)


def gather_whole(rank: int, folder: Path, method: Method) -> None:
    """A full gather holds what one process would have saved; given back, it is sharded again, bit for bit."""
    optimizer, model, called = make(method, "fsdp")
    go(optimizer, called, range(STEPS), rank)
    options = StateDictOptions(full_state_dict=True)
    states, optimizers = get_state_dict(called, optimizer, options=options)
    states, optimizers = copy.deepcopy((states, optimizers))  # they share tensors with what trains on
    entry = optimizers["state"]["0.weight"]
    latent = whole(optimizer._latents.slots[0].latent.detach())
    assert torch.equal(entry["qsam_latent"], latent)
    assert not any(hasattr(t, "device_mesh") for e in optimizers["state"].values() for t in e.values())
    go(optimizer, called, range(STEPS, 2 * STEPS), rank)
    again, other, called = make(method, "fsdp")
    set_state_dict(called, again, model_state_dict=states, optim_state_dict=optimizers, options=options)
    go(again, called, range(STEPS, 2 * STEPS), rank)
    ours, theirs = gathered(again, other), gathered(optimizer, model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("method", long_but(RESUMED[-1:], RESUMED), ids=str)
def test_a_full_gather_is_the_whole_and_goes_back(method: Method, two: Processes, tmp_path: Path) -> None:
    two(gather_whole, tmp_path, method)


def plain_state_dicts(rank: int) -> None:
    """Each process's own state_dict, without torch.distributed.checkpoint."""
    method = RESUMED[0]
    optimizer, model, called = make(method, "fsdp")
    go(optimizer, called, range(STEPS), rank)
    states, own = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, other, called_again = make(method, "fsdp")
    other.load_state_dict(states)
    again.load_state_dict(own)
    go(optimizer, called, range(STEPS, STEPS + 2), rank)
    go(again, called_again, range(STEPS, STEPS + 2), rank)
    ours, theirs = gathered(again, other), gathered(optimizer, model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_process_may_keep_its_own_part(two: Processes) -> None:
    two(plain_state_dicts)


BASES = {AdamW: {}, SGD: {"momentum": 0.9}}


def zero_gradients(optimizer):
    """Do what torch.distributed.checkpoint does before it loads: zero gradients, every lr 0, one step."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)


@pytest.mark.parametrize(
    ("method", "base"), [(QAT, SGD), (SAM, AdamW), (SAQ, AdamW), (SQUAT, SGD), (FUSED, AdamW)], ids=str
)
def test_a_step_with_every_lr_zero_creates_the_state_only(method, base):
    model, optimizer = built(method, CONV, base, **BASES[base])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    w = latents(optimizer, model)
    zero_gradients(optimizer)
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    assert optimizer.steps == 0
    assert optimizer.param_groups[0]["qsam_phase"] == method(method.model(CONV)).param_groups[0]["qsam_phase"]
    assert_same(model.state_dict(), before)
    assert_same(latents(optimizer, model), w)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize(
    ("method", "base", "flat", "stop"),
    [
        (QAT, AdamW, True, 3),
        (SAM, SGD, False, 3),
        (SAQ, SGD, True, 3),
        (SQUAT, AdamW, False, 0),
        (BY_NAME["squat-next_batch"], AdamW, True, 3),
        (FUSED, SGD, False, 3),
    ],
    ids=str,
)
def test_resuming_through_distributed_checkpoint(method, base, flat, stop, tmp_path):
    """SGD without momentum: a base that never has a state of its own."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def states(model, optimizer):
        model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
        return {"model": model_state, "optimizer": optimizer_state}

    model, optimizer = built(method, MLP, base)
    train(optimizer, model, MLP, stop)
    dcp.save(states(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    train(optimizer, model, MLP, 4, start=stop)

    new_model = method.model(MLP)
    new = method(new_model, base)
    loaded = states(new_model, new)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        new_model, new, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    train(new, new_model, MLP, 4, start=stop)
    assert_same(everything(new, new_model), everything(optimizer, model))
