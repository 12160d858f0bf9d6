"""Inputs quantized by the hook: which values of which layers, calibration, first forward, copies and engines."""

import copy
import inspect
import io
import math
import pickle
import warnings
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import qsam
from qsam.inputs import frozen
from tests.processes import running

INPUTS_ONLY = {"weights": None, "activation_bits": 3}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def model():
    """An MLP with quantizers that have no scale yet."""
    model = mlp()
    qsam.quantize_(model, init="absmax")
    return model


@pytest.fixture
def x():
    return torch.randn(5, 6)


@pytest.fixture
def calibrated(model, x):
    qsam.calibrate(model, [x])
    return model


def quantizers(model):
    return [module.input_quantizer for module in model.modules() if hasattr(module, "input_quantizer")]


def all_calibrated(model):
    return all(q.calibrated for q in quantizers(model))


def none_calibrated(model):
    return not any(q.calibrated for q in quantizers(model))


def with_inputs(layer, *example):
    """Return the layer with quantized inputs, calibrated on the example if there is one, and a copy from before."""
    plain = copy.deepcopy(layer)
    qsam.quantize_(layer, **INPUTS_ONLY)
    if example:
        qsam.calibrate(layer, [example])
    return layer, plain


def first(output):
    return output[0] if isinstance(output, tuple) else output


LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3), (5, 2, 7)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3), (5, 2, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 3), (2, 2, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 4, 3), (5, 2, 7)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 4, 3), (5, 2, 7, 7)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 3), (2, 2, 5, 5, 5)),
    "LSTM": (lambda: nn.LSTM(6, 4, bidirectional=True), (7, 5, 6)),
    "GRU": (lambda: nn.GRU(6, 4), (7, 5, 6)),
    "RNN": (lambda: nn.RNN(6, 4), (7, 5, 6)),
    "LSTMCell": (lambda: nn.LSTMCell(6, 4), (5, 6)),
    "GRUCell": (lambda: nn.GRUCell(6, 4), (5, 6)),
    "RNNCell": (lambda: nn.RNNCell(6, 4), (5, 6)),
    "transformers' Conv1D": (lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6), (5, 6)),
}


class TestLayers:
    @pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)
    def test_a_layer_sees_its_input_quantized_by_position_and_by_keyword(self, build, shape):
        x = torch.randn(shape)
        layer, plain = with_inputs(build(), x)
        expected = first(plain(layer.input_quantizer(x)))
        keyword = next(iter(inspect.signature(layer.forward).parameters))
        assert torch.equal(first(layer(x)), expected)
        assert torch.equal(first(layer(**{keyword: x})), expected)
        assert not torch.equal(expected, first(plain(x)))

    def test_gradients_reach_the_input_and_its_scale_and_of_a_weight_no_scale(self, calibrated, x):
        calibrated(x.requires_grad_()).sum().backward()
        assert x.grad.any()
        assert all(q.scale.requires_grad and q.scale.grad is not None for q in quantizers(calibrated))
        assert not any(calibrated[i].weight_quantizer.scale.requires_grad for i in (0, 2, 4))
        assert all(p.grad is not None for p in calibrated.parameters() if p.requires_grad)

    def test_a_layer_that_is_called_twice_quantizes_twice(self, x):
        layer, plain = with_inputs(nn.Linear(6, 6))
        y, q = layer(layer(x)), layer.input_quantizer
        assert torch.equal(y, plain(q(plain(q(x)))))

    def test_of_several_inputs_the_first_floating_one_is_quantized(self):
        class Picks(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.randn(4, 6))

            def forward(self, index, x, y):
                return self.table[index] * x, y

        layer = Picks()
        index, a, b = torch.tensor([3, 1]), torch.randn(2, 6), torch.randn(2, 6)
        qsam.quantize_(layer, rules=[("table", {"activations": "lsq", **INPUTS_ONLY})])
        qsam.calibrate(layer, [(index, a, b)])
        out, untouched = layer(index, a, b)
        assert torch.equal(out, layer.table[index] * layer.input_quantizer(a))
        assert untouched is b

    def test_embedding_indices_are_never_quantized(self):
        layer = nn.Embedding(5, 4)
        coverage = qsam.quantize_(layer, rules=[(nn.Embedding, {"activations": "lsq"})])
        assert [(row.quantizer, row.reason) for row in coverage.inputs] == [(None, "its input is indices")]
        assert not layer._forward_pre_hooks
        assert layer(torch.tensor([4, 0])).shape == (2, 4)

    def test_an_empty_batch_passes_and_sets_no_scale(self, model):
        assert model(torch.randn(0, 6)).shape == (0, 3)
        assert none_calibrated(model)

    def test_a_tied_layer_quantizes_its_own_input(self, x):
        model = mlp()
        model[4] = nn.Linear(8, 8)
        model[4].weight = model[2].weight
        qsam.quantize_(model)
        qsam.calibrate(model, [x])
        assert model[4].input_quantizer.calibrated
        assert model[4].input_quantizer is not model[2].input_quantizer


