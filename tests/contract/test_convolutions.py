"""Convolutions: whose scale may be applied to which output, signs of inputs, residual blocks and dead channels."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

import qsam
from tests.models import EVERYWHERE
from tests.optim.methods import assert_on_grid

# The layer, the dimensions of the images it takes, and its scales per channel.
CONVOLUTIONS = {
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), 1, 4),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3), 2, 4),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 3), 3, 4),
    "in groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), 2, 4),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), 2, 12),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 4, 3), 1, 4),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 4, 3), 2, 4),
    "transposed 3d": (lambda: nn.ConvTranspose3d(6, 4, 3), 3, 4),
    "transposed, in groups": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), 2, 2),  # the groups share theirs
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=6), 2, 6),
    "transposed, depthwise, two outputs each": (lambda: nn.ConvTranspose2d(6, 12, 3, groups=6), 2, 6),
}

SIGNS = {
    "ReLU": (nn.ReLU(), False),
    "ReLU6": (nn.ReLU6(), False),
    "Sigmoid": (nn.Sigmoid(), False),
    "Hardsigmoid": (nn.Hardsigmoid(), False),
    "GELU": (nn.GELU(), True),
    "SiLU": (nn.SiLU(), True),
    "Hardswish": (nn.Hardswish(), True),
    "nothing": (nn.Identity(), True),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("build", "dimensions", "count", "granularity"),
    [(*row, "per_channel") for row in CONVOLUTIONS.values()] + [(*CONVOLUTIONS["depthwise"], "per_tensor")],
    ids=[*CONVOLUTIONS, "one scale"],
)
def test_integers_are_convolved_and_scales_applied_to_the_output_channels(build, dimensions, count, granularity):
    """What a kernel of integers computes: that each output channel has one scale is what the axis is chosen for."""
    layer, x = build(), torch.randn(2, 6, *[5] * dimensions)
    qsam.quantize_(layer, granularity=granularity, activations=None)
    quantizer = layer.weight_quantizer
    codes = copy.deepcopy(layer)
    codes.weight.data = quantizer.codes(layer.weight).to(torch.float32)
    codes.bias.data.zero_()
    qsam.write_(layer)
    scale = quantizer.scale.detach().flatten()
    assert len(scale) == (count if granularity == "per_channel" else 1)
    if layer.transposed and quantizer.axis == 0:  # a row for each group
        factor = scale.repeat_interleave(layer.out_channels // len(scale))
    else:
        factor = scale.repeat(layer.out_channels // len(scale))
    broadcast = [-1, *[1] * dimensions]
    expected = codes(x) * factor.view(broadcast) + layer.bias.view(broadcast)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("activation", "signed"), SIGNS.values(), ids=SIGNS)
def test_an_input_is_unsigned_where_nothing_negative_comes(activation, signed):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation, nn.Conv2d(4, 4, 3))
    qsam.quantize_(model)
    qsam.calibrate(model, [torch.randn(8, 3, 8, 8)])
    q = model[3].input_quantizer
    assert q.signed == signed
    assert (q.quant_min, q.quant_max) == ((-128, 127) if signed else (0, 255))
    assert model[0].input_quantizer.signed


def test_weight_standardization_stretches_and_shifts_the_grid_of_each_output_channel():
    layers = pytest.importorskip("timm.layers")
    layer = layers.StdConv2d(32, 4, 1)
    qsam.quantize_(layer, bits=2, activations=None)
    codes = layer.weight_quantizer.codes(layer.weight).flatten(1)
    qsam.write_(layer)
    used = layer(torch.eye(32)[:, :, None, None]).flatten(1).T  # column by column, what the input is multiplied with
    q = layer.weight.detach().flatten(1)
    deviation = (q.var(1, correction=0, keepdim=True) + layer.eps).sqrt()
    torch.testing.assert_close(used, (q - q.mean(1, keepdim=True)) / deviation)
    assert all(len(codes[i].unique()) > 1 for i in range(4))
    assert not torch.allclose(used.mean(1), q.mean(1))


class Residual(nn.Module):
    """x + f(x), then a ReLU in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.conv(x) + x)


class TestResidualBlock:
    def test_the_convolution_sees_the_quantized_tensor_and_the_shortcut_the_float_one(self):
        block, x = Residual(), torch.randn(2, 4, 5, 5)
        qsam.quantize_(block, activation_bits=3, rules=EVERYWHERE)
        qsam.calibrate(block, [x])
        qsam.write_(block)
        q = block.conv.input_quantizer(x)
        assert len(q.unique()) <= 8
        expected = F.relu(F.conv2d(q, block.conv.weight, block.conv.bias, padding=1) + x)
        assert torch.equal(block(x), expected)

    def test_both_uses_of_the_tensor_send_their_gradient_back(self):
        block, x = Residual(), torch.randn(2, 4, 5, 5).requires_grad_()
        qsam.quantize_(block, activation_bits=3, rules=EVERYWHERE)
        qsam.calibrate(block, [x])
        y = block(x)
        (got,) = torch.autograd.grad(y.square().sum(), x)
        through = 2 * y.detach()  # where y > 0; elsewhere it is 0 already
        q = block.conv.input_quantizer
        inside = (x / q.scale >= q.quant_min) & (x / q.scale <= q.quant_max)
        convolved = F.conv_transpose2d(through, block.conv.weight, padding=1)
        torch.testing.assert_close(got, (through + convolved * inside).detach())

    def test_a_stack_of_them_trains(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), Residual(), nn.Flatten(), nn.Linear(36, 2))
        optimizer = qsam.SQuAT(model, SGD, lr=0.01)
        x = torch.randn(2, 3, 5, 5)
        before = [p.detach().clone() for p in model.parameters()]

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            assert optimizer.step(closure).isfinite()
        assert_on_grid(optimizer)
        assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def dense():
    return nn.Conv2d(3, 4, 3)


def depthwise():
    return nn.Conv2d(4, 4, 3, groups=4)


@pytest.mark.parametrize(
    ("build", "dead", "granularity", "init"),
    [  # every pair of two options, but for some of `dead` and `init`
        (dense, [0], "per_tensor", "mse"),
        (depthwise, [0, 1, 2, 3], "per_channel", "mse"),
        (dense, [0, 2], "per_channel", "lsq"),
        (depthwise, [0, 1, 2, 3], "per_tensor", "lsq"),
        (dense, [0, 1, 2, 3], "per_tensor", "absmax"),
        (depthwise, [0], "per_channel", "absmax"),
        (dense, [0, 1, 2, 3], "per_channel", "percentile"),
        (depthwise, [0, 2], "per_tensor", "percentile"),
    ],
)
def test_channels_of_zeros_stay_zeros_and_break_nothing(build, dead, granularity, init):
    layer = build()
    with torch.no_grad():
        layer.weight[dead] = 0
    model = nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    qsam.quantize_(model, granularity=granularity, init=init)
    scale = layer.weight_quantizer.scale
    assert bool((scale.isfinite() & (scale > 0)).all())
    optimizer = qsam.SQuAT(model, SGD, lr=0.01, rho=0.01)
    assert not layer.weight[dead].any()
    x = torch.randn(4, layer.in_channels, 5, 5)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        seen.extend(p.grad for p in model.parameters() if p.grad is not None)
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert seen
    assert all(bool(grad.isfinite().all()) for grad in seen)
    assert bool((scale.isfinite() & (scale > 0)).all())
    assert_on_grid(optimizer)
