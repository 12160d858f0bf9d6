"""A model's full-precision weights have one owner: how it goes, and how it hands them over."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import qsam
from tests.methods import (
    KINDS,
    METHODS,
    QUANTIZING,
    assert_on_grid,
    assert_same,
    everything,
    latents,
    scales_of,
    train,
    train_by_hand,
)
from tests.models import CONV, MLP

each_method = pytest.mark.parametrize("method", KINDS, ids=str)
each_quantizing = pytest.mark.parametrize("method", QUANTIZING, ids=str)
ON_GRID = "the model's weights are on the quantization grid already"


@contextlib.contextmanager
def no_collector():
    """Leave all freeing to reference counts."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def q(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- an optimizer that nothing refers to any more -----------------------------------------------------------------


def used(method, model):
    """Return an optimizer that has done all that a training does."""
    optimizer = method(model, **({"rho": 0.1} if method.perturbs else {}))
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    train(optimizer, model, CONV, 2)
    train_by_hand(method, optimizer, model, CONV, 2, start=2)
    optimizer.diagnostics()
    train(optimizer, model, CONV, 2, start=4)
    optimizer.load_state_dict(optimizer.state_dict())
    with optimizer.latents():
        pass
    try:  # not pytest.raises, whose result holds the frames
        optimizer.step(lambda: 1 / 0)
    except ZeroDivisionError:
        pass
    assert optimizer.scales.param_groups
    scheduler.step()
    return optimizer


@pytest.mark.parametrize("method", [m for m in METHODS if str(m) in ("sam", "qat", "squat-fused")], ids=str)
def test_an_optimizer_is_freed_as_soon_as_nothing_refers_to_it(method):
    """By reference counts alone: no cycle keeps a copy of the weights until Python's collector runs."""
    used(method, method.model(CONV))  # the first use of a kernel compiles it, and compilers leave cycles
    model = method.model(CONV)
    with no_collector():
        optimizer = used(method, model)
        kept = [weakref.ref(optimizer), *(weakref.ref(slot.latent) for slot in optimizer._latents.slots)]
        kept += [weakref.ref(tensor) for entry in optimizer.base.state.values() for tensor in entry.values()]
        del optimizer
        assert [ref() for ref in kept] == [None] * len(kept)
        second = method(model)
    with pytest.warns(UserWarning, match=ON_GRID) if method.quantizes else contextlib.nullcontext():
        train(second, model, CONV, 1)
    assert_on_grid(second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_its_memory_is_free_at_once():
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)]).cuda()
    qsam.quantize_(model, activations=None)
    x = torch.randn(8, 256, device="cuda")

    def run():
        optimizer = qsam.SQuAT(model, AdamW, lr=1e-3)
        optimizer.step(lambda: model(x).square().mean().backward())
        optimizer.zero_grad()

    with no_collector():
        run()  # what torch's libraries keep for good
        before = torch.cuda.memory_allocated()
        run()
        assert torch.cuda.memory_allocated() == before


def test_the_scales_of_an_optimizer_that_is_gone_say_so():
    optimizer = qsam.SQuAT(MLP.quantized(), SGD, lr=0.1)
    scales = optimizer.scales
    del optimizer
    for use in (scales.step, lambda: scales.param_groups):
        with pytest.raises(RuntimeError, match=r"the optimizer of these scales is gone: keep it, and use its"):
            use()


def test_the_scales_of_a_copy_are_its_own():
    model = MLP.quantized()
    optimizer = qsam.SQuAT(model, SGD, lr=0.1)
    for other in (copy.deepcopy((model, optimizer))[1], pickle.loads(pickle.dumps((model, optimizer)))[1]):
        assert other.scales.owner is other
    assert optimizer.scales.owner is optimizer
    assert optimizer.scales is optimizer.scales  # a GradScaler knows optimizers by identity


# --- an optimizer that hands its model over -----------------------------------------------------------------------


@each_quantizing
def test_release_hands_the_model_over_with_its_scales_and_latents(method):
    model = method.model(MLP)
    first = method(model)
    train(first, model, MLP, 2)
    with pytest.raises(RuntimeError, match=r"another qsam optimizer owns .*: call its release\(\) first"):
        method(model)
    w, s, before = latents(first, model), scales_of(copy.deepcopy(model)), q(model)
    first.release()
    assert_same(q(model), before)
    second = method(model)
    assert_same(latents(second, model), w)
    assert_same(scales_of(model), s)
    assert_same(q(model), before)
    train(second, model, MLP, 2)  # no word of rounded weights
    assert_on_grid(second)