class TestRecurrent:
    @pytest.fixture
    def packed(self):
        return pack_padded_sequence(torch.randn(7, 3, 6), torch.tensor([7, 4, 2]))

    @pytest.mark.parametrize(("kind", "with_state"), [(nn.LSTM, True), (nn.GRU, True), (nn.GRU, False)])
    def test_a_packed_sequence_and_its_state_pass_as_float(self, kind, with_state, packed):
        layer, plain = with_inputs(kind(6, 4))
        h = torch.randn(1, 3, 4)
        state = ((h, h) if kind is nn.LSTM else h) if with_state else None
        expected = pad_packed_sequence(plain(packed, state)[0])[0]
        for out in (layer(packed, state), layer(input=packed, hx=state), layer(hx=state, input=packed)):
            assert torch.equal(pad_packed_sequence(out[0])[0], expected)
        assert not layer.input_quantizer.calibrated

    def test_of_keywords_the_input_is_quantized_and_the_state_is_not(self):
        layer, plain = with_inputs(nn.GRU(6, 4))
        x, h = torch.randn(7, 3, 6), torch.randn(1, 3, 4)
        assert torch.equal(layer(hx=h, input=x)[0], plain(layer.input_quantizer(x), h)[0])

    def test_calibrating_with_packed_sequences_only_is_refused(self, packed):
        layer, _ = with_inputs(nn.LSTM(6, 4))
        with pytest.raises(RuntimeError, match=r"no batch reached the input of the model itself: .*PackedSequence"):
            qsam.calibrate(layer, [{"input": packed}])


class Spy:
    """A pre-hook behind ours: what the layer is given."""

    def __init__(self, layer):
        layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.seen = [*args, *kwargs.values()]


CALLS = {
    "by position": lambda layer, q, k, v: layer(q, k, v),
    "by keyword": lambda layer, q, k, v: layer(query=q, key=k, value=v),
    "mixed": lambda layer, q, k, v: layer(q, value=v, key=k),
}


