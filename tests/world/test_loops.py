"""What people put round a model and a loop: averages, hooks, checkpointing, dropped layers, modules used twice."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import qsam
from tests.methods import (
    SAM,
    SAQ,
    SQUAT,
    assert_on_grid,
    assert_same,
    built,
    each_kind,
    everything,
    latents,
    train,
)
from tests.models import BERT, GPT2, MLP, RESNET, Task, cross_entropy, seeded, vectors


def test_an_average_taken_inside_latents_is_the_average_of_the_latents():
    """AveragedModel copies the model it is given: build it and update it where the model holds w."""
    model, optimizer = built(SAQ, MLP, lr=1e-2)
    decay = 0.5
    with optimizer.latents():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    expected = latents(optimizer, model)
    for i in range(4):
        train(optimizer, model, MLP, 1, start=i)
        with optimizer.latents():
            average.update_parameters(model)
        if i == 0:  # torch's first update copies
            expected = latents(optimizer, model)
        else:
            expected = {n: torch.lerp(expected[n], now, 1 - decay) for n, now in latents(optimizer, model).items()}
        assert_on_grid(optimizer)
    found = dict(average.module.named_parameters())
    for name, value in expected.items():
        # Each update rounds once in either order of operations.
        assert torch.allclose(
            found[name], value, rtol=0, atol=8 * torch.finfo(torch.float32).eps * float(value.abs().max())
        )


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
def test_a_hook_on_a_gradient_acts_in_every_pass(method):
    """One that doubles dL/dp is a loss of twice the size."""
    ends = []
    for hooks in (True, False):
        model, optimizer = built(method, MLP, SGD, lr=0.1)
        if hooks:
            for p in optimizer._parameters():
                if p.requires_grad:
                    p.register_hook(lambda grad: grad * 2)
        for i in range(3):

            def closure(i=i, model=model, optimizer=optimizer, factor=1 if hooks else 2):
                optimizer.zero_grad()
                loss = MLP.loss(model, MLP.batch(i)) * factor
                loss.backward()
                return loss

            optimizer.step(closure)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


class Checkpointed(nn.Module):
    """An MLP with dropout whose middle is recomputed in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def middle(self, x):
        return torch.dropout(torch.relu(self.b(x)), 0.3, self.training)

    def forward(self, x):
        x = torch.relu(self.a(x))
        recomputed = self.training and self.reentrant is not None
        x = checkpoint(self.middle, x, use_reentrant=self.reentrant) if recomputed else self.middle(x)
        return self.head(x)


def checkpointed(reentrant):
    build = seeded(functools.partial(Checkpointed, reentrant))
    return Task("checkpointed", build, vectors, cross_entropy)


@pytest.mark.parametrize("method", [SAM, SQUAT], ids=str)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputed_activations_change_nothing(method, reentrant):
    """Both ways: the backward runs inside the block, at the weights of its forward."""
    ends = []
    for way in (reentrant, None):
        task = checkpointed(way)
        model, optimizer = built(method, task)
        torch.manual_seed(0)
        losses = train(optimizer, model, task, 3)
        ends.append(everything(optimizer, model) | {"losses": torch.tensor(losses)})
    assert_same(*ends)


class Twice(nn.Module):
    """One layer that is called twice, and one that is called never."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(torch.relu(self.a(x)))))))


class Unrolled(Twice):
    """The same without the module's second call: its weight is used by a plain function."""

    def forward(self, x):
        again = torch.nn.functional.linear(torch.relu(self.a(x)), self.a.weight, self.a.bias)
        return self.head(torch.relu(self.b(torch.relu(again))))


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
def test_a_module_that_is_called_twice_has_one_gradient_and_one_that_is_never_called_none(method):
    ends = []
    for cls in (Twice, Unrolled):
        task = Task("twice", seeded(cls), vectors, cross_entropy)
        model = cls().train()
        model.load_state_dict(seeded(Twice)().state_dict())
        if method.quantizes:
            qsam.quantize_(model, rules=[("unused", None), ("*", {})], activations=None)
        optimizer = method(model)
        unused = model.unused.weight.detach().clone()
        train(optimizer, model, task, 3)
        assert torch.equal(model.unused.weight, unused)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_under_a_scheduler(how):
    """A scheduler patches ``step`` of the instance, which must not come along."""
    model, optimizer = built(SAQ, MLP)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    train(optimizer, model, MLP, 2)
    scheduler.step()
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(optimizer, model, MLP, 2, start=2)
    train(other, twin, MLP, 2, start=2)
    assert_same(everything(other, twin), everything(optimizer, model))


@each_kind
def test_inside_latents_the_model_holds_w(method):
    model, optimizer = built(method, MLP)
    train(optimizer, model, MLP, 2)
    p = {name: t.clone() for name, t in model.state_dict().items()}
    with optimizer.latents():
        for slot in optimizer._latents.slots:
            assert torch.equal(slot.parameter, slot.latent)
        w = {name: t.clone() for name, t in model.state_dict().items()}  # may be saved here
    assert_same(model.state_dict(), p)
    assert (w["0.weight"] != p["0.weight"]).any() == method.quantizes


@each_kind
def test_what_is_written_inside_latents_is_undone(method):
    model, optimizer = built(method, MLP)
    before = everything(optimizer, model)
    with pytest.raises(ZeroDivisionError), optimizer.latents():
        if method.quantizes:
            model[0].weight.data.zero_()
        1 / 0
    assert_on_grid(optimizer)
    assert_same(everything(optimizer, model), before)


STEPS = {"mlp": 40, "bert": 40, "gpt2": 30, "resnet18": 3}


def mean_loss(task, model, optimizer):
    """Return the loss over a few batches, at the weights that will be deployed, in eval mode."""
    model.eval()
    with torch.no_grad():
        loss = sum(float(task.loss(model, task.batch(i))) for i in range(4)) / 4
    model.train()
    return loss


@pytest.mark.parametrize(
    "task", [MLP, *[pytest.param(task, marks=pytest.mark.long) for task in (BERT, GPT2, RESNET)]], ids=str
)
def test_squat_alone_trains_a_model(task):
    """On the grid throughout; the loss of the deployed weights falls; every scale moves."""
    model = task.build()
    torch.manual_seed(0)
    optimizer = qsam.SQuAT(model, AdamW, rho=0.1, lr=1e-3)
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
