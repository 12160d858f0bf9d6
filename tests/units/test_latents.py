"""The four verbs on latents: each leaves p as it says, and a failed update leaves w as it was."""

import pytest
import torch
from torch import nn

import qsam
from qsam.coverage import quantizer_parameters
from qsam.latents import own_parameters
from tests.models import BERT, CONV, TIED

OFF_GRID = {"quantized": False, "perturbed": True, "latent": True}


def built(method=qsam.JointSAM, perturb="quantized"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))
    qsam.quantize_(model, activations=None)
    return model, method(model, torch.optim.SGD, lr=0.1, perturb=perturb)


def backward(model):
    model(torch.linspace(-1, 1, 24).view(4, 6)).square().mean().backward()


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        backward(model)

    return closure


def assert_p_holds(optimizer, kind):
    for slot in optimizer._latents.slots:
        assert slot.p_holds == kind
        assert slot.quantizer.off_grid == OFF_GRID[kind]
        if kind == "perturbed":
            assert not torch.equal(slot.parameter, slot.quantized())
        else:
            assert torch.equal(slot.parameter, slot.quantized() if kind == "quantized" else slot.latent)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_slot_says_what_its_parameter_holds(backend):
    with qsam.fused.kernels.using(backend):
        model, optimizer = built()
        assert_p_holds(optimizer, "quantized")
        with optimizer.first_pass():
            backward(model)
            assert_p_holds(optimizer, "quantized")
        with optimizer.perturbed():
            assert_p_holds(optimizer, "perturbed")
            backward(model)
        assert_p_holds(optimizer, "quantized")
        optimizer.step()
        assert_p_holds(optimizer, "quantized")
        with optimizer.latents():
            assert_p_holds(optimizer, "latent")
        assert_p_holds(optimizer, "quantized")


def test_an_unmasked_pull_back_returns_the_gradient_and_writes_nothing():
    model, optimizer = built()
    backward(model)
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
    for slot, dw, ds in optimizer._latents.pull_back(masked=False):
        assert torch.equal(dw, slot.parameter.grad)
        assert list(ds) == ["scale"]
    after = [(p.detach(), p.grad) for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


def test_the_two_ways_of_pulling_back_agree_on_the_gradient_of_the_scale():
    model, optimizer = built()
    backward(model)
    free = {slot.path: ds["scale"] for slot, _, ds in optimizer._latents.pull_back(masked=False)}
    points = {s.path: optimizer._latents.vjp(s, s.parameter.grad.clone()) for s in optimizer._latents.slots}
    for slot, dw, ds in optimizer._latents.pull_back(masked=True):
        q, expected_dw, expected_ds = points[slot.path]
        assert torch.equal(q, slot.quantized())
        assert torch.equal(dw, expected_dw)
        torch.testing.assert_close(ds["scale"], expected_ds["scale"])
        torch.testing.assert_close(free[slot.path], expected_ds["scale"])


@pytest.mark.parametrize("copies_in_p", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_failed_update_the_latents_are_what_they_were(copies_in_p, error):
    _, optimizer = built()
    before = [slot.latent.detach().clone() for slot in optimizer._latents.slots]
    with pytest.raises(error), optimizer._latents.update(copies_in_p=copies_in_p):
        with torch.no_grad():
            for slot in optimizer._latents.slots:
                slot.latent.mul_(3)
        raise error
    assert all(torch.equal(slot.latent, w) for slot, w in zip(optimizer._latents.slots, before, strict=True))


@pytest.mark.parametrize("method", [qsam.JointSAM, qsam.SAQ, qsam.SQuAT])
def test_a_write_through_data_into_a_weight_that_is_not_perturbed_is_seen(method):
    """Its p is Q(w) until the update, so the pull-back compares it although the others are perturbed there."""
    model, optimizer = built(method, perturb=lambda name, _: name == "0.weight")
    optimizer.step(closure_of(model, optimizer))
    model[2].weight.data.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"the quantized weight '2\.weight' was written by other code"):
        for _ in range(2):
            optimizer.step(closure_of(model, optimizer))


class Shared(nn.Module):
    """One block under two names, one Parameter in two places, and an empty place."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.first, self.second, self.absent = block, block, None
        self.register_parameter("nothing", None)
        self.head = nn.Linear(4, 4)
        self.head.weight = block[0].weight
        self.scale = nn.Parameter(block[0].bias.detach().clone())


@pytest.mark.parametrize("task", [CONV, BERT, TIED], ids=str)
def test_own_parameters_are_the_named_ones_without_the_quantizers(task):
    model = task.quantized()
    scales = {id(p) for p in quantizer_parameters(model)}
    assert scales
    assert list(own_parameters(model)) == [(n, p) for n, p in model.named_parameters() if id(p) not in scales]


def test_a_shared_parameter_comes_once_by_its_first_name():
    model = Shared()
    assert list(own_parameters(model)) == list(model.named_parameters())
    qsam.quantize_(model, rules=[("*", {"activations": None})])
    assert [name for name, _ in own_parameters(model)] == [name for name, _ in Shared().named_parameters()]