class TestAttention:
    @pytest.mark.parametrize("sizes", [(4, 4), (6, 10)], ids=["one size", "three sizes"])
    def test_query_key_and_value_are_quantized(self, sizes):
        kdim, vdim = sizes
        values = torch.randn(3, 2, 4), torch.randn(5, 2, kdim), torch.randn(5, 2, vdim)
        layer, plain = with_inputs(nn.MultiheadAttention(4, 2, kdim=kdim, vdim=vdim), *values)
        expected = plain(*(layer.input_quantizer(value) for value in values))[0]
        for call in CALLS.values():
            assert torch.equal(call(layer, *values)[0], expected)

    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_tensors_that_are_one_stay_one(self, call):
        """torch's fast path asks ``query is key``; and one tensor is quantized once."""
        layer, x, k = nn.MultiheadAttention(4, 2), torch.randn(3, 2, 4), torch.randn(5, 2, 4)
        qsam.quantize_(layer)
        spy, calls = Spy(layer), []
        layer.input_quantizer.register_forward_hook(lambda *_: calls.append(1))
        call(layer, x, x, x)
        assert spy.seen[0] is spy.seen[1] is spy.seen[2] is not x
        assert len(calls) == 1
        call(layer, x, k, k)
        assert spy.seen[1] is spy.seen[2] is not spy.seen[0]

    def test_a_floating_mask_is_left_alone(self):
        layer, x, mask = nn.MultiheadAttention(4, 2), torch.randn(3, 2, 4), torch.randn(3, 3)
        qsam.quantize_(layer)
        spy = Spy(layer)
        layer(x, x, x, attn_mask=mask)
        assert spy.seen[-1] is mask

    def test_only_the_weights_of_its_out_proj_are_quantized(self):
        layer = nn.MultiheadAttention(4, 2)
        rows = {row.name: row for row in qsam.quantize_(layer).inputs}
        assert rows["out_proj"].quantizer is None
        assert "never calls its out_proj" in rows["out_proj"].reason
        assert not layer.out_proj._forward_pre_hooks
        assert hasattr(layer.out_proj, "weight_quantizer")

    @pytest.mark.parametrize("separate", [False, True])
    def test_a_layer_whose_weight_timm_uses_without_calling_it_keeps_a_float_input(self, separate):
        timm = pytest.importorskip("timm")
        model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=32)
        model.blocks[0].attn.qkv_bias_separate = separate
        coverage = qsam.quantize_(model, init="absmax")
        qsam.calibrate(model, [torch.randn(2, 3, 32, 32)])  # which refuses an input that is never reached
        (row,) = (row for row in coverage.inputs if row.name == "blocks.0.attn.qkv")
        assert (row.quantizer is not None) == separate
        assert ("set `qkv_bias_separate = True` on its attention before quantize_" in row.reason) == (not separate)
        assert isinstance(model.blocks[0].attn.qkv.weight_quantizer, qsam.Quantizer)

    def test_the_native_fast_path_is_taken_in_eval_and_agrees_with_training(self, monkeypatch):
        calls = []
        native = torch._native_multi_head_attention
        monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *a: calls.append(1) or native(*a))
        layer, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 5, 4)
        qsam.quantize_(layer)
        qsam.calibrate(layer, [(x, x, x)])
        calls.clear()
        trained = layer(x, x, x)[0].detach()
        assert not calls
        with torch.no_grad():
            evaluated = layer.eval()(x, x, x)[0]
        assert calls
        torch.testing.assert_close(trained, evaluated)  # two kernels: torch's own tolerance between them

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_an_encoder_that_nests_its_padded_batch_agrees_with_training(self):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
        x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
        padding[0, 3:] = True
        qsam.quantize_(model)
        qsam.calibrate(model, [{"src": x, "src_key_padding_mask": padding}])
        trained = model(x, src_key_padding_mask=padding).detach()
        with torch.no_grad():
            evaluated = model.eval()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(trained[~padding], evaluated[~padding])


