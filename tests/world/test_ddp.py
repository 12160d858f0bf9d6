"""DistributedDataParallel on real processes: copies of one model stay one model, and nobody waits for ever."""

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import qsam
from tests.frameworks import steps_by_hand
from tests.methods import (
    BY_NAME,
    FUSED,
    METHODS,
    QAT,
    SAM,
    SAQ,
    SQUAT,
    Method,
    assert_on_grid,
    assert_same,
    closure_of,
    everything,
    latents,
    scales_of,
    train,
)
from tests.models import CONV, MLP, PAPERS, Batch, Task
from tests.processes import Processes, running


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    yield from running(2)


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    yield from running(4)


def part(batch: Batch, rank: int) -> Batch:
    """Return a rank's share of the rows."""
    return {key: value.chunk(distributed.get_world_size())[rank] for key, value in batch.items()}


def step_on_part(optimizer: Any, model: nn.Module, task: Task, number: int, rank: int) -> Tensor:
    loss: Tensor = optimizer.step(closure_of(optimizer, model, task, part(task.batch(number), rank)))
    return loss


def parallel(method: Method, task: Task, wrap: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any, Any]:
    model = method.model(task)
    ddp = DistributedDataParallel(model, **(wrap or {}))
    return method(ddp, **options), model, ddp


