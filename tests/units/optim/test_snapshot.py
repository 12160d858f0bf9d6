"""Buffers and random numbers are put back after a later pass, whatever the layout of the buffer and whoever owns it."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD

import qsam
from qsam.optim.snapshot import buffers_kept, modules_of


def sparse():
    return torch.eye(3).to_sparse_csr()


def under_inference_mode():
    with torch.inference_mode():
        return torch.arange(3.0)


def written_under_inference_mode(buffer):
    with torch.inference_mode():
        buffer.add_(1)


BUFFERS = {
    "float": (lambda: torch.arange(3.0), lambda b: b.add_(1)),
    "integer": (lambda: torch.arange(3), lambda b: b.add_(1)),
    "csr": (sparse, lambda b: b.values().mul_(2)),
    "csc": (lambda: torch.eye(3).to_sparse_csc(), lambda b: b.values().mul_(2)),
    "coo": (lambda: torch.eye(3).to_sparse().coalesce(), lambda b: b.values().mul_(2)),
    "inference": (under_inference_mode, written_under_inference_mode),
    "expanded": (lambda: torch.zeros(1).expand(3), lambda b: None),
    "replaced": (lambda: torch.arange(3.0), None),
}


class Holder(nn.Module):
    """A layer beside a buffer of any kind, which no gradient needs."""

    def __init__(self, buffer, write):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.write = nn.Linear(4, 2), write
        self.register_buffer("kept", buffer)

    def forward(self, x):
        if self.write is None:
            self.kept = self.kept + 1
        else:
            self.write(self.kept)
        return self.layer(x)


@pytest.mark.parametrize(("make", "write"), BUFFERS.values(), ids=BUFFERS)
@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta state")
def test_a_buffer_is_put_back_in_identity_and_value_and_moves_once_per_step(make, write):
    model, once = Holder(make(), write), Holder(make(), write)
    before, values = model.kept, dense(model.kept).clone()
    with buffers_kept(model):
        model(torch.ones(1, 4))
    assert model.kept is before
    assert torch.equal(dense(before), values)
    for _ in range(2):
        once(torch.ones(1, 4))
    optimizer = qsam.SQuAT(model, SGD, lr=0.1)
    for _ in range(2):
        optimizer.step(lambda: model(torch.ones(3, 4)).square().mean().backward())
    assert torch.equal(dense(model.kept), dense(once.kept))


def dense(buffer):
    return buffer if buffer.layout == torch.strided else buffer.to_dense()


class Trainer:
    """An object that keeps its networks as attributes, as many training scripts do."""

    def __init__(self):
        self.teacher, self.pair = nn.Linear(1, 1), [nn.Linear(1, 1)]

    def closure(self):
        return self.teacher, self.pair


GLOBAL = nn.Linear(1, 1)


def uses_the_global():
    return GLOBAL


def test_the_modules_of_a_closure_are_found_wherever_it_keeps_them():
    local, default, held = nn.Linear(1, 1), nn.Linear(1, 1), Trainer()

    def inner():
        return local

    def closure(given=default):
        return inner(), given

    ring = []
    ring.append(ring)  # an object that refers to itself ends the search
    assert modules_of(lambda: ring) == []
    assert set(map(id, modules_of(closure))) == {id(local), id(default)}
    assert modules_of(uses_the_global) == [GLOBAL]
    assert modules_of(lambda: uses_the_global()) == [GLOBAL]
    assert modules_of(held.closure) == [held.teacher, *held.pair]
    assert modules_of(lambda: held.closure()) == [held.teacher, *held.pair]
    assert modules_of(functools.partial(print, local, key={"a": default})) == [local, default]
    assert modules_of(lambda: unset) == []
    unset = None


# --- a second network in the passes ---------------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


METHODS = {
    "saq": lambda model, **options: qsam.SAQ(model, SGD, lr=0.1, **options),
    "same_batch": lambda model, **options: qsam.SQuAT(model, SGD, lr=0.1, **options),
    "fused": lambda model, **options: qsam.SQuAT(model, SGD, lr=0.1, schedule="fused", **options),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_statistics_of_a_second_network_move_once_per_step(method):
    """A discriminator or teacher in the closure: only the first pass counts for its BatchNorms."""
    torch.manual_seed(0)
    model, other, x = network(), network(), torch.randn(8, 4)
    optimizer = METHODS[method](model)

    def closure():
        optimizer.zero_grad()
        loss = other(model(x)).square().mean()
        loss.backward()
        return loss

    expected = []
    other[1].register_forward_hook(lambda *_: expected.append(other[1].running_mean.clone()))
    for step in range(1, 4):
        expected.clear()
        optimizer.step(closure)
        assert len(expected) == len([p for p in optimizer.phases() if p in ("first_pass", "perturbed", "scale_phase")])
        assert other[1].num_batches_tracked == step
        assert torch.equal(other[1].running_mean, expected[0])
    assert optimizer._closure_modules == [], "they are let go of after the step"


def test_by_hand_a_second_network_is_named():
    torch.manual_seed(0)
    counts = {}
    for named in (True, False):
        model, other, x = network(), network(), torch.randn(8, 4)
        optimizer = METHODS["same_batch"](model, modules=[other] if named else [])
        for block in ("first_pass", "perturbed", "scale_phase"):
            with getattr(optimizer, block)():
                other(model(x)).square().mean().backward()
            if block != "first_pass":
                optimizer.step()
        counts[named] = int(other[1].num_batches_tracked)
    assert counts == {True: 1, False: 3}


def test_a_module_that_is_named_must_be_one():
    with pytest.raises(TypeError, match=r"`modules` must be torch\.nn\.Modules, got str\."):
        METHODS["saq"](network(), modules=["other"])
    with pytest.raises(TypeError, match=r"`modules` must be torch\.nn\.Modules, got int\."):
        METHODS["saq"](network(), modules=3)
    other = network()
    assert METHODS["saq"](network(), modules=other).modules == [other]