class TestCalibrate:
    def test_batches_are_tensors_tuples_lists_or_dicts_and_all_count(self, model, x):
        for form in (lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}):
            other = copy.deepcopy(model)
            qsam.calibrate(other, (form(batch) for batch in x.split(2)))
            assert all_calibrated(other)
            q = other[0].input_quantizer
            torch.testing.assert_close(q.scale.item(), x.abs().max().item() / q.quant_max)

    def test_inputs_are_observed_before_any_of_them_is_quantized(self, x):
        model = mlp()
        hidden = model[:4](x)
        qsam.quantize_(model, init="absmax", activation_bits=2)
        qsam.calibrate(model, [x])
        torch.testing.assert_close(model[4].input_quantizer.scale.item(), hidden.max().item() / 255)  # the head: 8 bits

    def test_a_large_batch_is_sampled_evenly(self):
        model = nn.Linear(768, 2)
        qsam.quantize_(model, init="lsq")
        x = torch.randn(2048, 768) * torch.where(torch.arange(768) % 24 == 0, 20.0, 1.0)
        qsam.calibrate(model, [x])
        q = model.input_quantizer
        # Stride 24, which 2048 * 768 / 2^16 suggests, would see the large channels only: 11 times this.
        assert q.scale.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(q.quant_max), rel=0.05)

    def test_the_extremes_of_a_large_batch_are_always_seen(self):
        model = nn.Linear(8, 2)
        qsam.quantize_(model, init="absmax")
        x = torch.rand(2**15, 8)
        x[12345, 3], x[321, 5] = 100.0, -1.0
        qsam.calibrate(model, [x])
        q = model.input_quantizer
        assert q.signed
        torch.testing.assert_close(q.scale.item(), 100 / q.quant_max)

    def test_what_is_kept_of_many_batches_is_bounded(self):
        model = nn.Linear(64, 2)
        qsam.quantize_(model)
        sizes, place = [], model.input_quantizer._qsam_place

        def batches():
            for _ in range(24):
                yield torch.randn(2**10, 64)
                sizes.append(sum(map(len, place.samples)))

        qsam.calibrate(model, batches())
        assert max(sizes) <= 2**20 < 24 * 2**16
        assert place.samples is None

    def test_it_runs_in_eval_mode_without_gradient_and_restores_the_modes(self, x):
        class Asserts(nn.Linear):
            def forward(self, x):
                assert not self.training and not torch.is_grad_enabled()
                return super().forward(x)

        model = nn.Sequential(Asserts(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)).train()
        model[2].eval()
        qsam.quantize_(model)
        modes = [module.training for module in model.modules()]
        qsam.calibrate(model, [x])
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()

    def test_a_failing_batch_leaves_modes_and_scales_as_they_were(self, model, x):
        with pytest.raises(RuntimeError, match="shape"):
            qsam.calibrate(model, [x, torch.randn(2, 5)])
        assert all(module.training for module in model.modules())
        assert all(q._qsam_place.samples is None and not q.calibrated for q in quantizers(model))

    def test_inputs_that_no_batch_reaches_are_named(self, x):
        model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 2)})
        model.forward = model["used"].__call__
        qsam.quantize_(model)
        with pytest.raises(RuntimeError, match="no batch reached the input of 'unused': give batches that use it"):
            qsam.calibrate(model, [x])
        assert model["used"].input_quantizer.calibrated

    def test_without_a_batch_or_without_quantizers_it_is_refused(self, model, x):
        for empty in ([], iter(())):
            with pytest.raises(ValueError, match="`batches` is empty"):
                qsam.calibrate(model, empty)
        with pytest.raises(
            RuntimeError, match=r"calibrate needs a quantized model: call qsam.quantize_\(model\) first"
        ):
            qsam.calibrate(mlp(), [x])

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_data_that_is_not_finite_is_refused_with_the_path(self, model, x, poison):
        bad = x.clone()
        bad[1, 2] = poison
        for call in (lambda: qsam.calibrate(model, [x, bad]), lambda: model(bad)):
            with pytest.raises(ValueError, match="the input of '0' holds NaN or infinity"):
                call()
        assert model[0].input_quantizer.signed is None
        qsam.calibrate(model, [x])
        assert model[0].input_quantizer.signed

    def test_the_data_decide_the_sign_and_calibrating_again_decides_again(self, calibrated, x):
        assert [q.signed for q in quantizers(calibrated)] == [True, False, False]
        assert [(q.quant_min, q.quant_max) for q in quantizers(calibrated)] == [(-128, 127), (0, 255), (0, 255)]
        scales = [q.scale for q in quantizers(calibrated)]
        for data, signed in ((x.abs(), False), (3 * x, True)):
            qsam.calibrate(calibrated, [data])
            assert calibrated[0].input_quantizer.signed is signed
        assert all(q.scale is scale for q, scale in zip(quantizers(calibrated), scales, strict=True))

    def test_a_scale_of_an_old_file_without_its_sign_is_refused(self, calibrated, x):
        other = mlp()
        qsam.quantize_(other, init="absmax")
        other.load_state_dict({key: value for key, value in calibrated.state_dict().items() if "limits" not in key})
        with pytest.raises(RuntimeError, match=r"the scale of the input of '0' was loaded .*older qsam.*spec=.*calibr"):
            other(x)
        qsam.calibrate(other, [x])
        assert torch.equal(other(x), calibrated(x))


