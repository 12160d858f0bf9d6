"""timm's architectures: quantized by the defaults, trained by one SQuAT step, saved, rebuilt and exported."""

import contextlib
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD

import qsam
from tests.architectures import ARCHITECTURES, DEFAULT, LEAST_SHARE, PAGE, Architecture, rewritten, share_of_matrices
from tests.methods import assert_on_grid

pytest.importorskip("timm")

EXCEPTIONS = {
    "tf_efficientnet_cc_b0_4e": (
        0.1,
        "CondConv2d holds a matrix of flattened kernels, one row an expert, and mixes the rows anew for each image: "
        "no layer that the default policy knows, and a mixture of quantized kernels is on no grid",
    ),
}
"""Architectures of whose matrices less is quantized: the share at least, and why."""

STEPS = {"test_nfnet": 2}
"""Its branches end in a gain of 0, so that some inputs are zeros in the first step, which set no scale."""

each = pytest.mark.parametrize(
    "architecture",
    [a if a.default else pytest.param(a, marks=pytest.mark.long) for a in ARCHITECTURES],
    ids=str,
)


def trained(architecture: Architecture, x: torch.Tensor):
    """Return the model after one step, or the least that sets all scales, its optimizer, its coverage and the loss."""
    model = architecture.build()
    few = pytest.warns(UserWarning, match="of the matrices' entries are quantized")
    with few if architecture.name in EXCEPTIONS else contextlib.nullcontext():
        coverage = qsam.quantize_(model, bits=4, activation_bits=8, init="lsq")
    optimizer = qsam.SQuAT(model, SGD, lr=0.01, rho=0.01)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)))
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(STEPS.get(architecture.name, 1))]
    return model, optimizer, coverage, losses[-1]


@each
@pytest.mark.filterwarnings("ignore:the input of .* held no negative entry")  # four images are few to tell a sign by
def test_an_architecture_is_quantized_trained_saved_rebuilt_and_exported(architecture, tmp_path):
    x = architecture.images()
    model, optimizer, coverage, loss = trained(architecture, x)
    assert loss.isfinite()
    assert_on_grid(optimizer)
    assert not [row.name for row in coverage.inputs if row.quantizer is not None and not row.quantizer.calibrated]

    least, _ = EXCEPTIONS.get(architecture.name, (LEAST_SHARE, ""))
    assert share_of_matrices(coverage) >= least
    assert (architecture.name in EXCEPTIONS) == (share_of_matrices(coverage) < LEAST_SHARE)

    coverage.save(tmp_path)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = architecture.build(seed=1)
    qsam.quantize_(fresh, spec=tmp_path)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        expected = model.eval()(x)
        assert expected.isfinite().all()
        assert torch.equal(fresh.eval()(x), expected)
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), expected)


def test_an_architecture_of_each_family_is_always_run():
    assert {a.family for a in DEFAULT} == {a.family for a in ARCHITECTURES}
    assert len(ARCHITECTURES) >= 40
    assert set(EXCEPTIONS) <= {a.name for a in ARCHITECTURES}


def test_the_page_has_a_row_for_each_architecture_and_those_of_the_default_ones_are_right():
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [a.name for a in ARCHITECTURES]
    assert rewritten(text, DEFAULT) == text, "run: python -m tests.architectures"


@pytest.mark.long
def test_the_whole_page_is_made_from_the_architectures():
    text = PAGE.read_text(encoding="utf-8")
    assert rewritten(text, ARCHITECTURES) == text, "run: python -m tests.architectures"
