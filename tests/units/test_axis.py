"""Experts in one Parameter of three dimensions: ``axis=(0, 1)`` gives each row of each expert a scale of its own."""

import json

import pytest
import torch
from torch import nn

import qsam
from qsam.quantizers import LSQ
from tests.methods import assert_same

EXPERTS, OUT, IN = 2, 4, 8


class Experts(nn.Module):
    """What transformers 5 makes of a mixture of experts, without its routing."""

    def __init__(self, shape=(EXPERTS, OUT, IN)):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(shape) * torch.arange(1, shape[0] + 1)[:, None, None])

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.up)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.head = Experts(), nn.Linear(OUT, 2)

    def forward(self, x):
        return self.head(self.experts(x).sum(1))


RULE = ("experts.up", {"granularity": "per_channel", "axis": (0, 1)})
X = torch.linspace(-1, 1, 5 * IN).sin().reshape(5, IN)


@pytest.mark.parametrize("axis", [(0, 1), (0, 2), (1, 2), (2, 0), (-3, 1), 0, 1, 2, (1,)], ids=str)
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_each_channel_is_quantized_alone(axis, granularity):
    """Channels first and flattened, it is the two-dimensional weight of as many rows."""
    w = Experts().up.detach()
    axes = sorted(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    rest = [d for d in range(3) if d not in axes]
    flat = w.permute(*axes, *rest).flatten(0, len(axes) - 1).flatten(1)
    arguments = {"bits": 3, "granularity": granularity, "group_size": 2 if granularity == "per_group" else None}
    q, two = LSQ(axis=axis, **arguments), LSQ(axis=0, **arguments)
    q.observe_(w)
    two.observe_(flat)

    def back(rows):
        """Undo what made ``flat`` of ``w``."""
        order = [*axes, *rest]
        return rows.reshape([w.shape[d] for d in order]).permute([order.index(d) for d in range(3)])

    assert torch.equal(q.scale.flatten(), two.scale.flatten())
    assert torch.equal(q(w), back(two(flat)))
    assert torch.equal(q.codes(w), back(two.codes(flat)))
    assert torch.equal(q.dequantize(q.codes(w)), q(w))
    grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    dw, ds = torch.autograd.grad(q(w := w.clone().requires_grad_()), (w, q.scale), grad)
    flat = flat.clone().requires_grad_()
    rows = grad.permute(*axes, *rest).reshape(flat.shape)
    dflat, dtwo = torch.autograd.grad(two(flat), (flat, two.scale), rows)
    assert torch.equal(dw, back(dflat))
    torch.testing.assert_close(ds.flatten(), dtwo.flatten())


def test_scales_of_leading_channels_have_the_weights_dimensions_and_are_fused_by_rows():
    coverage = qsam.quantize_(model := Mixture(), rules=[RULE])
    quantizer = model.experts.up_quantizer
    assert quantizer.scale.shape == (EXPERTS, OUT, 1)
    assert quantizer.grid(model.experts.up).rows == EXPERTS * OUT
    assert "lsq 4 bits per_channel (0, 1)" in str(coverage)
    trailing = LSQ(bits=4, granularity="per_channel", axis=(0, 2))
    trailing.observe_(model.experts.up)
    assert trailing.scale.shape == (EXPERTS, 1, IN)
    assert trailing.grid(model.experts.up) is None


def test_experts_train_to_the_same_weights_as_a_linear_layer_per_expert():
    """Both hold the same numbers; so do they after three steps, scales included."""
    together, apart = Experts(), nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in range(EXPERTS))
    with torch.no_grad():
        for linear, w in zip(apart, together.up, strict=True):
            linear.weight.copy_(w)
    options = {"granularity": "per_channel", "activations": None}
    qsam.quantize_(together, rules=[("up", {**options, "axis": (0, 1)})])
    qsam.quantize_(apart, rules=[("*", options)])
    ends = []
    for model, forward in ((together, together), (apart, lambda x: torch.stack([m(x) for m in apart], 1))):
        optimizer = qsam.SQuAT(model, torch.optim.SGD, lr=0.1, rho=0.05, scale_lr=1e-3)

        def closure(optimizer=optimizer, forward=forward):
            optimizer.zero_grad()
            loss = forward(X).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        weights = [row.module.get_parameter(row.attr).detach() for row in optimizer.coverage.quantized]
        scales = [row.quantizer.scale.detach() for row in optimizer.coverage.quantized]
        ends.append((torch.cat([w.reshape(-1, IN) for w in weights]), torch.cat([s.reshape(-1) for s in scales])))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_a_file_rebuilds_the_axes(tmp_path):
    model = Mixture()
    coverage = qsam.quantize_(model, rules=[RULE])
    qsam.calibrate(model, [X])
    qsam.write_(model)
    coverage.save(tmp_path)
    other = Mixture()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "_quantizer" not in k})
    rebuilt = qsam.quantize_(other, spec=tmp_path)
    assert rebuilt.plan == coverage.plan
    assert other.experts.up_quantizer.axis == (0, 1)
    assert_same(other.state_dict(), model.state_dict())
    assert json.loads(json.dumps(coverage.to_spec())) == coverage.to_spec()


def test_the_record_of_experts_is_the_weight_bit_for_bit():
    model = Mixture()
    qsam.quantize_(model, rules=[RULE], activations=None)
    qsam.write_(model)
    record = qsam.export(model).weights[0]
    assert (record.axis, record.scale.shape, record.codes.shape) == ((0, 1), (EXPERTS, OUT, 1), (EXPERTS, OUT, IN))
    assert torch.equal(record.dequantized(), model.experts.up)


WRONG = {
    "all dimensions": ({"axis": (0, 1, 2), "granularity": "per_channel"}, ValueError, "must name different dimensions .* and leave one over"),
    "twice the same": ({"axis": (0, -3), "granularity": "per_channel"}, ValueError, "must name different dimensions"),
    "no such dimension": ({"axis": 3, "granularity": "per_channel"}, ValueError, "must name different dimensions"),
    "no integer": ({"axis": "0", "granularity": "per_channel"}, TypeError, "must be an integer or a tuple of integers, got '0'"),
    "no dimension": ({"axis": (), "granularity": "per_channel"}, TypeError, "must be an integer or a tuple"),
    "per tensor": ({"axis": (0, 1)}, ValueError, "needs granularity 'per_channel' or 'per_group'"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_axis_is_refused_with_its_path(overrides, error, message):
    with pytest.raises(error, match=f"'experts.up': `axis` {message}"):
        qsam.quantize_(Mixture(), rules=[("experts.up", overrides)])


def test_a_model_that_stays_mostly_float_warns_and_the_advice_quantizes_it():
    model = Mixture()
    with pytest.warns(
        UserWarning, match=r"only 11% of the matrices' entries .*'experts\.up' of shape \(2, 4, 8\)"
    ) as said:
        qsam.quantize_(model)
    advice = str(said[0].message).split("rules=")[1].split(", or with None")[0]
    qsam.dequantize_(model)
    coverage = qsam.quantize_(model, rules=eval(advice))
    assert coverage.share > 0.9
    assert model.experts.up_quantizer.scale.shape == (EXPERTS, OUT, 1)


def test_a_rule_that_keeps_them_float_is_no_reason_to_warn():
    qsam.quantize_(Mixture(), rules=[("experts.up", None)])
