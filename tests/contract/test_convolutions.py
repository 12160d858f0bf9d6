"""Convolutions: whose scale may be applied to which output, signs of inputs, residual blocks and dead channels."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

import qsam
from tests.methods import assert_on_grid
from tests.models import EVERYWHERE

# The layer, the dimensions of the images it takes, and its scales per channel.
CONVOLUTIONS = {
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), 1, 4),
    "Conv2d, in groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), 2, 4),
    "Conv2d, depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), 2, 12),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 3), 3, 4),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 4, 3), 1, 4),
    "transposed 2d, in groups": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), 2, 2),  # the groups share theirs
    "transposed 2d, depthwise": (lambda: nn.ConvTranspose2d(6, 12, 3, groups=6), 2, 6),
    "transposed 3d": (lambda: nn.ConvTranspose3d(6, 4, 3), 3, 4),
}
SIGNS = {nn.ReLU: False, nn.Hardsigmoid: False, nn.GELU: True, nn.Hardswish: True, nn.Identity: True}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("build", "dimensions", "count", "granularity"),
    [(*row, "per_channel") for row in CONVOLUTIONS.values()] + [(*CONVOLUTIONS["Conv2d, depthwise"], "per_tensor")],
    ids=[*CONVOLUTIONS, "one scale"],
)
def test_integers_are_convolved_and_scales_applied_to_the_output_channels(build, dimensions, count, granularity):
    """A kernel of integers computes this; the axis is chosen so that each output channel has one scale."""
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
    torch.testing.assert_close(layer(x), codes(x) * factor.view(broadcast) + layer.bias.view(broadcast))


@pytest.mark.parametrize(("activation", "signed"), SIGNS.items())
def test_an_input_is_unsigned_where_nothing_negative_comes(activation, signed):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation(), nn.Conv2d(4, 4, 3))
    qsam.quantize_(model)
    qsam.calibrate(model, [torch.randn(8, 3, 8, 8)])
    q = model[3].input_quantizer
    assert (q.signed, q.quant_min, q.quant_max) == (signed, *((-128, 127) if signed else (0, 255)))
    assert model[0].input_quantizer.signed


def test_weight_standardization_stretches_and_shifts_the_grid_of_each_output_channel():
    layers = pytest.importorskip("timm.layers")
    layer = layers.StdConv2d(32, 4, 1)
    qsam.quantize_(layer, bits=2, activations=None)
    qsam.write_(layer)
    used = layer(torch.eye(32)[:, :, None, None]).flatten(1).T  # column by column, what the input is multiplied with
    q = layer.weight.detach().flatten(1)
    deviation = (q.var(1, correction=0, keepdim=True) + layer.eps).sqrt()
    torch.testing.assert_close(used, (q - q.mean(1, keepdim=True)) / deviation)
    assert all(len(row.unique()) > 1 for row in q)


class Residual(nn.Module):
    """x + f(x), then a ReLU in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.conv(x) + x)


def test_in_a_residual_block_the_convolution_sees_the_quantized_tensor_and_the_shortcut_the_float_one():
    block, x = Residual(), torch.randn(2, 4, 5, 5).requires_grad_()
    qsam.quantize_(block, activation_bits=3, rules=EVERYWHERE)
    qsam.calibrate(block, [x])
    qsam.write_(block)
    q = block.conv.input_quantizer
    assert len(q(x).unique()) <= 8
    y = block(x)
    assert torch.equal(y, F.relu(F.conv2d(q(x), block.conv.weight, block.conv.bias, padding=1) + x))
    (got,) = torch.autograd.grad(y.square().sum(), x)  # both uses of the tensor send their gradient back
    through = 2 * y.detach()  # where y > 0; elsewhere it is 0 already
    inside = (x / q.scale >= q.quant_min) & (x / q.scale <= q.quant_max)
    convolved = F.conv_transpose2d(through, block.conv.weight, padding=1)
    torch.testing.assert_close(got, (through + convolved * inside).detach())


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
def test_channels_of_zeros_stay_zeros_have_no_scale_and_break_nothing(build, dead, granularity, init):
    layer = build()
    with torch.no_grad():
        layer.weight[dead] = 0
    model = nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    nn.init.uniform_(model[1].bias, 0.1, 1)  # so that the head's input is not zeros, which would not calibrate it
    qsam.quantize_(model, granularity=granularity, init=init)
    scale = layer.weight_quantizer.scale
    alive = [granularity == "per_tensor" and len(dead) < 4] if len(scale) == 1 else [i not in dead for i in range(4)]
    assert (scale.flatten() > 0).tolist() == alive
    optimizer = qsam.SQuAT(model, SGD, lr=0.01, rho=0.01)
    assert not layer.weight[dead].any()
    x = torch.randn(4, layer.in_channels, 5, 5)
    grads = []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        grads.extend(p.grad for p in model.parameters() if p.grad is not None)
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert grads and all(bool(grad.isfinite().all()) for grad in grads)
    assert bool((scale.isfinite() & (scale >= 0)).all())
    assert_on_grid(optimizer)
