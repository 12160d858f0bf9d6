"""What is in the state_dict determines the function: whoever copies the tensors of a model copies what it computes."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qsam
from qsam.quantizers import LSQ, Spec, build_quantizer
from tests.models import MLP, mlp, vectors

X = vectors(0)["x"]


def fresh():
    model = mlp()
    qsam.quantize_(model)
    return model


def calibrated():
    model = fresh()
    qsam.calibrate(model, [X])
    return model


def copied_into(target, model):
    """Copy all tensors, as a target network that follows another one does."""
    with torch.no_grad():
        for mine, theirs in zip(target.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(theirs)
    return target


def coverage_spec(model):
    return qsam.coverage_of(model).to_spec()


def input_quantizers(model):
    return [module.input_quantizer for module in model.modules() if hasattr(module, "input_quantizer")]


def without_limits(state):
    """Return a state_dict as an older qsam wrote it: an input without data had the placeholder 1.0."""
    uncalibrated = {key for key in state if key.endswith("input_quantizer.limits") and not state[key].any()}
    old = {key: value for key, value in state.items() if not key.endswith(".limits")}
    return old | {key.replace("limits", "scale"): torch.ones(1) for key in uncalibrated}


def levels(model, x):
    """Return how many values the input of the last layer takes."""
    seen = []
    handle = model[4].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(x)
    handle.remove()
    return len(seen[0].unique())


def assert_nothing_said(warned):
    """Without a C compiler the first large tensor is told of; that is another matter."""
    assert [str(w.message) for w in warned if "kernels cannot be compiled here" not in str(w.message)] == []


class TestLoading:
    def test_a_state_from_before_the_first_batch_makes_the_model_uncalibrated_again(self):
        model = fresh()
        start = copy.deepcopy(model.state_dict())
        model(100 * X)
        model.load_state_dict(start)
        assert not any(q.calibrated for q in input_quantizers(model))
        model(X)
        other = fresh()
        other(X)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )

    @pytest.mark.parametrize("older", [False, True])
    def test_a_state_of_inputs_without_data_leaves_them_so(self, older):
        model = fresh()
        model.load_state_dict(without_limits(model.state_dict()) if older else model.state_dict())
        assert not any(q.calibrated for q in input_quantizers(model))
        model(X)
        assert all(q.calibrated for q in input_quantizers(model))

    def test_a_checkpoint_of_the_model_alone_is_the_function(self):
        model, other = calibrated(), fresh()
        qsam.write_(model)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(X), model.eval()(X))
        assert [q.signed for q in input_quantizers(other)] == [q.signed for q in input_quantizers(model)]

    @pytest.mark.parametrize("strict", [True, False])
    def test_an_old_state_with_a_spec_is_the_function(self, strict):
        model, other = calibrated(), mlp()
        qsam.quantize_(other, spec=coverage_spec(model))
        other.load_state_dict(without_limits(model.state_dict()), strict=strict)
        assert torch.equal(other.eval()(X), model.eval()(X))

    def test_an_old_state_with_the_optimizers_is_the_function(self):
        model = calibrated()
        optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
        other = fresh()
        new = qsam.QAT(other, torch.optim.SGD, lr=0.1)
        other.load_state_dict(without_limits(model.state_dict()))
        new.load_state_dict(optimizer.state_dict())
        assert torch.equal(other.eval()(X), model.eval()(X))


class TestCopying:
    @pytest.mark.parametrize(("use_buffers", "calibrated_first"), [(False, False), (True, False), (True, True)])
    def test_an_average_computes_on_its_grids(self, use_buffers, calibrated_first, recwarn):
        """The block of docs/loops.md: the average is made before the first batch has calibrated anything."""
        model = calibrated() if calibrated_first else fresh()
        optimizer = qsam.SQuAT(model, torch.optim.AdamW, lr=1e-3)
        with optimizer.latents():
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=use_buffers)
        for number in range(3):
            optimizer.step(lambda n=number: MLP.loss(model, vectors(n)).backward())
            with optimizer.latents():
                average.update_parameters(model)
        qsam.write_(average.module)
        assert levels(average.module.eval(), torch.randn(4096, 8)) <= 256
        assert coverage_spec(average.module)["inputs"]["2"]["calibrated"]
        assert_nothing_said(recwarn)

    @pytest.mark.parametrize("calibrated_first", [False, True])
    def test_timms_average_has_the_scale_of_the_data(self, calibrated_first, recwarn):
        """It averages all floating tensors from its first update on: the placeholder of the scale is a part of it."""
        ModelEmaV3 = pytest.importorskip("timm.utils").ModelEmaV3
        model = calibrated() if calibrated_first else fresh()
        average = ModelEmaV3(model, decay=0.9)
        model(X)
        for _ in range(3):
            average.update(model)
        for mine, theirs in zip(input_quantizers(average.module), input_quantizers(model), strict=True):
            assert mine.signed is theirs.signed
            torch.testing.assert_close(mine.step_size(X), theirs.step_size(X))
        average.module.eval()
        torch.testing.assert_close(average.module(X), model(X))
        assert_nothing_said(recwarn)

    def test_a_target_network_that_follows_by_copying_is_the_function(self):
        model, target = calibrated(), fresh()
        copied_into(target, model)
        assert torch.equal(target.eval()(X), model.eval()(X))

    @pytest.mark.parametrize("kind", [torch.int32, torch.float64])
    def test_limits_that_lost_a_bit_in_an_average_still_tell_the_sign(self, kind):
        model = calibrated()
        expected = model(X)
        for q in input_quantizers(model):
            averaged = q.limits.to(kind) * 0.999 + q.limits.to(kind) * 0.001
            q.limits.copy_(averaged)
        torch.testing.assert_close(model(X), expected)

    def test_a_compiled_graph_sees_another_sign_and_another_scale(self):
        model = copied_into(fresh(), calibrated())
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(X), model(X))
        qsam.calibrate(model, [X.abs()])
        assert model[0].input_quantizer.signed is False
        assert torch.equal(compiled(X.abs()), model(X.abs()))
        copied_into(model, calibrated())
        assert torch.equal(compiled(X), model(X))
        assert torch.equal(compiled(X), calibrated()(X))

    @pytest.mark.long
    def test_a_compiled_model_is_calibrated_again_after_a_load(self):
        model = fresh()
        start = copy.deepcopy(model.state_dict())
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            compiled(100 * X)
            compiled(X)
            model.load_state_dict(start)
            compiled(X)
        expected = fresh()
        expected(X)
        assert torch.equal(model[0].input_quantizer.scale, expected[0].input_quantizer.scale)
        with torch.no_grad():
            assert torch.equal(compiled(X), expected(X))

    def test_export_of_an_input_without_a_scale_is_refused_and_the_cure_works(self):
        model = fresh().eval()
        with pytest.raises(Exception, match=r"has no scale yet, as far as torch.export can see.*calibrate"):
            torch.export.export(model, (X,))
        qsam.calibrate(model, [X])
        assert torch.equal(torch.export.export(model, (X,)).module()(X), model(X))

    def test_an_ensemble_under_vmap_has_each_members_sign(self):
        models = [calibrated(), fresh()]
        qsam.calibrate(models[1], [X.abs()])
        parameters, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0])

        def run(p, b):
            return torch.func.functional_call(base, (p, b), (X.abs(),))

        got = torch.func.vmap(run)(parameters, buffers)
        for out, model in zip(got, models, strict=True):
            torch.testing.assert_close(out, model(X.abs()))


class TestWeights:
    @pytest.mark.parametrize(("method", "change"), [(qsam.QAT, "load"), (qsam.SQuAT, "init")])
    def test_scales_that_no_checkpoint_brought_fit_the_weights_that_are_there(self, method, change):
        model, other = fresh(), mlp()
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(30)
        if change == "load":
            model.load_state_dict(other.state_dict(), strict=False)
        else:
            model.apply(lambda m: nn.init.uniform_(m.weight, -40, 40) if isinstance(m, nn.Linear) else None)
        weights = [model[i].weight.detach().clone() for i in (0, 2, 4)]
        optimizer = method(model, torch.optim.AdamW, lr=1e-3)
        assert_fits(model, weights)
        with torch.no_grad():
            for i in (0, 2, 4):
                model[i].weight.copy_(weights[i // 2] / 100)
        optimizer.sync_latents()
        assert_fits(model, [w / 100 for w in weights])

    def test_post_training_quantization_fits_the_weights_that_are_there(self):
        model = fresh()
        with torch.no_grad():
            model[2].weight.mul_(50)
        weights = [model[i].weight.detach().clone() for i in (0, 2, 4)]
        qsam.write_(model)
        assert_fits(model, weights)
        once = copy.deepcopy(model.state_dict())
        qsam.write_(model)
        assert all(torch.equal(a, b) for a, b in zip(once.values(), model.state_dict().values(), strict=True))

    def test_loaded_and_learned_scales_are_kept(self):
        model = calibrated()
        optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
        optimizer.step(lambda: MLP.loss(model, vectors(0)).backward())
        learned = model[2].weight_quantizer.scale.clone()
        with torch.no_grad():
            model[2].weight.mul_(1.5)
        optimizer.sync_latents()
        assert torch.equal(model[2].weight_quantizer.scale, learned)
        other = fresh()
        other.load_state_dict(model.state_dict())
        qsam.QAT(other, torch.optim.SGD, lr=0.1)
        assert torch.equal(other[2].weight_quantizer.scale, learned)


def assert_fits(model, weights):
    for i, w in zip((0, 2, 4), weights, strict=True):
        assert float((model[i].weight.detach() - w).norm() / w.norm()) < 0.12


class TestSetting:
    def test_the_promised_keywords_build_every_quantizer(self):
        setting = {"bits": 4, "signed": True, "granularity": "per_channel", "axis": 0, "group_size": None}
        for name in qsam.list_quantizers():
            try:
                q = build_quantizer(name, **setting)
            except ValueError as error:  # one for inputs only, or for one granularity: it says so by its name
                assert repr(name) in str(error)
            else:
                assert q.spec == Spec(**setting)

    def test_a_spec_is_frozen_and_an_alias_has_its_own_granularity(self):
        q = build_quantizer("per_channel", bits=4, granularity="per_tensor", axis=0)
        assert (type(q), q.granularity) == (LSQ, "per_channel")
        for frozen in (q, q.spec):
            with pytest.raises(AttributeError):
                frozen.bits = 3

    def test_any_quantizer_with_a_step_size_has_codes(self):
        class Thirds(qsam.Quantizer):
            def init_(self, x):
                pass

            def forward(self, x):
                return torch.round(x * 3).clamp(self.quant_min, self.quant_max) / 3

            def step_size(self, x):
                return torch.full((1,), 1 / 3)

        codes = Thirds(bits=3)(x := torch.tensor([-9.0, 0.4, 9.0])), Thirds(bits=3).codes(x)
        assert codes[1].dtype == torch.int8
        assert codes[1].tolist() == [-4, 1, 3]
        torch.testing.assert_close(codes[1] / 3, codes[0])

    def test_a_quantizer_without_a_grid_refuses_to_give_codes_and_says_what_it_lacks(self):
        with pytest.raises(TypeError, match=r"Identity has no integer codes: .*implements `step_size\(x\)`"):
            build_quantizer("identity", bits=4).codes(X)

    @pytest.mark.parametrize(
        ("name", "rowwise"), [("lsq", True), ("fixed_step", True), ("diffq", False), ("identity", False)]
    )
    def test_a_quantizer_says_whether_it_works_on_rows(self, name, rowwise):
        assert build_quantizer(name, bits=4, axis=0).rowwise is rowwise
        assert not build_quantizer(name, bits=4, granularity="per_channel", axis=1).rowwise
