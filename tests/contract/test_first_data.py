"""Data that say nothing, and data that came first: what scales are set from, and what they are not set from."""

import contextlib
import copy
import functools
import warnings

import pytest
import torch
from torch import nn

import qsam
from qsam.quantizers import build_quantizer
from tests.models import mlp, vectors

X = vectors(0)["x"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def quantizer_of(model):
    return model[0].input_quantizer


class TestInputs:
    def test_zeros_leave_an_input_uncalibrated(self):
        model, other = mlp(), mlp()
        qsam.quantize_(model)
        qsam.quantize_(other)
        model(torch.zeros(4, 8))
        assert not quantizer_of(model).calibrated
        model(X)
        other(X)
        assert quantizer_of(model).signed
        assert torch.equal(quantizer_of(model).scale, quantizer_of(other).scale)

    def test_a_calibration_by_zeros_is_told_and_a_later_batch_sets_the_scale(self):
        model = nn.Sequential(nn.Linear(8, 4))
        qsam.quantize_(model)
        with pytest.warns(UserWarning, match="the input of '0' held zeros only, .* passes in float until a batch"):
            qsam.calibrate(model, [torch.zeros(4, 8)])
        assert not quantizer_of(model).calibrated
        model.train()(X)
        assert quantizer_of(model).calibrated

    def test_negative_entries_at_an_unsigned_input_are_told_once_and_the_cure_works(self):
        model = mlp()
        qsam.quantize_(model)
        model(torch.ones(1, 8))
        assert quantizer_of(model).signed is False
        with pytest.warns(UserWarning, match=r"input of '0' held no negative entry .* Call qsam.calibrate") as said:
            for _ in range(10):
                model(X)
        assert len(said) == 1
        qsam.calibrate(model, [X])
        assert quantizer_of(model).signed
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(X)

    def test_an_input_that_stays_positive_is_never_told(self):
        model = nn.Sequential(nn.Linear(8, 4))
        qsam.quantize_(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(10):
                model(X.abs())


class TestFreshBatchNorms:
    def deep(self):
        return nn.Sequential(
            *[nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(12)]
        )

    def test_scales_do_not_shrink_with_depth(self):
        model, x = self.deep(), torch.randn(8, 4, 6, 6)
        trained = copy.deepcopy(model)
        qsam.quantize_(model)
        before = {name: buffer.clone() for name, buffer in model.named_buffers() if "quantizer" not in name}
        qsam.calibrate(model, [x])
        after = dict(model.named_buffers())
        assert all(torch.equal(after[name], value) for name, value in before.items())
        scales = [block[0].input_quantizer.scale.item() for block in model]
        assert max(scales[1:]) < 10 * min(scales[1:])
        qsam.quantize_(trained)
        trained.train()(x)  # a first forward in training mode normalizes by the batch too
        for mine, theirs in zip(model[1:], trained[1:], strict=True):
            assert mine[0].input_quantizer.scale.item() == pytest.approx(
                theirs[0].input_quantizer.scale.item(), rel=0.5
            )
        model.train()(x).square().mean().backward()
        assert model[0][0].weight.grad.any()

    def test_statistics_that_exist_are_used(self):
        model, x = self.deep()[:1], torch.randn(8, 4, 6, 6)
        model.train()(x)
        expected = copy.deepcopy(model).eval()(10 * x)
        qsam.quantize_(model)
        seen = []
        handle = model.register_forward_hook(lambda module, args, out: seen.append(out))
        qsam.calibrate(model, [10 * x])
        handle.remove()
        assert torch.equal(seen[0], expected)  # while calibrating inputs pass in float

    def test_an_instance_norm_counts_too(self):
        model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, track_running_stats=True), nn.Conv1d(4, 2, 3))
        x = 1e-3 * torch.randn(4, 2, 9)
        qsam.quantize_(model)
        qsam.calibrate(model, [x])
        assert model[1].track_running_stats
        assert model[2].input_quantizer.scale > 1e-3

    def test_one_value_per_channel_is_refused_and_the_cure_works(self):
        model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        qsam.quantize_(model)
        with pytest.raises(ValueError, match=r"has seen no data normalizes by the batch.*two or more samples"):
            qsam.calibrate(model, [X[:1]])
        assert model[1].running_mean is not None
        qsam.calibrate(model, [X])