def test_an_instance_of_a_base_goes_on_as_if_nothing_had_been_handed_over():
    ends = []
    for handed_over in (False, True):
        model = MLP.quantized(activations=None)
        own = [p for name, p in model.named_parameters() if "quantizer" not in name]
        inner = AdamW(own, lr=1e-3)
        optimizer = qsam.SAQ(model, inner, scale_lr=0.1)
        train(optimizer, model, MLP, 3)
        if handed_over:
            optimizer.release()
            optimizer = qsam.SAQ(model, inner, scale_lr=0.1)
        train(optimizer, model, MLP, 3, start=3)
        ends.append(latents(optimizer, model) | q(model))
    assert_same(*ends)


def test_latents_are_handed_over_in_their_own_precision():
    model = MLP.quantized(activations=None).to(torch.bfloat16)
    first = qsam.QAT(model, SGD, lr=0.1)
    for slot in first._latents.slots:
        slot.latent.data.add_(2.0**-20)
    first._latents.write()
    w = [slot.latent.detach().clone() for slot in first._latents.slots]
    first.release()
    del first
    second = qsam.QAT(model, SGD, lr=0.1)
    assert all(torch.equal(slot.latent, before) for slot, before in zip(second._latents.slots, w, strict=True))
    assert not any(torch.equal(t, t.to(torch.bfloat16).float()) for t in w)


def test_a_weight_that_was_written_after_the_release_is_taken_as_it_is():
    model = MLP.quantized(activations=None)
    first = qsam.QAT(model, SGD, lr=0.1)
    train(first, model, MLP, 2)
    w = latents(first, model)
    first.release()
    merged = torch.randn_like(model[2].weight)
    model[2].load_state_dict({"weight": merged, "bias": model[2].bias}, strict=False)
    second = qsam.QAT(model, SGD, lr=0.1)
    assert_same(latents(second, model), w | {"2.weight": merged})


def test_what_was_left_goes_to_one_optimizer_only():
    model = MLP.quantized(activations=None)
    first = qsam.QAT(model, SGD, lr=0.1)
    first.release()
    second = qsam.QAT(model, SGD, lr=0.1)
    train(second, model, MLP, 2)
    w = latents(second, model)
    with pytest.raises(RuntimeError, match=r"call its release\(\) first"):
        qsam.QAT(model, SGD, lr=0.1)
    assert_same(latents(second, model), w)
    del second
    third = qsam.QAT(model, SGD, lr=0.1)
    with pytest.warns(UserWarning, match=ON_GRID):
        train(third, model, MLP, 1)


HANDED_OVER = (
    r"this optimizer has handed its model over \(release\): it can no longer be used\. Go on with the optimizer"
)


@pytest.mark.parametrize("method", [m for m in METHODS if str(m) in ("sam", "squat-next_batch")], ids=str)
def test_an_optimizer_that_was_released_refuses_every_verb(method):
    model = method.model(MLP)
    first = method(model)
    train(first, model, MLP, 1)
    state = first.state_dict()
    first.release()
    second = method(model)
    before = everything(second, model)
    verbs = {
        "step": first.step,
        "closure": lambda: first.step(lambda: MLP.loss(model, MLP.batch(0)).backward()),
        "first_pass": lambda: first.first_pass().__enter__(),
        "latents": lambda: first.latents().__enter__(),
        "sync_latents": first.sync_latents,
        "release": first.release,
        "state_dict": first.state_dict,
        "load_state_dict": lambda: first.load_state_dict(state),
        "add_param_group": lambda: first.add_param_group({"params": []}),
        "diagnostics": first.diagnostics,
        "sharpness": lambda: qsam.sharpness(first, lambda: None, progress=False),
    }
    for name, verb in verbs.items():
        with pytest.raises(RuntimeError, match=HANDED_OVER):
            verb()
        assert_same(everything(second, model), before), name
    copied = copy.deepcopy((model, first, second))
    train(copied[2], copied[0], MLP, 1)  # the copy of the released one does not claim the copied model
    train(second, model, MLP, 1)


def test_inside_a_block_nothing_is_released():
    model = MLP.quantized()
    optimizer = qsam.SAQ(model, SGD, lr=0.1)
    with optimizer.latents(), pytest.raises(RuntimeError, match=r"release\(\) inside the block latents\(\)"):
        optimizer.release()
    train(optimizer, model, MLP, 1)


@pytest.mark.parametrize("verb", [qsam.write_, qsam.dequantize_], ids=lambda verb: verb.__name__)
def test_after_a_release_the_model_belongs_to_nobody(verb):
    model = MLP.quantized()
    optimizer = qsam.QAT(model, SGD, lr=0.1)
    train(optimizer, model, MLP, 1)
    weights = {name: p.clone() for name, p in q(model).items() if name.endswith("weight")}
    optimizer.release()
    verb(model)
    assert_same({name: p for name, p in q(model).items() if name in weights}, weights)
