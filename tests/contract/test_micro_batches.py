"""By hand, no micro-batch is ever lost: a perturbed pass that is forgotten is refused, and the cure works."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import qsam


def build(cls=qsam.SAQ, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    qsam.quantize_(model, activations=None)
    return model, cls(model, SGD, lr=0.1, **options)


X = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))


def run(model, optimizer, blocks):
    for i, name in blocks:
        with getattr(optimizer, name)():
            model(X[i]).square().mean().backward()


FORGOTTEN = [(0, "first_pass"), (0, "perturbed"), (1, "first_pass")]


@pytest.mark.parametrize("then", ["step", "first_pass", "scale_phase"])
def test_a_forgotten_perturbed_pass_is_refused_whatever_comes_next(then):
    model, optimizer = build(qsam.SQuAT)
    run(model, optimizer, FORGOTTEN)
    with pytest.raises(
        RuntimeError, match=r"would lose gradients: .*perturbed\(\) is missing\. Run it, or start again"
    ):
        optimizer.step() if then == "step" else run(model, optimizer, [(2, then)])


def test_a_step_that_was_refused_goes_on_with_the_perturbed_pass_as_if_it_had_not_been_forgotten():
    ends = []
    for forgetful in (True, False):
        model, optimizer = build()
        run(model, optimizer, FORGOTTEN)
        if forgetful:
            with pytest.raises(RuntimeError, match="would lose gradients"):
                optimizer.step()
        run(model, optimizer, [(1, "perturbed")])
        optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_zero_grad_starts_the_step_again():
    ends = []
    for forgetful in (True, False):
        model, optimizer = build()
        if forgetful:
            run(model, optimizer, FORGOTTEN)
            optimizer.zero_grad()
        run(model, optimizer, [(2, "first_pass"), (2, "perturbed")])
        optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_gradients_of_a_first_pass_are_not_taken_for_the_scales():
    model, optimizer = build(qsam.SQuAT)
    run(model, optimizer, [(0, "first_pass")])
    with pytest.raises(RuntimeError, match=r"scale_phase\(\) found the gradients of first_pass\(\), .*zero_grad\(\)"):
        run(model, optimizer, [(0, "scale_phase")])
    optimizer.zero_grad()
    run(model, optimizer, [(0, "scale_phase")])
    optimizer.step_scales()
