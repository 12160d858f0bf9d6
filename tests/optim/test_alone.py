"""The optimizer alone on a model that nobody prepared: ``qsam.SQuAT(model, AdamW, rho=0.1)``, and under torch.compile."""

import math

import pytest
import torch
from torch.optim import AdamW

import qsam
from tests.models import BERT, CONV, GPT2, MLP, RESNET
from tests.optim.methods import METHODS, QUANTIZING, assert_on_grid, assert_same, everything, train

LINEARS_OF_BERT = [
    f"bert.encoder.layer.{i}.{name}.weight"
    for i in range(2)
    for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
]  # fmt: skip
COVERED = {
    "mlp": {"0.weight": 4, "2.weight": 4, "4.weight": 8},
    "bert": {**dict.fromkeys(LINEARS_OF_BERT, 4), "bert.pooler.dense.weight": 4, "classifier.weight": 8},
    "gpt2": {
        f"transformer.h.{i}.{name}.weight": 4
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
}
STEPS = {"mlp": 40, "bert": 40, "gpt2": 30, "resnet18": 3}


def mean_loss(task, model, optimizer):
    """Return the loss over a few batches, at the weights that will be deployed, in eval mode."""
    model.eval()
    with torch.no_grad():
        loss = sum(float(task.loss(model, task.batch(i))) for i in range(4)) / 4
    model.train()
    return loss


def bits_of_resnet(model):
    convolutions = {f"{n}.weight": 4 for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    return {**convolutions, "conv1.weight": 8, "fc.weight": 8}


@pytest.mark.parametrize(
    "task", [MLP, BERT, *[pytest.param(task, marks=pytest.mark.long) for task in (GPT2, RESNET)]], ids=str
)
def test_squat_alone_trains_a_model(task):
    """The expected layers at the expected bits; on the grid throughout; the loss of the deployed weights falls."""
    model = task.build()
    torch.manual_seed(0)
    optimizer = qsam.SQuAT(model, AdamW, rho=0.1, lr=1e-3)
    expected = COVERED.get(task.name) or bits_of_resnet(model)
    assert {row.name: row.quantizer.bits for row in optimizer.coverage.quantized} == expected
    train(optimizer, model, task, 1)
    before = mean_loss(task, model, optimizer)
    scales = [slot.quantizer.scale.clone() for slot in optimizer._latents.slots]
    train(optimizer, model, task, STEPS[task.name], start=1)
    assert_on_grid(optimizer)
    assert mean_loss(task, model, optimizer) < before
    assert all(
        not torch.equal(slot.quantizer.scale, s) for slot, s in zip(optimizer._latents.slots, scales, strict=True)
    )
    assert all(row.quantizer.calibrated for row in optimizer.coverage.inputs if row.quantizer is not None)
    for slot in optimizer._latents.slots:
        q = slot.quantizer
        assert torch.equal(q.dequantize(q.codes(slot.latent.detach())), slot.parameter)


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
def test_every_method_runs_with_its_defaults_alone(method):
    model = CONV.build()
    optimizer = method.cls(model, AdamW, **({} if method.schedule is None else {"schedule": method.schedule}))
    losses = train(optimizer, model, CONV, 2)
    assert all(math.isfinite(loss) for loss in losses)
    assert_on_grid(optimizer)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("task", [MLP, CONV], ids=str)
def test_a_compiled_model_takes_the_same_steps_without_recompiling(method, task):
    """One whole graph for training, compiled once: the passes write weights and buffers, and change no guard."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, model = method.model(task), method.model(task)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    optimizer, expected = method(compiled), method(eager)
    torch.manual_seed(0)
    losses = train(optimizer, compiled, task, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train(optimizer, compiled, task, 4, start=1)
    torch.manual_seed(0)
    assert losses == train(expected, eager, task, 5)
    assert_same(everything(optimizer, model), everything(expected, eager))
