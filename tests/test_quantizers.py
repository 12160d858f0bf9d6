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

SETTINGS = settings_of_the_registry()
OF_VALUES = {"heavy", "ties", "edges_float64", "edges_bfloat16"}
VALUE_LAWS = [law for law in LAWS.values() if law.inputs is None or law.inputs & OF_VALUES]
"""Not those that no value can break, like pickling, and not ``init_`` (test_scales.py): test_laws.py asks all laws."""

WEIGHT = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0))
KINDS = [
    {},
    {"axis": 1},
    {"granularity": "per_channel", "axis": 1},
    {"granularity": "per_channel", "axis": -1},
    {"granularity": "per_group", "axis": 1, "group_size": 4},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@settings(max_examples=settings().max_examples // 2)  # an example asks twenty laws
@given(data=st.data())
def test_the_laws_hold(setting, data):
    case = data.draw(cases(setting))
    q = case.quantizer
    for law in VALUE_LAWS:
        if law.applies(q):
            law(case)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("cls", [LSQ, FixedStep])
def test_dequantized_codes_are_the_output(cls, kind):
    for bits, signed in itertools.product(range(2, 9), (True, False)):
        q = cls(bits=bits, signed=signed, **kind)
        q.observe_(WEIGHT)
        assert torch.equal(q.dequantize(q.codes(WEIGHT)), q(WEIGHT))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_per_sample_gradients_by_vmap_equal_a_loop(kind):
    batch = torch.stack([WEIGHT, 3 * WEIGHT.flip(0), WEIGHT.square()])
    q = LSQ(bits=3, **kind)
    q.observe_(batch[0])

    def loss(scale, x):
        return torch.func.functional_call(q, {"scale": scale}, (x,)).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    ds, dx = torch.func.vmap(gradient, (None, 0))(q.scale.detach(), batch)
    one_by_one = [gradient(q.scale.detach(), x) for x in batch]
    assert torch.equal(dx, torch.stack([each for _, each in one_by_one]))
    expected = torch.stack([each for each, _ in one_by_one])
    tolerance = 1e-5 * float(expected.abs().max())  # fp32 sums in another order
    torch.testing.assert_close(ds, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiles_in_one_graph(kind):
    q = LSQ(bits=3, **kind)
    q.observe_(WEIGHT)
    assert torch.equal(torch.compile(q, fullgraph=True, backend="eager")(WEIGHT), q(WEIGHT))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ({}, (1,)),
        ({"axis": 1}, (1,)),
        ({"granularity": "per_channel", "axis": 0}, (4, 1, 1)),
        ({"granularity": "per_channel", "axis": 1}, (1, 6, 1)),
        ({"granularity": "per_channel", "axis": -1}, (1, 1, 2)),
        ({"granularity": "per_group", "axis": 1, "group_size": 4}, (6, 2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [LSQ, FixedStep])
def test_scale_has_one_entry_a_row(cls, kind, shape):
    q = cls(bits=4, **kind)
    q.observe_(WEIGHT)
    assert q.scale.shape == shape


def test_step_size_is_the_scale_of_each_entry_and_none_without_a_grid():
    q = LSQ(bits=4, granularity="per_group", axis=1, group_size=4)
    q.observe_(WEIGHT)
    assert torch.equal(q.step_size(WEIGHT), q.scale.detach().flatten()[owners(q, WEIGHT)])
    assert Identity(bits=4).step_size(WEIGHT) is None


@pytest.mark.parametrize("init", INIT_RULES)
def test_the_scale_of_each_row_is_that_of_its_entries(init):
    q = LSQ(bits=4, granularity="per_group", axis=1, group_size=4)
    q.init = init
    q.observe_(WEIGHT)
    rows = [WEIGHT[owners(q, WEIGHT) == row].reshape(1, -1) for row in range(12)]
    assert torch.equal(q.scale.flatten(), torch.cat([initial_scale(row, -8, 7, init) for row in rows]))


def test_a_second_init_keeps_the_parameter_object():
    q = LSQ(bits=4, granularity="per_channel", axis=0)
    q.observe_(WEIGHT)
    scale = q.scale
    q.observe_(2 * WEIGHT)
    assert q.scale is scale


def test_init_keeps_requires_grad():
    q = LSQ(bits=4, granularity="per_channel", axis=0)
    q.scale.requires_grad_(False)
    q.observe_(WEIGHT)
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


@pytest.mark.parametrize(("data", "signed"), [([0.0, 1.0], False), ([-1e-6, 1.0], True)])
def test_observe_decides_an_open_sign(data, signed):
    q = LSQ(bits=4, signed=None)
    q.observe_(torch.tensor(data))
    assert q.signed is signed
    assert q.quant_max == (7 if signed else 15)


@pytest.mark.parametrize("signed", [True, False])
def test_observe_keeps_a_given_sign(signed):
    q = LSQ(bits=4, signed=signed)
    q.observe_(torch.tensor([-1.0, 1.0]))
    assert q.signed is signed


def test_an_open_sign_is_a_signed_grid_until_data_come():
    assert (LSQ(bits=4, signed=None).quant_min, LSQ(bits=4, signed=None).quant_max) == (-8, 7)


def test_calibrated_is_set_by_observe_and_by_a_load():
    q, other = LSQ(bits=4), LSQ(bits=4)
    assert not q.calibrated
    q.observe_(WEIGHT)
    assert q.calibrated
    other.load_state_dict(q.state_dict())
    assert other.calibrated


def test_a_load_into_another_module_does_not_calibrate():
    model = torch.nn.ModuleDict({"a": LSQ(bits=4), "b": LSQ(bits=4)})
    model.load_state_dict({"a.scale": torch.full((1,), 0.5)}, strict=False)
    assert model["a"].calibrated
    assert not model["b"].calibrated


def test_moving_to_another_device_moves_the_scale():
    assert LSQ(bits=4).to("meta").scale.device.type == "meta"


def test_print_shows_the_settings():
    assert repr(LSQ(bits=4)) == "LSQ(bits=4, signed, per_tensor)"
    assert repr(LSQ(bits=2, signed=None)) == "LSQ(bits=2, sign open, per_tensor)"
    grouped = LSQ(bits=8, signed=False, granularity="per_group", axis=0, group_size=32)
    assert repr(grouped) == "LSQ(bits=8, unsigned, per_group of 32)"


def test_per_channel_is_lsq_per_channel():
    q, lsq = (
        build_quantizer("per_channel", bits=4, granularity="per_tensor", axis=1),
        LSQ(bits=4, granularity="per_channel", axis=1),
    )
    q.observe_(WEIGHT)
    lsq.observe_(WEIGHT)
    assert torch.equal(q(WEIGHT), lsq(WEIGHT))


def test_fixed_step_learns_nothing_and_saves_its_scale():
    q = FixedStep(bits=4)
    q.observe_(WEIGHT)
    assert list(q.parameters()) == []
    assert list(q.state_dict()) == ["limits", "scale"]


def test_fixed_step_is_lsq_in_value_and_in_the_gradient_of_x():
    outputs = []
    for cls in (FixedStep, LSQ):
        q, x = cls(bits=2), WEIGHT.clone().requires_grad_()
        q.observe_(WEIGHT)
        q(x).square().sum().backward()
        outputs.append((q(WEIGHT).detach(), x.grad))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_identity_returns_its_input():
    q = Identity(bits=2)
    q.observe_(WEIGHT)
    assert q(WEIGHT) is WEIGHT
    assert q.calibrated


def test_update_does_nothing_by_default():
    q = LSQ(bits=4)
    before = copy.deepcopy(q.state_dict())
    q.update(WEIGHT)
    assert torch.equal(before["scale"], q.scale)


def test_the_base_class_leaves_init_and_forward_open():
    with pytest.raises(NotImplementedError):
        Quantizer(bits=4).init_(WEIGHT)
    with pytest.raises(NotImplementedError):
        Quantizer(bits=4)(WEIGHT)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            {"bits": 1},
            ValueError,
            r"`bits` must be an integer in \[2, 8\], got 1\. To keep a tensor in float, give None",
        ),
        ({"bits": 9}, ValueError, r"`bits` must be an integer in \[2, 8\], got 9"),
        ({"bits": 4.0}, TypeError, r"`bits` must be an integer in \[2, 8\], got 4\.0 of type float"),
        ({"bits": True}, TypeError, r"`bits` must be an integer in \[2, 8\], got True of type bool"),
        ({"granularity": "per_row"}, ValueError, "must be one of per_tensor, per_channel, per_group, got 'per_row'"),
        ({"granularity": "per_channel"}, ValueError, "'per_channel' needs `axis`, the channel dimension"),
        ({"granularity": "per_group", "group_size": 4}, ValueError, "'per_group' needs `axis`"),
        ({"granularity": "per_group", "axis": 0}, ValueError, "granularity 'per_group' needs `group_size`"),
        ({"group_size": 4}, ValueError, "belongs to granularity 'per_group' .* got 4 with 'per_tensor'"),
        (
            {"granularity": "per_group", "axis": 0, "group_size": 0},
            ValueError,
            "`group_size` must be an integer >= 1, got 0",
        ),
        (
            {"granularity": "per_group", "axis": 0, "group_size": True},
            ValueError,
            "`group_size` must be an integer >= 1, got True",
        ),
        (
            {"granularity": "per_group", "axis": 0, "group_size": 2.0},
            ValueError,
            r"`group_size` must be an integer >= 1, got 2\.0",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [LSQ, FixedStep, Identity])
def test_a_setting_that_means_nothing_is_refused(cls, kind, error, message):
    with pytest.raises(error, match=message):
        cls(**{"bits": 4, **kind})


def test_per_channel_refuses_groups_and_activations():
    with pytest.raises(
        ValueError, match="'per_channel' has granularity 'per_channel': use 'lsq' for granularity 'per_group'"
    ):
        build_quantizer("per_channel", bits=4, granularity="per_group", axis=0, group_size=2)
    with pytest.raises(ValueError, match="'per_channel' needs `axis`"):
        build_quantizer("per_channel", bits=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signed": "no"}, "`signed` must be True, False or None, got 'no'"),
        ({"axis": 1.0}, "`axis` must be an integer, the channel dimension, a tuple of several, or None, got 1.0"),
        ({"axis": True}, "`axis` must be an integer"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused(options, message):
    with pytest.raises(TypeError, match=message):
        LSQ(bits=4, **options)


def test_per_channel_refuses_a_group_size():
    with pytest.raises(ValueError, match="`group_size` belongs to granularity 'per_group'"):
        build_quantizer("per_channel", bits=4, axis=0, group_size=4)


def test_a_group_size_that_does_not_divide_is_refused():
    q = LSQ(bits=4, granularity="per_group", axis=1, group_size=3)
    message = r"must divide the 8 entries of each channel of a tensor of shape \(4, 6, 2\) \(channel axis 1\), got 3"
    with pytest.raises(ValueError, match=message):
        q.observe_(WEIGHT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="cannot be set from data that holds NaN or infinity"):
        LSQ(bits=4).observe_(torch.tensor([1.0, value]))


def test_a_checkpoint_of_another_shape_is_refused():
    per_channel = LSQ(bits=4, granularity="per_channel", axis=0)
    per_channel.observe_(WEIGHT)
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        LSQ(bits=4).load_state_dict(per_channel.state_dict())
