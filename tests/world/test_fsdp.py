"""FSDP2 on real processes: latents and scales live in parts, and training equals one process."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import SGD, AdamW

import qsam
from qsam.distributed import is_sharded, local, whole
from tests.methods import METHODS, QAT, SAM, SAQ, SQUAT, Method, closure_of, long_but, scales_of, train
from tests.models import MLP, PAPERS
from tests.processes import Processes, running
from tests.world.test_ddp import assert_equal_everywhere, part


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
    found = {f"latent.{slot.path}": whole(slot.latent.detach()) for slot in optimizer._latents.slots}
    found |= {f"model.{name}": whole(p.detach()) for name, p in model.named_parameters()}
    return found | {f"scale.{name}": whole(p) for name, p in scales_of(model).items()}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


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
    for slot in ours._latents.slots:
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


@pytest.mark.parametrize(("method", "first"), [(QAT, "optimizer"), (SAM, "shard"), (SQUAT, "shard")], ids=str)
def test_shards_equal_one_process(method: Method, first: str, two: Processes) -> None:
    two(equals_one_process, method, first, SGD_OPTIONS, {})


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_scales_with_rows_of_their_own_are_sharded_like_their_weight(granularity: str, two: Processes) -> None:
    two(equals_one_process, SQUAT, "shard", SGD_OPTIONS, {"granularity": granularity})


@pytest.mark.parametrize("weights", long_but(["stochastic"], ["fixed_step", "identity", "stochastic", "diffq"]))
def test_quantizers_that_see_the_whole_weight_get_it(weights: str, two: Processes) -> None:
    two(equals_one_process, SAQ, "shard", SGD_OPTIONS, {"weights": weights})


def papers_equal_one_process(rank: int, rules: Any) -> None:
    ours, model = build(SAQ, "shard", SGD_OPTIONS, {"rules": rules})
    alone = SAQ.model(MLP, rules=rules)
    theirs = SAQ(alone, ddp=False, **SGD_OPTIONS)
    for i in range(3):
        step(ours, model, i, rank)
        theirs.step(closure_of(theirs, alone, MLP, MLP.batch(i)))
    found = gathered(ours, model) | {name: whole(b) for name, b in model.named_buffers()}
    assert_equal_everywhere(found)
    close(found, gathered(theirs, alone) | dict(alone.named_buffers()))


@pytest.mark.parametrize("rules", PAPERS.values(), ids=PAPERS)
def test_quantizers_of_other_papers_equal_one_process(rules: Any, two: Processes) -> None:
    two(papers_equal_one_process, rules)


OPTIONS: list[dict[str, Any]] = [
    *({"direction": name} for name in ("asam", "grid", "friendly", "momentum", "previous", "random")),
    {"case": 1},
    {"case": 2, "rho": 1.0},
    {"perturb": "all", "normalize_weights": True},
    {"every": 2, "reuse": "perturbation", "start": 1},
    {"max_grad_norm": 0.05},
    {"ste": "identity", "scale_lr": (0.01, 0.02)},
]


@pytest.mark.parametrize(
    "options",
    long_but([{"direction": "grid"}, {"case": 2, "rho": 1.0}], OPTIONS),
    ids=lambda options: "-".join(map(str, options.items())),
)
def test_every_option_is_that_of_one_process(options: dict[str, Any], two: Processes) -> None:
    two(equals_one_process, SAQ, "shard", {**SGD_OPTIONS, "momentum": 0.5, **options}, {})


def two_by_two(rank: int) -> None:
    """Two copies, each in two parts."""
    mesh = distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part"))
    model, alone = SQUAT.model(MLP), SQUAT.model(MLP)
    fully_shard(model, mesh=mesh)
    ours, theirs = SQUAT(model, **SGD_OPTIONS), SQUAT(alone, ddp=False, **SGD_OPTIONS)
    for i in range(3):
        step(ours, model, i, rank)
        theirs.step(closure_of(theirs, alone, MLP, MLP.batch(i)))
    close(gathered(ours, model), gathered(theirs, alone))


@pytest.mark.long
def test_copies_of_shards_equal_one_process(four: Processes) -> None:
    four(two_by_two)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_four_processes_equal_one(method: Method, four: Processes) -> None:
    """The head has 4 rows, a row a process; the smallest scale has one entry, on one process."""
    four(equals_one_process, method, "shard", SGD_OPTIONS, {})


def step(optimizer: Any, model: nn.Module, number: int, rank: int) -> None:
    optimizer.step(closure_of(optimizer, model, MLP, part(MLP.batch(number), rank)))


def groups_of_old(rank: int, method: Method) -> None:
    model = method.model(MLP)
    optimizer = method(model)
    shard_(model)
    with pytest.raises(RuntimeError, match=r"6 of the old ones are in the optimizer's groups.*fully_shard before"):
        step(optimizer, model, 0, rank)


@pytest.mark.parametrize("name", ["qat", "saq"])
def test_groups_that_hold_the_old_parameters_are_refused(name: str, two: Processes) -> None:
    two(groups_of_old, next(m for m in METHODS if m.name == name))


def foreign_writes(rank: int, method: Method) -> None:
    optimizer, model = build(method, "shard", {}, {})
    step(optimizer, model, 0, rank)
    if rank == 0:
        with torch.no_grad():
            local(optimizer._latents.slots[0].parameter).add_(1)
    with pytest.raises(RuntimeError, match="written by other code since the last step"):
        step(optimizer, model, 1, rank)
    optimizer.sync_latents()
    step(optimizer, model, 1, rank)


@pytest.mark.parametrize("method", [QAT, SAQ], ids=str)
def test_a_write_into_one_shard_stops_all(method: Method, two: Processes) -> None:
    two(foreign_writes, method)


def exceptions(rank: int) -> None:
    ours, model = build(SAQ, "shard", SGD_OPTIONS, {})
    step(ours, model, 0, rank)
    before = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    with ours.first_pass():
        MLP.loss(model, part(MLP.batch(1), rank)).backward()
    with pytest.raises(ZeroDivisionError), ours.perturbed():
        MLP.loss(model, part(MLP.batch(1), rank))  # a forward without its backward leaves gathered Parameters
        raise ZeroDivisionError
    for slot in ours._latents.slots:
        assert is_sharded(slot.parameter)
    for name, p in model.named_parameters():
        assert torch.equal(before[name], whole(p.detach())), name
    step(ours, model, 1, rank)


def test_after_an_exception_in_a_pass_the_shards_hold_the_quantized_weights(two: Processes) -> None:
    two(exceptions)


def nonfinite(rank: int) -> None:
    ours, model = build(SAQ, "shard", SGD_OPTIONS, {})
    with ours.first_pass():
        MLP.loss(model, part(MLP.batch(1), rank)).backward()
    if rank == 0:
        local(ours._latents.slots[0].parameter.grad).view(-1)[0] = float("nan")
    with ours.perturbed():
        for slot in ours._latents.slots:
            assert torch.equal(local(slot.parameter), local(slot.quantized())), "e must be 0 on all"
        MLP.loss(model, part(MLP.batch(1), rank)).backward()
    ours.step()


def test_a_nan_in_one_shard_gives_no_perturbation_on_any(two: Processes) -> None:
    two(nonfinite)


def sixteen_bit_scales(rank: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"scale of the input of '0' would be torch.bfloat16 .* fully_shard\(row.quantizer\)"
    ):
        QAT(shard_(QAT.model(MLP), mp_policy=policy))
    model = QAT.model(MLP)
    seen = []
    for row in qsam.coverage_of(model).inputs:
        if row.quantizer is not None:
            fully_shard(row.quantizer, mesh=distributed.init_device_mesh("cpu", (2,)))
            row.quantizer.register_forward_pre_hook(lambda q, _: seen.append(q.scale.dtype))
    shard_(model, mp_policy=policy)
    optimizer = QAT(model)
    step(optimizer, model, 0, rank)
    assert set(seen) == {torch.float32}
    assert {slot.latent.dtype for slot in optimizer._latents.slots} == {torch.float32}


def test_a_param_dtype_that_rounds_scales_is_refused_and_its_cure_works(two: Processes) -> None:
    two(sixteen_bit_scales)


def other_ways_to_split(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard, distribute_tensor

    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="FSDP1, which flattens weights: use FSDP2"):
        QAT(FullyShardedDataParallel(QAT.model(MLP), device_id=cpu, use_orig_params=True))
    with pytest.raises(ValueError, match="FSDP1, which flattens weights: use FSDP2"):
        qsam.SAM(FullyShardedDataParallel(MLP.build(), device_id=cpu), AdamW, lr=1e-3)
    model = QAT.model(MLP)
    mesh = distributed.init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"'0.weight' is placed as .*Shard\(0\) and Replicate\(\) only: use FSDP2"):
        QAT(model)


def test_fsdp1_and_columns_are_refused(two: Processes) -> None:
    two(other_ways_to_split)


def measures(rank: int) -> None:
    optimizer, model = build(SAQ, "shard", {}, {})
    with pytest.raises(RuntimeError, match="sharpness measures a whole model, and this one is sharded: gather"):
        qsam.sharpness(optimizer, closure_of(optimizer, model, MLP, MLP.batch(0)))
    with pytest.raises(RuntimeError, match="call bit_allocation in one process before that"):
        qsam.bit_allocation(shard_(MLP.build()), [MLP.batch(0)], 4, loss_fn=MLP.loss)
    with pytest.raises(RuntimeError, match="dequantize_ cannot take the scales out of a sharded model"):
        qsam.dequantize_(model, optimizer)
    step(optimizer, model, 0, rank)
    found = optimizer.diagnostics()
    step(optimizer, model, 1, rank)
    found = optimizer.diagnostics()
    assert abs(found["perturbation_norm"] - 0.1) < 1e-4
    everywhere: list[Any] = [None, None]
    distributed.all_gather_object(
        everywhere, {k: v for k, v in found.items() if k not in {"loss", "loss_perturbed", "rise"}}
    )
    assert everywhere[0] == everywhere[1]


def test_measures_of_a_whole_model_are_refused_and_diagnostics_are_of_the_whole(two: Processes) -> None:
    two(measures)


def rank_scope(rank: int) -> None:
    with pytest.raises(ValueError, match="perturbation_scope='rank' must keep DistributedDataParallel"):
        SAQ(shard_(SAQ.model(MLP)), perturbation_scope="rank")


def test_rank_scope_is_for_whole_copies_only(two: Processes) -> None:
    two(rank_scope)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.up)


def mean_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def experts_equal_one_process(rank: int, group_size: int | None) -> None:
    options = {"granularity": "per_group" if group_size else "per_channel", "group_size": group_size, "axis": (0, 1)}
    x = torch.linspace(-1, 1, 4 * 8).sin().reshape(4, 8)
    ends = []
    for shards in (True, False):
        model = Experts()
        qsam.quantize_(model, activations=None, rules=[("up", options)])
        if shards:
            fully_shard(model, mesh=distributed.init_device_mesh("cpu", (2,)))
        optimizer = qsam.SQuAT(model, SGD, lr=0.1, rho=0.05, scale_lr=1e-3, **({} if shards else {"ddp": False}))

        task = dataclasses.replace(MLP, batch=lambda _, x=x[rank::2] if shards else x: x, loss=mean_square)
        train(optimizer, model, task, 3)
        ends.append((whole(model.up.detach()), whole(model.up_quantizer.scale.detach())))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("group_size", [None, 4])
def test_experts_that_are_sharded_train_as_one_process_does(two: Processes, group_size: int | None) -> None:
    two(experts_equal_one_process, group_size)
