"""No input is calibrated in a perturbed pass: its statistics would be those of a perturbed model."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import qsam


class Branches(nn.Module):
    """Two layers; the second runs only when it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.both = False

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if self.both else x


def training(**options):
    model = Branches()
    qsam.quantize_(model, rules=[("*", {})])
    return model, qsam.SAQ(model, SGD, lr=0.1, rho=0.5, **options)


def scale_of(layer):
    return layer.input_quantizer.scale.detach().clone()


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_input_that_is_first_reached_in_a_perturbed_pass_is_calibrated_in_the_next_first_pass(by_hand):
    model, optimizer = training()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    passes = []

    def run(both):
        model.both = both
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        passes.append(both)
        return loss

    unset = scale_of(model.second)
    with pytest.warns(UserWarning, match=r"the input of 'second', .*passes through in float"):
        if by_hand:
            for block, both in (("first_pass", False), ("perturbed", True)):
                with getattr(optimizer, block)():
                    run(both)
            optimizer.step()
        else:
            optimizer.step(lambda: run(bool(passes)))
    assert passes == [False, True]
    assert not model.second.input_quantizer.calibrated
    assert torch.equal(scale_of(model.second), unset)

    model.both = True
    optimizer.step(lambda: run(True))
    assert model.second.input_quantizer.calibrated


def test_the_first_calibration_sees_the_unperturbed_model():
    """The scale is the one that a plain forward of the same weights sets, not one of Q(w) + e."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    (model, optimizer), (twin, _) = training(), training()
    model.both = twin.both = True
    twin.train()(x)
    before = []
    with optimizer.first_pass():
        model(x).square().mean().backward()
    before.append(scale_of(model.second))
    with optimizer.perturbed():
        model(x).square().mean().backward()
        before.append(scale_of(model.second))
    assert all(torch.equal(scale, scale_of(twin.second)) for scale in before)


def test_a_perturbed_pass_alone_calibrates_nothing():
    """A direction that is known before the step perturbs the first pass over a batch: there too inputs are frozen."""
    model, optimizer = training(direction="previous")
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    optimizer.step(lambda: model(x).square().mean().backward())
    model.both = True
    with pytest.warns(UserWarning, match=r"the input of 'second'"), optimizer.perturbed():
        model(x).square().mean().backward()
    assert not model.second.input_quantizer.calibrated
    optimizer.step()
