"""Pairs of options on two real processes: ranks stay equal, and no option of DistributedDataParallel changes a bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import qsam
from tests.methods import latents
from tests.processes import Processes, running

STEPS = 4
CLASSES = {"saq": qsam.SAQ, "squat": qsam.SQuAT, "joint": qsam.JointSAM}


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    yield from running(2)


def trained(rank: int, method: str, by_hand: bool, wrap: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """Return w and the scales after four steps, each rank on batches of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    qsam.quantize_(model, activations=None)
    ddp = DistributedDataParallel(model, **wrap)
    optimizer = CLASSES[method](ddp, SGD, lr=0.1, momentum=0.9, rho=0.3, **options)
    for i in range(STEPS):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(10 * i + rank))

        def run(x: Tensor = x) -> Tensor:
            loss = ddp(x).square().mean()
            loss.backward()
            return loss

        def closure(run: Any = run) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = run()
            return loss

        if by_hand:
            in_blocks(optimizer, run)
        else:
            optimizer.step(closure)
    return latents(optimizer, model) | {name: p.detach() for name, p in model.named_parameters() if "scale" in name}


def in_blocks(optimizer: Any, run: Any) -> None:
    optimizer.zero_grad()
    for number, block in enumerate(optimizer.blocks):
        if number and optimizer.scales_due:
            optimizer.step_scales()
        with getattr(optimizer, block)():
            run()
    optimizer.step()
    if getattr(optimizer, "schedule", "") == "same_batch" and optimizer.scales_due:
        with optimizer.scale_phase():
            run()
        optimizer.step()


def assert_equal_everywhere(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        both = [torch.zeros_like(tensor) for _ in range(2)]
        distributed.all_gather(both, tensor.contiguous())
        assert torch.equal(*both), name


def the_same(rank: int, method: str, runs: list[tuple[bool, dict[str, Any]]], options: dict[str, Any]) -> None:
    """Each run ends with equal ranks, and with the bits of the first."""
    ends = [trained(rank, method, by_hand, wrap, options) for by_hand, wrap in runs]
    for end in ends:
        assert_equal_everywhere(end)
        assert all(torch.equal(tensor, ends[0][name]) for name, tensor in end.items())


SCOPED = [
    ("saq", {"every": 2}),
    ("saq", {"every": 3, "start": 1}),
    ("saq", {"start": 2}),
    ("saq", {"direction": "previous"}),
    ("saq", {"direction": "momentum", "every": 2}),
    ("squat", {"every": 2}),
    ("squat", {"start": 2, "schedule": "next_batch"}),
    ("squat", {"every": 2, "schedule": "fused"}),
    ("joint", {"every": 2, "direction": "asam"}),
]


@pytest.mark.parametrize(("method", "options"), SCOPED, ids=str)
def test_steps_that_are_not_perturbed_keep_the_ranks_equal_by_hand_as_with_the_closure(two, method, options):
    """With scope "rank" a first pass is averaged unless a perturbed pass follows it."""
    two(the_same, method, [(False, {}), (True, {})], {"perturbation_scope": "rank", **options})


VIEWS = [
    ("saq", {"every": 2, "reuse": "perturbation"}),
    ("squat", {"every": 3, "reuse": "perturbation"}),
    ("joint", {"every": 2, "reuse": "perturbation", "direction": "asam", "start": 1}),
    ("saq", {"direction": "previous"}),
    ("saq", {"direction": "friendly"}),
    ("squat", {"schedule": "fused"}),
]


@pytest.mark.parametrize(("method", "options"), VIEWS, ids=str)
def test_gradients_that_are_views_of_buckets_change_no_bit(two, method, options):
    """DDP writes the next pass's gradients where the last one's were: what is kept of them must be a copy."""
    runs = [(by_hand, {"gradient_as_bucket_view": view}) for by_hand in (False, True) for view in (False, True)]
    two(the_same, method, runs, options)