class TestFirstForward:
    def test_in_training_mode_it_calibrates_and_later_ones_do_not(self, model, x):
        model(x)
        assert all_calibrated(model)
        torch.testing.assert_close(model[0].input_quantizer.scale.item(), x.abs().max().item() / 127)
        before = [q.scale.clone() for q in quantizers(model)]
        model(100 * x)
        assert all(torch.equal(q.scale, scale) for q, scale in zip(quantizers(model), before, strict=True))

    @pytest.mark.parametrize("action", ["default", "always", "error"])
    def test_in_eval_mode_it_passes_as_float_and_each_model_warns_once_with_the_cure(self, model, x, action):
        expected = mlp_of(model)(x)
        for each in (model.eval(), copy.deepcopy(model)):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter(action)
                if action == "error":
                    with pytest.raises(UserWarning, match="the input of '0', and of every other layer"):
                        each(x)
                for _ in range(3):
                    assert torch.equal(each(x), expected)
            cure = "Call qsam.calibrate(model, batches), or run one forward in training mode"
            assert [cure in str(warning.message) for warning in seen] == [True] * (action != "error")
            assert none_calibrated(each)

    def test_zeros_which_every_grid_leaves_as_they_are_say_nothing_and_set_no_scale(self, x):
        model = nn.Linear(6, 3)
        qsam.quantize_(model)
        for mode in (True, False):
            assert torch.equal(model.train(mode)(torch.zeros_like(x)), model.bias.expand(5, 3))
        assert not model.input_quantizer.calibrated
        model.train()(x)
        assert model.input_quantizer.calibrated

    def test_never_in_a_perturbed_pass_even_if_those_of_two_threads_overlap(self, model, x):
        first, second = frozen(), frozen()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        with pytest.warns(UserWarning, match="passes through in float"):
            model(x)
        assert none_calibrated(model)
        second.__exit__(None, None, None)
        model(x)
        assert all_calibrated(model)

    def test_an_optimizer_calibrates_in_its_first_pass(self, model, x):
        optimizer = qsam.SQuAT(model, torch.optim.SGD, lr=0.1, rho=0.5)
        with optimizer.first_pass():
            model(x).sum().backward()
        before = [q.scale.clone() for q in quantizers(model)]
        assert all_calibrated(model)
        with optimizer.perturbed():
            model(x).sum().backward()
        assert all(torch.equal(q.scale, scale) for q, scale in zip(quantizers(model), before, strict=True))


def mlp_of(model):
    """Return a float copy of a quantized model whose weights have not been written."""
    other = copy.deepcopy(model)
    qsam.dequantize_(other)
    return other


class Borrower(nn.Module):
    """Uses the weight of a layer without calling it, as timm's BEiT does."""

    def __init__(self):
        super().__init__()
        self.first, self.borrowed, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(nn.functional.linear(self.first(x), self.borrowed.weight).relu())


