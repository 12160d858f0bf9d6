"""torch.compile(model): whole graphs, compiled once; the passes write weights in place and change no guard."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import qsam
from tests.methods import QAT, SAQ, SQUAT, assert_on_grid, each_alternating, each_kind, everything, train
from tests.models import CONV, MLP


@pytest.fixture(autouse=True)
def no_graphs_of_the_last_test():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@each_alternating
@pytest.mark.parametrize("task", [MLP, CONV], ids=str)
@pytest.mark.long
def test_squat_s_passes_share_one_whole_graph(method, task):
    """fullgraph=True refuses a break; the counter has one frame after six steps of up to three passes."""
    counter = CompileCounterWithBackend("aot_eager")
    model, eager = method.model(task), method.model(task)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer, expected = method(compiled), method(eager)
    torch.manual_seed(0)
    losses = train(optimizer, compiled, task, 6)
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_on_grid(optimizer)
    torch.manual_seed(0)
    assert train(expected, eager, task, 6) == pytest.approx(losses, rel=1e-5)  # other kernels, other sums


@pytest.mark.parametrize("method", [QAT, SAQ], ids=str)
def test_no_method_recompiles_from_step_to_step(method):
    counter = CompileCounterWithBackend("eager")
    model = method.model(CONV)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = method(compiled)
    train(optimizer, compiled, CONV, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(optimizer, compiled, CONV, 3, start=1)
        optimizer.zero_grad()
        with optimizer.latents():
            pass
        optimizer.sync_latents()
        train(optimizer, compiled, CONV, 1, start=4)
    assert counter.frame_count == 1


def test_quantizing_a_compiled_model_drops_its_old_graph():
    """A model that has run compiled before: the inputs' quantizers are in the new graph. Calibrate before a full graph."""
    method = SQUAT
    model, eager = MLP.build(), MLP.build()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    MLP.loss(compiled, MLP.batch(0)).backward()
    model.zero_grad()
    for one in (model, eager):
        qsam.quantize_(one)
        qsam.calibrate(one, [MLP.batch(0)["x"]])
    optimizer, expected = method.cls(compiled, torch.optim.AdamW), method.cls(eager, torch.optim.AdamW)
    train(optimizer, compiled, MLP, 3)
    train(expected, eager, MLP, 3)
    ours, theirs = everything(optimizer, model), everything(expected, eager)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k].float(), theirs[k].float(), rtol=1e-3, atol=1e-4) for k in ours)


@pytest.mark.long
@each_kind
def test_inductor_takes_the_steps_of_eager(method):
    model, eager = method.model(MLP), method.model(MLP)
    compiled = torch.compile(model, fullgraph=True)
    optimizer, expected = method(compiled, lr=1e-4), method(eager, lr=1e-4)
    losses = train(optimizer, compiled, MLP, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train(optimizer, compiled, MLP, 3, start=1)
    assert losses == pytest.approx(train(expected, eager, MLP, 4), rel=1e-3)
    if method.quantizes:
        assert_on_grid(optimizer)
