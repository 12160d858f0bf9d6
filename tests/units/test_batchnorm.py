"""reestimate_batchnorm: closed forms, torch's own update_bn as an oracle, and everything that it must leave alone."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.optim import SGD
from torch.optim.swa_utils import update_bn

import qsam
from tests.methods import assert_on_grid, assert_same, buffers_of, closure_of, everything, train
from tests.models import CONV, EVERYWHERE

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NORMS = {
    "BatchNorm1d": (nn.BatchNorm1d, (6, 4)),
    "BatchNorm1d of sequences": (nn.BatchNorm1d, (6, 4, 3)),
    "BatchNorm3d": (nn.BatchNorm3d, (6, 4, 3, 3, 2)),
    "SyncBatchNorm": (nn.SyncBatchNorm, (6, 4, 3, 3)),
    "timm's BatchNormAct2d": (lambda c: pytest.importorskip("timm.layers").BatchNormAct2d(c), (6, 4, 3, 3)),
    "momentum None": (lambda c: nn.BatchNorm2d(c, momentum=None), (6, 4, 3, 3)),
    "not affine": (lambda c: nn.BatchNorm2d(c, affine=False), (6, 4, 3, 3)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_statistics(norm, *batches):
    """Assert the plain averages of mean and unbiased variance per channel, computed in double precision."""
    rows = [batch.double().movedim(1, 0).flatten(1) for batch in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([r.mean(1) for r in rows]).mean(0).float())
    torch.testing.assert_close(norm.running_var, torch.stack([r.var(1) for r in rows]).mean(0).float())
    assert norm.num_batches_tracked == len(batches)


def images(count, size=8):
    return [CONV.batch(i)["x"][:size] for i in range(count)]


def trained():
    model = CONV.quantized()
    optimizer = qsam.SQuAT(model, SGD, lr=0.1)
    train(optimizer, model, CONV, 2)
    return model, optimizer


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def facts(model):
    """Return every mode and momentum."""
    return [(name, m.training, getattr(m, "momentum", None)) for name, m in model.named_modules()]


class TestClosedForms:
    @pytest.mark.parametrize(("build", "shape"), NORMS.values(), ids=NORMS)
    def test_the_statistics_are_the_plain_average_over_the_batches_whatever_their_sizes(self, build, shape):
        norm, batches = build(4), [3 + n * torch.randn(n, *shape[1:]) for n in (6, 2, 4)]
        norm(torch.randn(shape))  # what it held before does not count
        for count in (1, 3):
            qsam.reestimate_batchnorm(norm, batches[:count])
            assert_statistics(norm, *batches[:count])

    def test_a_layer_that_is_called_twice_averages_its_calls(self):
        norm, x = nn.BatchNorm1d(4, affine=False), 5 * torch.randn(6, 4)
        qsam.reestimate_batchnorm(nn.Sequential(norm, nn.Flatten(), norm), [x])
        assert_statistics(norm, x, (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt())

    def test_of_a_quantized_model_they_are_those_of_the_quantized_layer(self):
        model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
        x = images(1)[0]
        qsam.quantize_(model, bits=2, rules=EVERYWHERE)
        qsam.calibrate(model, [x])
        qsam.write_(model)
        qsam.reestimate_batchnorm(model.train(), [x])
        conv = model[1]
        y = nn.functional.conv2d(conv.input_quantizer(x), conv.weight, conv.bias)
        assert len(conv.weight.unique()) <= 4
        assert_statistics(model[2], y.detach())

    def test_without_dropout_it_is_what_torch_does_for_averaged_models(self):
        model = without_dropout(CONV.quantized())
        twin = copy.deepcopy(model)
        update_bn(images(3), twin)
        qsam.reestimate_batchnorm(model, images(3))
        assert_same(buffers_of(model), buffers_of(twin))

    def test_it_ends_the_lag_of_the_statistics_behind_the_weights(self):
        """The law that the function is there for: evaluated on the batch it saw, the model computes as in training."""
        model = without_dropout(trained()[0])
        norms, x = (model[1], model[5]), images(1)[0]
        for norm in norms:
            norm.running_mean.add_(1)  # a lag
        qsam.reestimate_batchnorm(model, [x])
        n = x.numel() // x.shape[1]
        for norm in norms:
            norm.running_var.mul_((n - 1) / n)  # training divides by the biased variance
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), model.train()(x))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x


class TestLeftAlone:
    @pytest.mark.parametrize("training", [True, False])
    def test_all_but_the_statistics(self, training):
        model, optimizer = trained()
        model.train(training)
        model[3].train(not training)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before, modes, generator = everything(optimizer, model), facts(model), torch.get_rng_state()
        qsam.reestimate_batchnorm(model, images(3))
        after = everything(optimizer, model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"model.{i}.{name}" for i in (1, 5) for name in STATISTICS}
        assert facts(model) == modes
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
        assert not any(norm.running_mean.requires_grad for norm in (model[1], model[5]))
        assert_on_grid(optimizer)
        optimizer.zero_grad()
        train(optimizer, model.train(), CONV, 2)  # the guard has seen no foreign write

    def test_other_buffers_and_norms_that_keep_no_running_statistics(self):
        model = nn.Sequential(
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.InstanceNorm2d(4, track_running_stats=True),
            nn.BatchNorm2d(4),
            Counter(),
        )
        qsam.reestimate_batchnorm(model, images(2))
        assert torch.equal(model[1].running_mean, torch.zeros(4))
        assert model[2].num_batches_tracked == 2
        assert model[3].count == 0

    def test_the_dropout_inside_a_norm_of_timms(self):
        layers = pytest.importorskip("timm.layers")
        norm, after, x = layers.BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(0.5)), nn.BatchNorm2d(4), images(1)[0]
        qsam.reestimate_batchnorm(nn.Sequential(norm, after), [x])
        assert_statistics(after, layers.BatchNormAct2d(4).train()(x).detach())

    def test_frozen_norms_of_a_model_in_training_mode_stay(self):
        model = CONV.quantized()
        model[1].eval()
        before = tensors(model[1])
        qsam.reestimate_batchnorm(model, images(2))
        assert_same(tensors(model[1]), before)
        assert not model[1].training
        assert model[5].num_batches_tracked == 2
        qsam.reestimate_batchnorm(model.eval(), images(2))  # here nothing tells it from the others
        assert model[1].num_batches_tracked == 2


class Poisoned(Exception):
    """Raised by a failing data set."""


class OnlyFirst(nn.Sequential):
    """Runs its first child only."""

    def forward(self, x):
        return self[0](x)


def poisoned():
    yield from images(2)
    raise Poisoned("the disk is gone")


def infinite():
    x = images(1)[0]
    x[0, 0, 0, 0] = torch.inf
    return [*images(2), x]


def one():
    return images(1)


WRONG = {
    "data that fail": (CONV.build, poisoned, Poisoned, "the disk is gone"),
    "no batch": (CONV.build, list, ValueError, "`batches` is empty: reestimate_batchnorm needs at least one"),
    "no finite data": (
        CONV.build,
        infinite,
        ValueError,
        "BatchNorm '1' over these batches are not finite, and the old",
    ),
    "a last batch of one value per channel": (
        lambda: nn.Sequential(nn.BatchNorm2d(4)),
        lambda: [*images(2), torch.randn(1, 4, 1, 1)],
        ValueError,
        "Expected more than 1 value per channel when training",  # torch's own
    ),
    "a norm that no batch reaches": (
        lambda: OnlyFirst(CONV.build(), nn.ModuleDict({"aux": nn.BatchNorm2d(4)}).requires_grad_(False)),
        one,
        ValueError,
        r"no batch reached the BatchNorm '1.aux': give batches that use it, or leave it out \(in a model in training",
    ),
    "no norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        one,
        ValueError,
        "no BatchNorm with running statistics: leave reestimate_batchnorm out",
    ),
    "frozen norms only": (
        lambda: nn.Sequential(nn.BatchNorm2d(4).eval()),
        one,
        ValueError,
        "every BatchNorm is in eval mode inside a model in training mode, and so frozen: call model.eval\\(\\) before",
    ),
    "batches that are none": (CONV.build, lambda: 3, TypeError, "`batches` must be an iterable of inputs, .* got 3"),
}


@pytest.mark.parametrize(("build", "batches", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_refused_and_leaves_everything_as_it_was(build, batches, kind, message):
    model = build()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.num_batches_tracked.fill_(7)
    before, modes = tensors(model), facts(model)
    with pytest.raises(kind, match=message):
        qsam.reestimate_batchnorm(model, batches())
    assert_same(tensors(model), before)
    assert facts(model) == modes


@pytest.mark.parametrize("model", [[nn.BatchNorm1d(4)], None])
def test_the_model_must_be_a_module(model):
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got (list|NoneType)"):
        qsam.reestimate_batchnorm(model, [])


def inside(block):
    return pytest.raises(RuntimeError, match=rf"reestimate_batchnorm\(\) inside the block {block}\(\)")


@pytest.mark.parametrize("block", ["first_pass", "perturbed", "latents"])
def test_inside_a_block_of_the_optimizer_it_is_refused(block):
    model, optimizer = trained()
    with optimizer.first_pass():
        CONV.loss(model, CONV.batch(0)).backward()
    with getattr(optimizer, block)():
        with inside(block):
            qsam.reestimate_batchnorm(model, images(1))
        CONV.loss(model, CONV.batch(0)).backward()


def test_inside_the_perturbed_pass_of_a_float_model_it_is_refused():
    model = CONV.build()
    optimizer = qsam.SAM(model, SGD, lr=0.1)
    closure = closure_of(optimizer, model, CONV, CONV.batch(0))
    passes = []

    def nested():
        passes.append(1)
        if len(passes) == 2:
            qsam.reestimate_batchnorm(model, images(1))
        return closure()

    with inside("perturbed"):
        optimizer.step(nested)


def test_noise_quantizers_do_not_draw_for_it():
    model = CONV.quantized(weights="stochastic", activations=None)
    train(qsam.SQuAT(model, SGD, lr=0.1), model, CONV, 1)
    weight, x = model[0].weight.detach().clone(), images(1)[0]
    qsam.reestimate_batchnorm(model, [x])
    assert torch.equal(model[0].weight, weight)
    assert_statistics(model[1], nn.functional.conv2d(x, weight, padding=1))


def test_inputs_without_a_scale_say_so_and_pass_as_float():
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    qsam.quantize_(model)
    with pytest.warns(UserWarning, match=r"the input of '0', and of every other layer .* Call qsam.calibrate"):
        qsam.reestimate_batchnorm(model, images(1))
    assert not model[0].input_quantizer.calibrated


class TestWrappers:
    @pytest.fixture
    def process_group(self):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        yield
        distributed.destroy_process_group()

    def test_a_compiled_model_and_one_process_of_data_parallel_training_are_the_model_alone(self, process_group):
        alone, compiled, parallel = (CONV.quantized() for _ in range(3))
        qsam.reestimate_batchnorm(alone, images(3))
        qsam.reestimate_batchnorm(torch.compile(compiled, backend="eager"), images(3))
        assert_same(buffers_of(compiled), buffers_of(alone))
        qsam.reestimate_batchnorm(nn.parallel.DistributedDataParallel(parallel), images(3))
        for name, value in buffers_of(alone).items():
            torch.testing.assert_close(parallel.get_buffer(name), value)

    def test_in_data_parallel_training_no_batch_anywhere_is_refused(self, process_group):
        with pytest.raises(ValueError, match="`batches` is empty: reestimate_batchnorm needs at least one batch"):
            qsam.reestimate_batchnorm(nn.parallel.DistributedDataParallel(CONV.quantized()), [])

    def test_a_sharded_model_is_refused(self, process_group):
        model = CONV.quantized()
        distributed.fsdp.fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match=r"the model is sharded, .* gather its state_dict, load it"):
            qsam.reestimate_batchnorm(model, images(1))