class TestNeverCalled:
    def step(self, model, x):
        optimizer = qsam.SQuAT(model, torch.optim.SGD, lr=0.01)
        for _ in range(2):
            optimizer.step(lambda: model(x).square().mean().backward())

    def test_a_layer_whose_weight_is_used_without_calling_it_is_named_once_and_the_rule_is_the_cure(self, x):
        message = r"the weight of 'borrowed' without calling the layer .*'activations': None"
        with pytest.warns(UserWarning, match=message) as said:
            self.step(Borrower(), x)
        assert len(said) == 1
        model = Borrower()
        qsam.quantize_(model, rules=[("borrowed", {"activations": None})])
        self.step(model, x)

    def test_a_layer_that_was_called_with_zeros_is_no_matter(self, model, x):
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.zero_()
        self.step(model, x)
        assert [q.calibrated for q in quantizers(model)] == [True, False, True]

    def test_a_layer_that_no_batch_has_reached_and_gradients_without_a_forward_are_no_matter(self, model, x):
        whole = nn.ModuleDict({"mlp": mlp(), "rest": nn.Linear(6, 6)})
        qsam.quantize_(whole)
        whole.forward = whole["mlp"].__call__
        self.step(whole, x)
        optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.01)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestCopies:
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded]
    )
    def test_a_copy_runs_its_own_quantizers(self, calibrated, x, copied):
        expected = calibrated(x)
        other = copied(calibrated)
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            for q in quantizers(other):
                q.scale.mul_(3)
        assert torch.equal(calibrated(x), expected)
        assert not torch.equal(other(x), expected)

    @pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
    def test_casting_the_model_keeps_the_scales(self, calibrated, x, cast):
        before = {name: value.clone() for name, value in calibrated.state_dict().items() if "quantizer" in name}
        getattr(calibrated, cast)()
        after = calibrated.state_dict()
        assert all(after[k].dtype == torch.float32 and torch.equal(after[k], value) for k, value in before.items())
        dtype = calibrated[0].weight.dtype
        assert dtype != torch.float32
        assert calibrated(x.to(dtype)).dtype == dtype


class TestEngines:
    def test_a_compiled_graph_is_whole(self, calibrated, x):
        compiled = torch.compile(calibrated, backend="aot_eager", fullgraph=True)
        inputs = [p for p in calibrated.parameters() if p.requires_grad]
        for batch in (x, 2 * x):
            expected, got = calibrated(batch), compiled(batch)
            assert torch.equal(got, expected)
            grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (expected, got)]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    @pytest.mark.long
    def test_inductor_agrees(self, calibrated, x):
        torch.testing.assert_close(torch.compile(calibrated, fullgraph=True)(x), calibrated(x))

    def test_compiled_attention_is_whole(self):
        model, x = nn.MultiheadAttention(4, 2), torch.randn(3, 2, 4)
        qsam.quantize_(model)
        expected = model(x, x, x)[0]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, x, x)[0], expected)
        assert torch.equal(compiled(query=x, key=x, value=x)[0], expected)

    def test_a_compiled_model_follows_quantize_calibrate_and_dequantize(self, x):
        model = mlp()
        compiled = torch.compile(model.eval(), backend="eager")
        expected = compiled(x)
        torch.compile(copy.deepcopy(model), backend="eager")(x)  # a graph of the same code, of another model
        qsam.quantize_(model, **INPUTS_ONLY)
        with torch.no_grad(), pytest.warns(UserWarning, match="passes through in float"):
            compiled(x)
        qsam.calibrate(compiled, [x])
        quantized = model(x)
        assert not torch.equal(quantized, expected)
        assert torch.equal(compiled(x), quantized)
        assert torch.equal(torch.compile(model, backend="eager")(x), quantized)
        qsam.dequantize_(model)
        assert torch.equal(compiled(x), expected)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # an operation without a batching rule is slow
    def test_per_sample_gradients(self, calibrated, x):
        parameters = {name: p.detach() for name, p in calibrated.named_parameters()}

        def loss(parameters, sample):
            return torch.func.functional_call(calibrated, parameters, (sample[None],)).square().sum()

        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        for i, sample in enumerate(x):
            expected = torch.func.grad(loss)(parameters, sample)
            for name, value in expected.items():
                torch.testing.assert_close(got[name][i], value)  # a batched matmul adds in another order

    def test_export(self, calibrated, x):
        exported = torch.export.export(calibrated.eval(), (x,)).module()
        assert torch.equal(exported(x), calibrated(x))
        assert torch.equal(exported(3 * x), calibrated(3 * x))

    @pytest.mark.parametrize(("reentrant", "fresh"), [(False, False), (False, True), (True, True)])
    def test_activation_checkpointing_changes_nothing(self, model, x, reentrant, fresh):
        if not fresh:
            qsam.calibrate(model, [x])
        other = copy.deepcopy(model)
        x = x.requires_grad_()
        model(x).square().sum().backward()
        checkpoint(other, x, use_reentrant=reentrant).square().sum().backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)


