"""Quantizers by themselves: the laws on drawn values, settings and their refusals, scale and sign."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsam.functional import integer_limits
from qsam.quantizers import LSQ, FixedStep, Identity, Quantizer, build_quantizer
from qsam.scales import INIT_RULES, initial_scale
from qsam.testing import LAWS
from qsam.testing.inputs import owners
from tests.strategies import cases, settings_of_the_registry

OF_VALUES = {"heavy", "ties", "edges_float64", "edges_bfloat16"}
VALUE_LAWS = [law for law in LAWS.values() if law.inputs is None or law.inputs & OF_VALUES]
"""Not those that no value can break, like pickling, and not ``init_`` (test_scales.py): test_laws.py asks all laws."""

WEIGHT = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0))
GROUPED = {"granularity": "per_group", "axis": 1, "group_size": 4}
SHAPES = [
    ({}, (1,)),
    ({"axis": 1}, (1,)),
    ({"granularity": "per_channel", "axis": 0}, (4, 1, 1)),
    ({"granularity": "per_channel", "axis": 1}, (1, 6, 1)),
    ({"granularity": "per_channel", "axis": -1}, (1, 1, 2)),
    (GROUPED, (6, 2, 1)),
]
each_kind = pytest.mark.parametrize("kind", [{}, {"granularity": "per_channel", "axis": 1}, GROUPED], ids=str)


def observed(q, data=WEIGHT):
    q.observe_(data)
    return q


@pytest.mark.parametrize("setting", settings_of_the_registry(), ids=str)
@settings(max_examples=settings().max_examples // 2)  # an example asks twenty laws
@given(data=st.data())
def test_the_laws_hold(setting, data):
    case = data.draw(cases(setting))
    q = case.quantizer
    for law in VALUE_LAWS:
        if law.applies(q):
            law(case)


@pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("cls", [LSQ, FixedStep])
def test_the_scale_has_one_entry_per_row_and_dequantized_codes_are_the_output(cls, kind, shape):
    for bits, signed in itertools.product(range(2, 9), (True, False)):
        q = observed(cls(bits=bits, signed=signed, **kind))
        assert q.scale.shape == shape
        assert torch.equal(q.dequantize(q.codes(WEIGHT)), q(WEIGHT))


@each_kind
def test_per_sample_gradients_by_vmap_equal_a_loop(kind):
    batch = torch.stack([WEIGHT, 3 * WEIGHT.flip(0), WEIGHT.square()])
    q = observed(LSQ(bits=3, **kind), batch[0])

    def loss(scale, x):
        return torch.func.functional_call(q, {"scale": scale}, (x,)).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    ds, dx = torch.func.vmap(gradient, (None, 0))(q.scale.detach(), batch)
    one_by_one = [gradient(q.scale.detach(), x) for x in batch]
    assert torch.equal(dx, torch.stack([each for _, each in one_by_one]))
    expected = torch.stack([each for each, _ in one_by_one])
    tolerance = 1e-5 * float(expected.abs().max())  # fp32 sums in another order
    torch.testing.assert_close(ds, expected, rtol=1e-5, atol=tolerance)


@each_kind
def test_it_compiles_in_one_graph(kind):
    q = observed(LSQ(bits=3, **kind))
    assert torch.equal(torch.compile(q, fullgraph=True, backend="eager")(WEIGHT), q(WEIGHT))


def test_step_size_is_the_scale_of_each_entry_and_none_without_a_grid():
    q = observed(LSQ(bits=4, **GROUPED))
    assert torch.equal(q.step_size(WEIGHT), q.scale.detach().flatten()[owners(q, WEIGHT)])
    assert Identity(bits=4).step_size(WEIGHT) is None


@pytest.mark.parametrize("init", INIT_RULES)
def test_the_scale_of_each_row_is_that_of_its_entries(init):
    q = LSQ(bits=4, **GROUPED)
    q.init = init
    q.observe_(WEIGHT)
    rows = [WEIGHT[owners(q, WEIGHT) == row].reshape(1, -1) for row in range(12)]
    assert torch.equal(q.scale.flatten(), torch.cat([initial_scale(row, -8, 7, init) for row in rows]))


def test_a_second_init_keeps_the_parameter_and_its_requires_grad():
    q = LSQ(bits=4, granularity="per_channel", axis=0)
    q.scale.requires_grad_(False)
    scale = observed(q).scale
    assert observed(q, 2 * WEIGHT).scale is scale
    assert not q.scale.requires_grad


@pytest.mark.parametrize(("shape", "count"), [((5,), 5), ((5, 3), 3), ((5, 2, 3), 6)])
def test_an_activation_counts_the_features_of_one_sample(shape, count):
    x = torch.full(shape, 100.0)
    q = LSQ(bits=2)
    q(x).sum().backward()
    torch.testing.assert_close(q.scale.grad, torch.tensor([x.numel() / count**0.5]))


@pytest.mark.parametrize(("sign", "codes"), [(True, torch.int8), (False, torch.uint8)])
def test_codes_of_eight_bits_fit(sign, codes):
    q = LSQ(bits=8, signed=sign)
    x = torch.tensor([-1e3, 1e3])
    assert q.codes(x).dtype == codes
    assert q.codes(x).tolist() == list(integer_limits(8, sign))


def test_observe_decides_an_open_sign_and_keeps_a_given_one():
    q = LSQ(bits=4, signed=None)
    assert (q.quant_min, q.quant_max) == (-8, 7)  # until data come
    for data, signed in (([0.0, 1.0], False), ([-1e-6, 1.0], True)):
        q = observed(LSQ(bits=4, signed=None), torch.tensor(data))
        assert (q.signed, q.quant_max) == (signed, 7 if signed else 15)
    for signed in (True, False):
        assert observed(LSQ(bits=4, signed=signed), torch.tensor([-1.0, 1.0])).signed is signed


def test_calibrated_is_set_by_observe_and_by_a_load_of_its_own_scale():
    assert not LSQ(bits=4).calibrated
    q, model = observed(LSQ(bits=4)), torch.nn.ModuleDict({"a": LSQ(bits=4), "b": LSQ(bits=4)})
    assert q.calibrated
    model.load_state_dict({f"a.{name}": value for name, value in q.state_dict().items()}, strict=False)
    assert model["a"].calibrated
    assert not model["b"].calibrated


def test_print_shows_the_settings():
    assert repr(LSQ(bits=4)) == "LSQ(bits=4, signed, per_tensor)"
    assert repr(LSQ(bits=2, signed=None)) == "LSQ(bits=2, sign open, per_tensor)"
    grouped = LSQ(bits=8, signed=False, granularity="per_group", axis=0, group_size=32)
    assert repr(grouped) == "LSQ(bits=8, unsigned, per_group of 32)"


def test_per_channel_is_lsq_per_channel():
    q = observed(build_quantizer("per_channel", bits=4, granularity="per_tensor", axis=1))
    assert torch.equal(q(WEIGHT), observed(LSQ(bits=4, granularity="per_channel", axis=1))(WEIGHT))


def test_fixed_step_is_lsq_in_value_and_in_the_gradient_of_x_and_learns_nothing():
    outputs = []
    for cls in (FixedStep, LSQ):
        q, x = observed(cls(bits=2)), WEIGHT.clone().requires_grad_()
        q(x).square().sum().backward()
        outputs.append((q(WEIGHT).detach(), x.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))
    assert list(FixedStep(bits=4).parameters()) == []
    assert list(FixedStep(bits=4).state_dict()) == ["limits", "scale"]


def test_identity_returns_its_input():
    q = observed(Identity(bits=2))
    assert q(WEIGHT) is WEIGHT
    assert q.calibrated


def test_update_does_nothing_by_default_and_the_base_class_leaves_init_and_forward_open():
    q = LSQ(bits=4)
    before = copy.deepcopy(q.state_dict())
    q.update(WEIGHT)
    assert torch.equal(before["scale"], q.scale)
    for call in (Quantizer(bits=4).init_, Quantizer(bits=4)):
        with pytest.raises(NotImplementedError):
            call(WEIGHT)


def test_moving_to_another_device_moves_the_scale():
    assert LSQ(bits=4).to("meta").scale.device.type == "meta"


IN_GROUPS = {"granularity": "per_group", "axis": 0}
BITS = r"`bits` must be an integer in \[2, 8\], got "
SIZE = "`group_size` must be an integer >= 1, got "
REFUSED = [
    ({"bits": 1}, ValueError, BITS + r"1\. To keep a tensor in float, give None"),
    ({"bits": 9}, ValueError, BITS + "9"),
    ({"bits": 4.0}, TypeError, BITS + r"4\.0 of type float"),
    ({"bits": True}, TypeError, BITS + "True of type bool"),
    ({"granularity": "per_row"}, ValueError, "must be one of per_tensor, per_channel, per_group, got 'per_row'"),
    ({"granularity": "per_channel"}, ValueError, "'per_channel' needs `axis`, the channel dimension"),
    ({"granularity": "per_group", "group_size": 4}, ValueError, "'per_group' needs `axis`"),
    (IN_GROUPS, ValueError, "granularity 'per_group' needs `group_size`"),
    ({"group_size": 4}, ValueError, "belongs to granularity 'per_group' .* got 4 with 'per_tensor'"),
    ({**IN_GROUPS, "group_size": 0}, ValueError, SIZE + "0"),
    ({**IN_GROUPS, "group_size": True}, ValueError, SIZE + "True"),
    ({**IN_GROUPS, "group_size": 2.0}, ValueError, SIZE + r"2\.0"),
    ({"signed": "no"}, TypeError, "`signed` must be True, False or None, got 'no'"),
    (
        {"axis": 1.0},
        TypeError,
        "`axis` must be an integer, the channel dimension, a tuple of several, or None, got 1.0",
    ),
    ({"axis": True}, TypeError, "`axis` must be an integer"),
]


@pytest.mark.parametrize(("kind", "error", "message"), REFUSED, ids=str)
def test_a_setting_that_means_nothing_is_refused(kind, error, message):
    for cls in (LSQ, FixedStep, Identity):
        with pytest.raises(error, match=message):
            cls(**{"bits": 4, **kind})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({**IN_GROUPS, "group_size": 2}, "has granularity 'per_channel': use 'lsq' for granularity 'per_group'"),
        ({}, "'per_channel' needs `axis`"),
        ({"axis": 0, "group_size": 4}, "`group_size` belongs to granularity 'per_group'"),
    ],
)
def test_per_channel_refuses_groups_and_activations(kind, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer("per_channel", bits=4, **kind)


def test_data_that_do_not_fit_are_refused():
    message = r"must divide the 8 entries of each channel of a tensor of shape \(4, 6, 2\) \(channel axis 1\), got 3"
    with pytest.raises(ValueError, match=message):
        LSQ(bits=4, **{**GROUPED, "group_size": 3}).observe_(WEIGHT)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cannot be set from data that holds NaN or infinity"):
            LSQ(bits=4).observe_(torch.tensor([1.0, value]))
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        LSQ(bits=4).load_state_dict(observed(LSQ(bits=4, granularity="per_channel", axis=0)).state_dict())
