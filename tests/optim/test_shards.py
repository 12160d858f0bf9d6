"""FSDP2 on real processes: latents and scales live in parts, and training equals one process."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import SGD, AdamW

import qsam
from qsam.shards import is_sharded, local, whole
from tests.models import EVERYWHERE, MLP, Task
from tests.optim.methods import METHODS, Method, closure_of, scales_of
from tests.optim.test_ranks import part
from tests.processes import Processes, running

SAQ = next(m for m in METHODS if m.name == "saq")
QAT = next(m for m in METHODS if m.name == "qat")
SQUAT = next(m for m in METHODS if m.schedule == "same_batch")


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    yield from running(2)


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    yield from running(4)


def shard_(model: nn.Module, **options: Any) -> nn.Module:
    """Shard each layer, and the rest, as FSDP2 is used."""
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    for module in model:  # type: ignore[attr-defined]
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def rewritten(optimizer: Any, model: nn.Module, before: list[nn.Parameter]) -> None:
    """Do what Accelerate does: put the new Parameters into the groups, in the old order."""
    table = dict(zip(map(id, before), model.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [table[id(p)] for p in group["params"]]


def build(method: Method, first: str, options: dict[str, Any], quantized: dict[str, Any]) -> tuple[Any, nn.Module]:
    model = method.model(MLP, **(quantized if method.quantizes else {}))
    if first == "shard":
        shard_(model)
        return method(model, **options), model
    before = list(model.parameters())
    optimizer = method(model, **options)
    shard_(model)
    rewritten(optimizer, model, before)
    return optimizer, model


def gathered(optimizer: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    found = {f"latent.{slot.path}": whole(slot.latent.detach()) for slot in optimizer.latents_of.slots}
    found |= {f"model.{name}": whole(p.detach()) for name, p in model.named_parameters()}
    return found | {f"scale.{name}": whole(p) for name, p in scales_of(model).items()}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def equals_one_process(
    rank: int, method: Method, first: str, options: dict[str, Any], quantized: dict[str, Any], steps: int = 4
) -> None:
    ours, model = build(method, first, options, quantized)
    alone = method.model(MLP, **(quantized if method.quantizes else {}))
    theirs = method(alone, ddp=False, **options)
    for i in range(steps):
        ours.step(closure_of(ours, model, MLP, part(MLP.batch(i), rank)))
        theirs.step(closure_of(theirs, alone, MLP, MLP.batch(i)))
        if i == 1:  # an evaluation leaves gathered Parameters of the root behind
            with torch.no_grad():
                model.eval()(MLP.batch(0)["x"])
                model.train()
        if ours.perturbation is not None and ours.perturbation.norm is not None:
            torch.testing.assert_close(ours.perturbation.norm, theirs.perturbation.norm, rtol=1e-4, atol=0)
    close(gathered(ours, model), gathered(theirs, alone))
    for slot in ours.latents_of.slots:
        assert is_sharded(slot.latent)
        assert slot.latent.placements == slot.parameter.placements
        q = slot.quantizer
        full = copy.deepcopy(
            method.model(MLP, **quantized).get_submodule(slot.path.removesuffix(".weight"))
        ).weight_quantizer
        with torch.no_grad():
            for name, p in full.named_parameters():
                p.copy_(whole(getattr(q, name).detach()))
            if type(q).__name__ not in {"Stochastic", "DiffQ"}:
                assert torch.equal(whole(slot.parameter.detach()), full(whole(slot.latent.detach())))


SGD_OPTIONS = {"base": SGD, "lr": 0.05}
ADAM = {"base": AdamW, "lr": 1e-3}


@pytest.mark.parametrize("first", ["shard", "optimizer"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_shards_equal_one_process(method: Method, first: str, two: Processes) -> None:
    two(equals_one_process, method, first, SGD_OPTIONS, {})


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_scales_with_rows_of_their_own_are_sharded_like_their_weight(granularity: str, two: Processes) -> None:
    two(equals_one_process, SQUAT, "shard", SGD_OPTIONS, {"granularity": granularity})


@pytest.mark.parametrize("weights", ["fixed_step", "identity", "stochastic", "diffq"])
def test_quantizers_that_see_the_whole_weight_get_it(weights: str, two: Processes) -> None:
    two(equals_one_process, SAQ, "shard", SGD_OPTIONS, {"weights": weights})


@pytest.mark.parametrize(
    "options",
    [
        *({"direction": name} for name in ("asam", "grid", "friendly", "momentum", "previous", "random")),
        {"case": 1},
        {"case": 2, "rho": 1.0},
        {"perturb": "all", "normalize_weights": True},
        {"every": 2, "reuse": "perturbation", "start": 1},
        {"max_grad_norm": 0.05},
        {"ste": "identity", "scale_lr": (0.01, 0.02)},
    ],
    ids=lambda options: "-".join(map(str, options.items())),
)
def test_every_option_is_that_of_one_process(options: dict[str, Any], two: Processes) -> None:
    two(equals_one_process, SAQ, "shard", {**SGD_OPTIONS, "momentum": 0.5, **options}, {})


def test_adams_moments_are_sharded_too(two: Processes) -> None:
    two(equals_one_process, SQUAT, "optimizer", ADAM, {}, 3)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_four_processes_equal_one(method: Method, four: Processes) -> None:
    """The head has 4 rows, a row a process; the smallest scale has one entry, on one process."""
    four(equals_one_process, method, "shard", SGD_OPTIONS, {})