def agree_on_scales_and_signs(rank):
    data = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    data[1] -= 0.5  # negative in one process only
    expected = data.abs().amax(dim=(1, 2)).mean()[None] / 127
    for calibrate in (lambda model: qsam.calibrate(model, data[rank].split(1 + rank)), lambda model: model(data[rank])):
        torch.manual_seed(0)
        model = mlp()
        qsam.quantize_(model, init="absmax")
        wrapped = nn.parallel.DistributedDataParallel(model)
        calibrate(wrapped)
        torch.testing.assert_close(model[0].input_quantizer.scale.detach(), expected)
        assert model[0].input_quantizer.signed
        for q in quantizers(model):
            everywhere = [torch.zeros(1), torch.zeros(1)]
            distributed.all_gather(everywhere, q.scale.detach())
            assert torch.equal(*everywhere)
        model[0].input_quantizer.set_sign_(None)
        with pytest.raises(ValueError, match="the input of '0' holds NaN or infinity"):  # else one waits for ever
            wrapped(data[rank] / torch.arange(2)[rank])


@pytest.mark.long
def test_processes_agree_on_scales_and_signs():
    for processes in running(2):
        processes(agree_on_scales_and_signs)


@pytest.fixture
def process_group():
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    yield
    distributed.destroy_process_group()


def test_a_first_forward_under_ddp_is_that_of_the_model_alone_in_one_process(model, x, process_group):
    alone = copy.deepcopy(model)
    alone(x)
    nn.parallel.DistributedDataParallel(model)(x)
    for q, expected in zip(quantizers(model), quantizers(alone), strict=True):
        assert q.signed == expected.signed
        assert torch.equal(q.scale, expected.scale)


class TestSharded:
    """FSDP2 gathers copies of the scales for the forward: what is written to them is lost."""

    @pytest.fixture
    def shard(self, process_group):
        mesh = distributed.init_device_mesh("cpu", (1,))
        return lambda module: distributed.fsdp.fully_shard(module, mesh=mesh)

    def test_what_would_set_a_scale_is_refused(self, model, x, shard):
        shard(model)
        with pytest.raises(RuntimeError, match=r"input of '0' has no scale yet, and under FSDP2 .* before fully_shard"):
            model(x)
        with pytest.raises(RuntimeError, match=r"sharded already, .* with it: call calibrate before fully_shard"):
            qsam.calibrate(model, [x])
        with pytest.raises(RuntimeError, match="sharded already: call quantize_ before fully_shard"):
            qsam.quantize_(shard(mlp()))

    def test_a_calibrated_model_and_another_model_run_as_before(self, calibrated, x, shard):
        other, expected = mlp(), calibrated(x)
        shard(calibrated)
        assert torch.equal(calibrated(x), expected)
        qsam.quantize_(other)
        other(x)
        assert all_calibrated(other)