def assert_equal_everywhere(tensors: dict[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        mine = tensor.detach().contiguous()
        theirs = [torch.zeros_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(theirs, mine)
        assert all(torch.equal(mine, other) for other in theirs), name


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=tolerance * 10, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def equals_one_process(rank: int, method: Method, task: Task, wrap: dict[str, Any], options: dict[str, Any]) -> None:
    ours, model, ddp = parallel(method, task, wrap, base=SGD, lr=0.05, **options)
    alone = method.model(task)
    theirs = method(alone, base=SGD, lr=0.05, ddp=False, **options)
    for i in range(4):
        step_on_part(ours, ddp, task, i, rank)
        theirs.step(closure_of(theirs, alone, task, task.batch(i)))
        if ours.perturbation is not None:
            torch.testing.assert_close(ours.perturbation.norm, theirs.perturbation.norm, rtol=1e-5, atol=0)
    close(latents(ours, model), latents(theirs, alone))
    close(scales_of(model), scales_of(alone))
    assert_equal_everywhere(everything(ours, model))


def ranks_stay_equal(rank: int, method: Method, task: Task, wrap: dict[str, Any], options: dict[str, Any]) -> None:
    ours, model, ddp = parallel(method, task, wrap, perturbation_scope="rank", **options)
    buffers = dict(model.named_buffers())
    for i in range(3):
        step_on_part(ours, ddp, task, i, rank)
        kept = everything(ours, model)
        assert_equal_everywhere({k: v for k, v in kept.items() if k.split(".", 1)[1] not in buffers})
    if method.quantizes:
        assert_on_grid(ours)


def own_perturbations(
    model: nn.Module, task: Task, rank: int, count: int, rho: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Return, computed without DDP and without the optimizer: each rank's e, and the mean of the second gradients."""
    weights = [row.module.weight for row in qsam.coverage_of(model).quantized]
    start = [w.detach().clone() for w in weights]
    own: list[Tensor] = []
    total = [torch.zeros_like(w) for w in weights]
    for other in range(count):
        batch = part(task.batch(0), other)
        g = torch.autograd.grad(task.loss(model, batch), weights)
        norm = torch.cat([x.flatten() for x in g]).norm()
        e = [rho * x / norm for x in g]
        with torch.no_grad():
            for w, s, x in zip(weights, start, e, strict=True):
                w.copy_(s + x)
        h = torch.autograd.grad(task.loss(model, batch), weights)
        with torch.no_grad():
            for w, s in zip(weights, start, strict=True):
                w.copy_(s)
        total = [t + x / count for t, x in zip(total, h, strict=True)]
        own = e if other == rank else own
    return own, total


def each_rank_has_its_own_e(rank: int, by_hand: bool) -> None:
    ours, model, ddp = parallel(
        SAQ, MLP, perturbation_scope="rank", base=SGD, lr=1.0, rho=0.05, scale_lr=0.0, ste="identity"
    )
    reference = copy.deepcopy(model)
    e, mean = own_perturbations(reference, MLP, rank, distributed.get_world_size(), 0.05)
    before = latents(ours, model)
    resting = {slot.path: slot.parameter.detach().clone() for slot in ours._latents.slots}
    seen: list[Tensor] = []
    batch = part(MLP.batch(0), rank)

    def look(*_: Any) -> None:
        if ours._block == "perturbed":
            seen[:] = [slot.parameter.detach() - resting[slot.path] for slot in ours._latents.slots]

    model.register_forward_pre_hook(look)
    if by_hand:
        with ours.first_pass():
            MLP.loss(ddp, batch).backward()
        with ours.perturbed():
            MLP.loss(ddp, batch).backward()
        ours.step()
    else:
        ours.step(closure_of(ours, ddp, MLP, batch))
    for ours_e, theirs_e in zip(seen, e, strict=True):
        torch.testing.assert_close(ours_e, theirs_e, rtol=1e-4, atol=1e-7)
    after = latents(ours, model)
    for slot, gradient in zip(ours._latents.slots, mean, strict=True):
        torch.testing.assert_close(before[slot.path] - after[slot.path], gradient, rtol=1e-4, atol=1e-6)
    first = seen[0].contiguous()
    others = [torch.zeros_like(first) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, first)
    assert not torch.equal(others[0], others[1]), "the ranks must differ inside the perturbed pass"


def one_seed_a_rank(rank: int, method: Method, scope: str) -> None:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    if method.quantizes:
        qsam.quantize_(model, rules=[("*", {})])
        with torch.no_grad():
            for p in scales_of(model).values():
                p.mul_(1 + rank)
    if scope == "global":
        ours = method(model)  # before DDP, as Accelerate, Lightning and the Trainer do
        ddp = DistributedDataParallel(model)
    else:
        ddp = DistributedDataParallel(model)
        ours = method(ddp, perturbation_scope="rank")
    for _i in range(2):
        batch = {"x": torch.randn(8, 8) - 3 * rank, "labels": torch.randint(4, (8,))}  # signs differ: all agree
        ours.step(closure_of(ours, ddp, MLP, batch))
        assert_equal_everywhere(everything(ours, model))


def a_foreign_write_stops_all(rank: int, method: Method) -> None:
    ours, _model, ddp = parallel(method, MLP)
    step_on_part(ours, ddp, MLP, 0, rank)
    if rank == 1:
        with torch.no_grad():
            ours._latents.slots[1].parameter.add_(1)
    where = "'2.weight'" if rank == 1 else "of another rank"
    with pytest.raises(RuntimeError, match=f"the quantized weight {where} was written by other code"):
        step_on_part(ours, ddp, MLP, 1, rank)
    ours.sync_latents()


def a_checkpoint_on_one_rank_only(rank: int) -> None:
    ours, model, ddp = parallel(SQUAT, MLP)
    step_on_part(ours, ddp, MLP, 0, rank)
    saved_model, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(ours.state_dict())
    again, model, ddp = parallel(SQUAT, MLP)
    if rank == 0:
        model.load_state_dict(saved_model)
        again.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=rf"different steps \({1 - rank} here\): load .* on every rank"):
        step_on_part(again, ddp, MLP, 1, rank)


def without_ddp(rank: int) -> None:
    model = QAT.model(MLP)
    ours = QAT(model)
    with pytest.raises(RuntimeError, match=r"the ranks hold different weights after a step: wrap .* `ddp=False`"):
        step_on_part(ours, model, MLP, 0, rank)
    model = QAT.model(MLP)
    alone = QAT(model, ddp=False)
    for i in range(1 + rank):  # no process waits for another
        step_on_part(alone, model, MLP, i, rank)


def quantizing_inside(rank: int) -> None:
    ddp = DistributedDataParallel(MLP.build())
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel already, .* call quantize_ before"):
        qsam.quantize_(ddp)
    with pytest.raises(RuntimeError, match="call quantize_ before"):
        qsam.QAT(ddp, AdamW)
    with pytest.raises(RuntimeError, match="call bit_allocation in one process before that"):
        qsam.bit_allocation(ddp, [MLP.batch(0)], 4, loss_fn=MLP.loss)


def scaler_between_the_passes(rank: int) -> None:
    ours, _model, ddp = parallel(FUSED, MLP, perturbation_scope="rank")
    scaler = torch.amp.GradScaler("cpu")
    with ours.first_pass():
        scaler.scale(MLP.loss(ddp, part(MLP.batch(0), rank))).backward()
    with pytest.raises(RuntimeError, match="each rank's GradScaler would check its own first pass"):
        scaler.step(ours.scales)


def scales_of_unsynchronized_passes(rank: int) -> None:
    """A fused step of the scales comes from first passes that DDP has not averaged: it takes their mean."""
    ends = []
    for scope in ("rank", "global"):
        ours, model, ddp = parallel(FUSED, MLP, perturbation_scope=scope, base=SGD, lr=0.05, scale_lr=0.1)
        before = {name: s.clone() for name, s in scales_of(model).items()}
        step_on_part(ours, ddp, MLP, 0, rank)
        ends.append(scales_of(model))
        assert not any(torch.equal(s, before[name]) for name, s in ends[-1].items())
    close(*ends)


def statistics_of_all_batches(rank: int) -> None:
    model, alone = CONV.quantized(), CONV.quantized()
    images = [CONV.batch(i)["x"] for i in range(3)]
    qsam.reestimate_batchnorm(DistributedDataParallel(model), images[:2] if rank == 0 else images[2:])
    qsam.reestimate_batchnorm(alone, images)
    assert_equal_everywhere(dict(model.named_buffers()))
    close(dict(model.named_buffers()), dict(alone.named_buffers()))
    with pytest.raises(ValueError, match="BatchNorm '1' over these batches are not finite"):  # else one waits for ever
        qsam.reestimate_batchnorm(DistributedDataParallel(model), [images[0] * (1.0 if rank else torch.nan)])
    qsam.reestimate_batchnorm(DistributedDataParallel(model), images if rank else [])
    close(dict(model.named_buffers()), dict(alone.named_buffers()))


def saving_on_rank_zero(rank: int) -> None:
    """What people do on one rank only must not wait for the others."""
    ours, model, ddp = parallel(SQUAT, MLP)
    step_on_part(ours, ddp, MLP, 0, rank)
    if rank == 0:
        ours.state_dict()
        ours.diagnostics()
        with ours.latents():
            model.state_dict()
    step_on_part(ours, ddp, MLP, 1, rank)
    assert_equal_everywhere(everything(ours, model))


@pytest.mark.parametrize("method", [QAT, SAM, SQUAT, FUSED], ids=str)
def test_global_scope_equals_one_process_on_the_whole_batch(method: Method, two: Processes) -> None:
    two(equals_one_process, method, MLP, {}, {})


@pytest.mark.parametrize(
    "wrap", [{"gradient_as_bucket_view": True}, {"static_graph": True}], ids=lambda w: next(iter(w))
)
@pytest.mark.parametrize("method", [FUSED], ids=str)
def test_ddps_own_settings_change_nothing(method: Method, wrap: dict[str, Any], two: Processes) -> None:
    two(equals_one_process, method, MLP, wrap, {})


def papers_equal_one_process(rank: int, rules: Any) -> None:
    model, alone = MLP.quantized(rules=rules), MLP.quantized(rules=rules)
    ddp = DistributedDataParallel(model)
    ours, theirs = SAQ(ddp, base=SGD, lr=0.05), SAQ(alone, base=SGD, lr=0.05, ddp=False)
    for i in range(3):
        step_on_part(ours, ddp, MLP, i, rank)
        theirs.step(closure_of(theirs, alone, MLP, MLP.batch(i)))
    assert_equal_everywhere(everything(ours, model))
    close(everything(ours, model), everything(theirs, alone))  # the buffers too: ranges that follow the data


@pytest.mark.parametrize("rules", PAPERS.values(), ids=PAPERS)
def test_quantizers_of_other_papers_equal_one_process(rules: Any, two: Processes) -> None:
    two(papers_equal_one_process, rules)


@pytest.mark.parametrize("method", [SAM, FUSED], ids=str)
def test_rank_scope_keeps_the_ranks_equal(method: Method, two: Processes) -> None:
    two(ranks_stay_equal, method, MLP, {}, {})


def static_graph(rank: int) -> None:
    with pytest.raises(ValueError, match="does not do with static_graph=True: build it without"):
        parallel(SAQ, MLP, {"static_graph": True}, perturbation_scope="rank")


def test_rank_scope_refuses_a_static_graph(two: Processes) -> None:
    two(static_graph)


def test_rank_scope_keeps_ranks_with_batchnorm_and_dropout_equal(two: Processes) -> None:
    two(ranks_stay_equal, SQUAT, CONV, {}, {})


@pytest.mark.parametrize("by_hand", [False, True])
def test_rank_scope_is_each_ranks_own_e_and_the_mean_of_the_second_gradients(by_hand: bool, two: Processes) -> None:
    two(each_rank_has_its_own_e, by_hand)


@pytest.mark.parametrize(("method", "scope"), [(QAT, "global"), (SQUAT, "global"), (FUSED, "rank")], ids=str)
def test_ranks_with_seeds_and_data_of_their_own_start_from_rank_zero(
    method: Method, scope: str, two: Processes
) -> None:
    two(one_seed_a_rank, method, scope)


@pytest.mark.parametrize("method", [QAT, SQUAT], ids=str)
def test_a_write_on_one_rank_stops_all(method: Method, two: Processes) -> None:
    two(a_foreign_write_stops_all, method)


def test_a_checkpoint_that_one_rank_alone_has_loaded_stops_all(two: Processes) -> None:
    two(a_checkpoint_on_one_rank_only)


def test_processes_that_average_nothing_are_told_so_and_may_be_strangers(two: Processes) -> None:
    two(without_ddp)


def test_quantize_after_ddp_is_refused(two: Processes) -> None:
    two(quantizing_inside)


def test_a_grad_scaler_between_unsynchronized_passes_is_refused(two: Processes) -> None:
    two(scaler_between_the_passes)


def test_batchnorm_gets_the_average_over_the_batches_of_all_ranks(two: Processes) -> None:
    two(statistics_of_all_batches)


def test_one_rank_may_save_and_look_alone(two: Processes) -> None:
    two(saving_on_rank_zero)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_four_ranks_equal_one_process(method: Method, four: Processes) -> None:
    four(equals_one_process, method, MLP, {}, {})
    if method.perturbs:
        four(ranks_stay_equal, method, MLP, {}, {})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"perturbation_scope": "rank"}, ValueError, "must keep DistributedDataParallel from averaging .* as `ddp`"),
        ({"ddp": True}, TypeError, "`ddp` must be the DistributedDataParallel model, None, or False .* got bool"),
        ({"ddp": nn.Linear(2, 2)}, TypeError, "got Linear"),
        (
            {"perturbation_scope": "rank", "reuse": "perturbation"},
            ValueError,
            "reuse='perturbation' remembers first passes",
        ),
        (
            {"perturbation_scope": "rank", "direction": "friendly"},
            ValueError,
            "direction='friendly' remembers first passes",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        qsam.SAQ(MLP.quantized(), AdamW, **options)


def a_wrapper_of_another_model(rank: int) -> None:
    ddp = DistributedDataParallel(MLP.quantized())
    with pytest.raises(ValueError, match="`ddp` must be around the model that the optimizer is given"):
        qsam.SAQ(MLP.quantized(), AdamW, ddp=ddp)


def test_the_scales_of_a_fused_step_take_the_mean_of_the_ranks_first_passes(two: Processes) -> None:
    two(scales_of_unsynchronized_passes)


def test_ddp_round_another_model_is_refused(two: Processes) -> None:
    two(a_wrapper_of_another_model)


def test_without_a_process_group_no_collective_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "broadcast", "all_gather", "barrier"):
        monkeypatch.setattr(distributed, name, partial(pytest.fail, f"{name} was called"))
    model = SQUAT.model(MLP)
    optimizer = SQUAT(model)
    optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    assert optimizer.steps == 1


def ends_alike(rank: int, method: Method, runs: list[tuple[bool, dict[str, Any]]], options: dict[str, Any]) -> None:
    """Each run ends with equal ranks, and with the bits of the first run; a run is by hand or not, and DDP's options."""
    task = dataclasses.replace(MLP, batch=lambda i: part(MLP.batch(i), rank))
    ends = []
    for by_hand, wrap in runs:
        ours, model, ddp = parallel(method, MLP, wrap, base=SGD, lr=0.1, momentum=0.9, rho=0.3, **options)
        if by_hand:
            steps_by_hand(ours, ddp, task, [[0], [1], [2], [3]])
        else:
            train(ours, ddp, task, 4)
        ends.append(latents(ours, model) | scales_of(model))
        assert_equal_everywhere(ends[-1])
        assert_same(ends[-1], ends[0])


NEXT, JOINT = BY_NAME["squat-next_batch"], BY_NAME["joint"]
SCOPED = [
    (SAQ, {"every": 3, "start": 1}),
    (SAQ, {"direction": "momentum", "every": 2}),
    (SQUAT, {"every": 2}),
    (NEXT, {"start": 2}),
    (FUSED, {"every": 2}),
    (JOINT, {"every": 2, "direction": "asam"}),
]


@pytest.mark.parametrize(("method", "options"), SCOPED, ids=str)
def test_steps_that_are_not_perturbed_keep_the_ranks_equal_by_hand_as_with_the_closure(
    method: Method, options: dict[str, Any], two: Processes
) -> None:
    """With scope "rank" a first pass is averaged unless a perturbed pass follows it."""
    two(ends_alike, method, [(False, {}), (True, {})], {"perturbation_scope": "rank", **options})


VIEWS = [
    (SAQ, {"direction": "friendly"}),
    (SAQ, {"direction": "previous"}),
    (SQUAT, {"every": 3, "reuse": "perturbation"}),
    (JOINT, {"every": 2, "reuse": "perturbation", "direction": "asam", "start": 1}),
    (FUSED, {}),
]


@pytest.mark.parametrize(("method", "options"), VIEWS, ids=str)
def test_gradients_that_are_views_of_buckets_change_no_bit(
    method: Method, options: dict[str, Any], two: Processes
) -> None:
    """DDP writes the next pass's gradients where the last one's were: what is kept of them must be a copy."""
    runs = [(by_hand, {"gradient_as_bucket_view": view}) for by_hand in (False, True) for view in (False, True)]
    two(ends_alike, method, runs, options)
