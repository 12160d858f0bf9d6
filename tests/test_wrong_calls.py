"""Every call of the catalogue raises what it says, word for word, and loses nothing; docs/errors.md is the catalogue."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import qsam
from tests.models import MLP
from tests.optim.methods import assert_same, closure_of, everything, train
from tests.wrong_calls.book import PAGE, chapters, page

ENTRIES = [
    pytest.param(entry, code, id=f"{title}: {code}"[:90]) for title, entries in chapters() for entry, code in entries
]


class Needs:
    """What the calls are made with, built when it is asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.built = {"folder": folder}

    def get(self, name):
        if name not in self.built:
            self.built[name] = getattr(self, name)()
        return self.built[name]

    def model(self):
        return MLP.build()

    def quantized(self):
        return MLP.quantized()

    def other(self):
        """A model with the same quantizers, and another bias: given to another optimizer."""
        return MLP.quantized()

    def optimizer(self):
        optimizer = qsam.SQuAT(self.get("quantized"), SGD, lr=0.01, momentum=0.9)
        train(optimizer, self.get("quantized"), MLP, 2)
        return optimizer

    def qat(self):
        return qsam.QAT(MLP.quantized(), Adam, lr=0.01)

    def closure(self):
        return closure_of(self.get("optimizer"), self.get("quantized"), MLP, MLP.batch(0))

    def spec(self):
        return qsam.quantize_(MLP.build(), bits=3).to_spec()


def state_of(thing):
    """Return what must not change: a model's tensors, modules and hooks; with an optimizer, latents and moments too."""
    if isinstance(thing, nn.Module):
        names = {name: type(module).__name__ for name, module in thing.named_modules()}
        hooks = {name: len(module._forward_pre_hooks) for name, module in thing.named_modules()}
        return {k: v.clone() for k, v in thing.state_dict().items()}, (names, hooks)
    tensors = everything(thing, thing._latents.root)  # before the groups, which it brings up to date
    return tensors, copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in thing.param_groups])


def watched(given, code):
    """Return what the wrong call must not change: all but what the statements before it change on purpose."""
    before = "".join(statement for statement in code.split("; ")[:-1] if not statement.startswith("state"))
    things = {name: t for name, t in given.items() if isinstance(t, nn.Module | torch.optim.Optimizer)}
    changed = {name for name in things if re.search(rf"\b{name}\b", before)}
    if "optimizer" in things:  # it is built on `quantized`; the others only serve to make a foreign checkpoint
        changed |= {"model", "other"} | ({"optimizer"} if "quantized" in changed else set())
    return [thing for name, thing in things.items() if name not in changed]


@pytest.mark.parametrize(("entry", "code"), ENTRIES)
def test_a_wrong_call_raises_what_the_catalogue_says_and_loses_nothing(entry, code, tmp_path):
    needs = Needs(tmp_path)
    given = {name: needs.get(name) for name in entry.needs}
    things = watched(given, code)
    before = [state_of(thing) for thing in things]
    with pytest.raises(entry.kind) as caught:
        entry.call(**given)
    assert type(caught.value) is entry.kind
    assert str(caught.value).replace(str(tmp_path), "FOLDER") == entry.message
    for thing, (tensors, rest) in zip(things, before, strict=True):
        tensors_now, rest_now = state_of(thing)
        assert_same(tensors_now, tensors)
        assert rest_now == rest


def test_the_catalogue_is_large_and_has_no_entry_twice():
    codes = [code for _, entries in chapters() for _, code in entries]
    assert len(codes) == len(set(codes)) >= 150


def test_the_page_is_made_from_the_catalogue():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.wrong_calls"