class TestWeightsOfZeros:
    def train(self, method, granularity, steps=40, build=None, resume_at=None, weights="lsq"):
        torch.manual_seed(0)
        target, x = torch.randn(8, 4), torch.randn(64, 8)

        def made():
            layer = nn.Linear(8, 4)
            nn.init.zeros_(layer.weight)
            group_size = 4 if granularity == "per_group" else None
            qsam.quantize_(
                layer, bits=8, rules=[("*", {})], weights=weights, activations=None, granularity=granularity,
                group_size=group_size,
            )  # fmt: skip
            return layer, method(layer, torch.optim.AdamW, lr=0.1, weight_decay=0.0)

        layer, optimizer = made()
        for step in range(steps):
            if step == resume_at:
                saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
                layer, optimizer = made()
                layer.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])

            def closure(layer=layer, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (layer(x) - x @ target).square().mean()
                loss.backward()
                return loss

            loss = optimizer.step(closure).item()
        return loss, layer, optimizer

    @pytest.mark.parametrize(
        ("method", "granularity"),
        [
            (qsam.QAT, "per_tensor"),
            (qsam.SAQ, "per_channel"),
            (qsam.QAT, "per_group"),
            (functools.partial(qsam.SAQ, case=2, rho=0.01), "per_tensor"),
        ],
        ids=["QAT-per_tensor", "SAQ-per_channel", "QAT-per_group", "SAQ, case 2"],
    )
    def test_the_loss_falls_as_in_float(self, method, granularity):
        loss, layer, _ = self.train(method, granularity)
        first, _, _ = self.train(qsam.QAT, granularity, steps=1)
        assert loss < 0.1 * first
        assert (layer.weight_quantizer.scale > 0).all()

    @pytest.mark.parametrize(("granularity", "resume_at"), [("per_tensor", 0), ("per_channel", 1), ("per_tensor", 7)])
    def test_resuming_is_bit_identical(self, granularity, resume_at):
        loss, layer, _ = self.train(qsam.QAT, granularity, steps=12)
        again, other, _ = self.train(qsam.QAT, granularity, steps=12, resume_at=resume_at)
        assert loss == again
        assert all(
            torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True)
        )

    def test_there_is_no_scale_before_and_the_weight_stays_zero(self):
        layer = nn.Linear(8, 4)
        nn.init.zeros_(layer.weight)
        qsam.quantize_(layer, granularity="per_channel")
        qsam.QAT(layer, torch.optim.SGD, lr=0.1)
        assert not layer.weight.any()
        assert layer.weight_quantizer.scale.tolist() == [[0.0]] * 4
        assert not layer.weight_quantizer.calibrated

    @pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
    def test_a_row_of_zeros_gets_its_scale_when_it_differs_from_zero_and_costs_nothing_before(self, granularity):
        layer = nn.Linear(8, 4)
        with torch.no_grad():
            layer.weight[1] = 0
        group_size = 4 if granularity == "per_group" else None
        qsam.quantize_(layer, rules=[("*", {})], activations=None, granularity=granularity, group_size=group_size)
        optimizer = qsam.QAT(layer, torch.optim.SGD, lr=0.1)
        scale = layer.weight_quantizer.scale
        for outputs, grows in (([0, 2, 3], False), ([0, 1, 2, 3], True)):
            optimizer.step(lambda outputs=outputs: layer(X)[:, outputs].sum().backward())
            assert bool(scale[1].all()) is bool(layer.weight[1].any()) is grows
            assert (scale[[0, 2, 3]] > 0).all()
            assert layer.weight.isfinite().all()


class TestDefaultDtype:
    def test_nothing_is_made_in_the_default_dtype(self):
        torch.manual_seed(0)
        expected = mlp()
        model = copy.deepcopy(expected)
        qsam.quantize_(expected, granularity="per_channel")
        qsam.calibrate(expected, [X])
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            qsam.quantize_(model, granularity="per_channel")
            qsam.calibrate(model, [X])
            optimizer = qsam.SQuAT(model, torch.optim.AdamW, lr=1e-3)
            for name in qsam.list_quantizers():
                made = []
                for axis in (0, None):  # some are for weights only, or for inputs only
                    with contextlib.suppress(ValueError):
                        made.append(build_quantizer(name, bits=8, axis=axis))
                assert made
                assert all(t.dtype != torch.bfloat16 for q in made for t in q.state_dict().values())
            same = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" in k}
            optimizer.step(lambda: model(X).square().mean().backward())
        finally:
            torch.set_default_dtype(before)
        assert all(
            torch.equal(same[key], value)
            for key, value in expected.state_dict().items()
            if key in same and "limits" not in key
        )
        assert all(value.dtype == torch.float32 for value in same.values())
        state = optimizer.state_dict()["state"].values()
        assert all(t.dtype != torch.bfloat16 for entry in state for t in entry.values() if torch.is_tensor(t))


class TestFeaturesPerSample:
    @pytest.mark.parametrize(("build", "batch_first"), [(nn.LSTM, False), (nn.GRU, True), (nn.RNN, False)])
    def test_a_recurrent_layer_counts_the_features_of_one_sequence(self, build, batch_first):
        layer = build(6, 4, batch_first=batch_first)
        qsam.quantize_(layer)
        q = layer.input_quantizer
        for samples in (1, 5):
            shape = (samples, 7, 6) if batch_first else (7, samples, 6)
            assert q._count(torch.zeros(shape)) == 7 * 6
        assert q._count(torch.zeros(7, 6)) == 7 * 6  # one sequence without a batch

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_a_linear_layer_asks_the_block_around_it(self, batch_first):
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), 1, enable_nested_tensor=False
        )
        coverage = qsam.quantize_(model)
        rows = {row.name: row.quantizer for row in coverage.inputs if row.quantizer is not None}
        shape = (3, 5, 8) if batch_first else (5, 3, 8)
        assert {q._count(torch.zeros(shape)) for q in rows.values()} == {5 * 8}
        assert "layers.0.linear1" in rows and "layers.0.self_attn" in rows

    def test_the_gradient_of_the_scale_does_not_depend_on_how_the_batch_lies(self):
        torch.manual_seed(0)
        first = nn.GRU(6, 4, batch_first=True)
        second = nn.GRU(6, 4)
        second.load_state_dict(first.state_dict())
        x = torch.randn(5, 7, 6)
        found = []
        for layer, given in ((first, x), (second, x.transpose(0, 1))):
            qsam.quantize_(layer)
            qsam.calibrate(layer, [given])
            layer(given)[0].square().sum().backward()
            found.append(layer.input_quantizer.scale.grad)
        torch.testing.assert_close(*found)

    def test_a_layer_of_which_nothing_is_known_takes_dimension_zero(self):
        layer = nn.Linear(6, 4)
        qsam.quantize_(layer)
        assert layer.input_quantizer._count(torch.zeros(5, 7, 6)) == 7 * 6
