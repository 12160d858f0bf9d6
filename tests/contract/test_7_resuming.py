"""Contract 7: resuming is as if nothing had stopped; a checkpoint of something else is refused and changes nothing."""

import copy
import io

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

import qsam
from tests.methods import (
    METHODS,
    SAM,
    SAQ,
    SQUAT,
    assert_on_grid,
    assert_same,
    built,
    each_kind,
    each_quantizing,
    everything,
    latents,
    train,
)
from tests.models import CONV, MLP, TIED


def through_a_file(state):
    """Save and load with ``weights_only=True``, which refuses all but tensors and plain Python."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain_types(value):
    if isinstance(value, dict):
        return set().union(*(plain_types(v) for v in [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return {type(value)}.union(*(plain_types(v) for v in value))
    return {type(value)}


def quantized_latents(optimizer):
    return {slot.path: slot.latent.detach().clone() for slot in optimizer._latents.slots}


def assert_resumes(method, task, stop, base=AdamW, build=None):
    """Model first, then optimizer; the random state and the scheduler of OneCycle with them."""

    def start():
        model = method.model(task) if build is None else build()
        optimizer = method(model, base)
        return model, optimizer, OneCycleLR(optimizer, max_lr=0.01, total_steps=10, cycle_momentum=False)

    def go(model, optimizer, scheduler, steps):
        losses = []
        for i in range(steps.start, steps.stop):
            losses += train(optimizer, model, task, 1, start=i)
            scheduler.step()
        return losses

    first = start()
    torch.manual_seed(0)
    go(*first, range(stop))
    saved = through_a_file(([one.state_dict() for one in first], torch.get_rng_state()))
    losses = go(*first, range(stop, stop + 3))
    second = start()
    for one, state in zip(second, saved[0], strict=True):
        one.load_state_dict(state)
    torch.set_rng_state(saved[1])
    assert go(*second, range(stop, stop + 3)) == losses
    assert_same(everything(second[1], second[0]), everything(first[1], first[0]))
    assert second[1].steps == first[1].steps
    assert [g["lr"] for g in second[1].param_groups] == [g["lr"] for g in first[1].param_groups]


@each_kind
def test_a_state_dict_holds_tensors_and_plain_types_only(method):
    model, optimizer = built(method, CONV)
    for _ in range(2):
        found = plain_types(optimizer.state_dict())
        assert found <= {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
        train(optimizer, model, CONV, 1)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_resuming_with_buffers_random_numbers_and_a_scheduler_is_as_if_nothing_had_stopped(method):
    """Every option of a step is drawn in test_interactions.py, with a model that has neither dropout nor buffers."""
    assert_resumes(method, CONV, 3)


@pytest.mark.parametrize("base", [SGD, Adagrad], ids=lambda base: base.__name__)
def test_resuming_a_base_with_no_state_or_with_state_from_the_start(base):
    assert_resumes(SQUAT, MLP, 2, base)


def test_resuming_needs_no_second_calibration():
    """The new model's inputs have neither scale nor sign before the checkpoint gives them."""

    def uncalibrated():
        model = CONV.build()
        qsam.quantize_(model)
        return model

    assert_resumes(SAQ, CONV, 2, build=uncalibrated)


@each_quantizing
def test_resuming_in_a_new_process_starts_from_other_weights(method):
    """Nothing of the new model's initial weights survives, in frozen weights neither."""

    def other(seed=iter(range(9))):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(next(seed))
            model = torch.nn.Sequential(
                torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
            )
        model[2].weight.requires_grad_(False)
        qsam.quantize_(model, bits=2)
        qsam.calibrate(model, [MLP.batch(0)["x"]])
        return model

    assert_resumes(method, MLP, 2, build=other)


def test_the_latents_of_the_checkpoint_win_over_the_model():
    model, optimizer = built(SAQ, MLP)
    train(optimizer, model, MLP, 2)
    saved = through_a_file(optimizer.state_dict())
    expected = quantized_latents(optimizer)
    train(optimizer, model, MLP, 2, start=2)
    optimizer.load_state_dict(saved)
    assert_same(quantized_latents(optimizer), expected)
    assert_on_grid(optimizer)


def test_state_dict_hooks_run():
    optimizer = SAQ(SAQ.model(MLP))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("saved") or {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: seen.append("load") or {k: v for k, v in state.items() if k != "extra"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state_dict=state)
    assert seen == ["save", "saved", "load", "loaded"]


PLAIN = r"this is a checkpoint of the bare base optimizer: the latents start from the model's present weights\."


@each_kind
def test_a_checkpoint_of_the_bare_base_loads_with_one_warning(method):
    model = MLP.build()
    bare = AdamW(model.parameters(), lr=5e-4)
    for i in range(3):
        bare.zero_grad()
        MLP.loss(model, MLP.batch(i)).backward()
        bare.step()
    saved, weights = through_a_file(bare.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    if method.quantizes:
        qsam.quantize_(model)
        qsam.calibrate(model, [MLP.batch(0)["x"]])
    optimizer = method(model)
    with pytest.warns(UserWarning, match=PLAIN) as caught:
        optimizer.load_state_dict(saved)
    assert len(caught) == 1
    assert_on_grid(optimizer)
    by_name = dict(model.named_parameters())
    names = list(weights)
    for i, entry in saved["state"].items():
        assert torch.equal(optimizer.state[by_name[names[i]]]["exp_avg"], entry["exp_avg"])
    assert optimizer.param_groups[0]["lr"] == 5e-4
    assert optimizer.steps == 0
    train(optimizer, model, MLP, 2)
    assert_on_grid(optimizer)


def test_a_bare_checkpoint_takes_the_present_weights_as_latents():
    model, optimizer = built(SAQ, MLP)
    weights = {name: t.clone() for name, t in MLP.build().state_dict().items()}
    weights["0.weight"] += 1.0
    model.load_state_dict(weights, strict=False)
    with pytest.warns(UserWarning, match=PLAIN):
        optimizer.load_state_dict(AdamW(MLP.build().parameters()).state_dict())
    assert_same(latents(optimizer, model), weights)


def quantized(**options):
    return lambda method: method(method.model(MLP, **options))


def of_a_float_layer(method):
    model = MLP.build()
    qsam.quantize_(model, rules=[("2.weight", None), ("*", {})])
    return method(model)


def of_another_model(method):
    return method(method.model(CONV))


def of_other_groups(method):
    model = method.model(MLP)
    own = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1 and p.shape != (1,)]
    return method(model, params=[{"params": own}, {"params": rest}])


MISFITS = [
    (SAQ, quantized(bits=2), r"is LSQ\(bits=4.*\) here and LSQ\(bits=2.*\) in the checkpoint: call quantize_ as"),
    (SAQ, quantized(granularity="per_channel"), r"per_tensor\) here and LSQ\(bits=4, signed, per_channel\) in"),
    (SAQ, quantized(activation_bits=4), r"'0\.input' is LSQ\(bits=8\) here and LSQ\(bits=4\) in the checkpoint"),
    (SAQ, of_a_float_layer, r"parameter groups|parameters in the checkpoint|and float in the checkpoint"),
    (SAQ, of_another_model, r"group 0 has 9 parameters in the checkpoint and 6 here: it is of another model"),
    (SAQ, of_other_groups, r"the checkpoint has \d parameter groups, this optimizer \d: build it as"),
    (SAM, of_another_model, r"group 0 has 9 parameters in the checkpoint and 6 here: it is of another model"),
    (SAM, of_other_groups, r"the checkpoint has \d parameter groups, this optimizer \d: build it as"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "other", "message"), MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(method, other, message):
    assert_refused_and_unchanged(method, through_a_file(other(method).state_dict()), ValueError, message)


def assert_refused_and_unchanged(method, state, kind, message):
    """The optimizer that refuses a state_dict goes on as one that was never given it."""
    ends = []
    for disturbed in (True, False):
        model, optimizer = trained(method)
        if disturbed:
            before, groups = everything(optimizer, model), plain_groups(optimizer)
            with pytest.raises(kind, match=message):
                optimizer.load_state_dict(state)
            assert_same(everything(optimizer, model), before)
            assert plain_groups(optimizer) == groups
        train(optimizer, model, MLP, 1, start=2)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


def test_a_copy_owns_the_weights_of_its_model():
    model = SAQ.model(TIED, activations=None)
    optimizer = SAQ(model)
    other_model, other = copy.deepcopy((model, optimizer))
    with pytest.raises(RuntimeError, match="another qsam optimizer owns the weights of this model"):
        SAQ(other_model)
    qsam.dequantize_(other_model, other)
    SAQ(other_model)
    train(optimizer, model, TIED, 1)


def test_a_copy_of_the_model_alone_belongs_to_nobody():
    model, optimizer = built(SAQ, MLP)
    copied = copy.deepcopy(model)
    other = SAQ(copied)
    with pytest.warns(UserWarning, match="on the quantization grid already: training starts from rounded weights"):
        train(other, copied, MLP, 1)
    train(optimizer, model, MLP, 1)


def trained(method, base=Adam, steps=2):
    model, optimizer = built(method, MLP, base)
    train(optimizer, model, MLP, steps)
    return model, optimizer


def plain_groups(optimizer):
    return copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])


def newer(state):
    state["param_groups"][0]["qsam_format"] = 2
    return ValueError, r"the checkpoint has qsam_format 2; this qsam reads 1: install a newer qsam\."


def a_list(state):
    state["param_groups"] = [1, 2]
    return ValueError, r"the checkpoint's 'param_groups' is no list of groups: it is not an optimizer's state_dict\."


def swapped(state):
    """The same parameters in another order: state would land in the wrong ones."""
    own = state["param_groups"][0]["qsam_parameters"]
    state["param_groups"][0]["qsam_parameters"] = dict(reversed(own.items()))
    return ValueError, (
        r"'0\.weight' here has the place of '4\.bias' in the checkpoint: it is of another model, or its "
        r"parameters were given in another order\."
    )


def another_shape(state):
    state["param_groups"][0]["qsam_parameters"]["2.bias"] = "11"
    return ValueError, r"'2\.bias' has shape 12 here and 11 in the checkpoint: another model\."


def another_base(state):
    state["param_groups"][0]["qsam_base_class"] = "Muon"
    return (
        ValueError,
        r"the checkpoint is of the base optimizer Muon, this one is Adam: build it as it was built then\.",
    )


def without_a_latent(state):
    del state["state"][2]["qsam_latent"]
    return ValueError, (
        r"the checkpoint has no latent of '2\.weight': its full-precision weights are lost\. "
        r"Save the whole optimizer\.state_dict\(\)\."
    )


def latent_of_another_shape(state):
    state["state"][2]["qsam_latent"] = torch.zeros(3, 3)
    return ValueError, r"a saved qsam_latent has shape \(3, 3\), its parameter \(12, 16\): another model\."


def no_state(state):
    del state["state"]
    return ValueError, r"the checkpoint has no 'state': it is not an optimizer's state_dict\."


def no_groups(state):
    del state["param_groups"]
    return ValueError, r"the checkpoint has no 'param_groups': it is not an optimizer's state_dict\."


FOREIGN = [newer, a_list, no_state, no_groups, swapped, another_shape, another_base, without_a_latent]
FOREIGN += [latent_of_another_shape]


@pytest.mark.parametrize("spoil", FOREIGN, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("method", [SAM, SQUAT], ids=str)
def test_a_foreign_state_dict_is_refused_and_changes_nothing(method, spoil):
    if spoil in (without_a_latent, latent_of_another_shape) and not method.quantizes:
        return  # it has no latents
    _, other = trained(method, steps=3)
    state = copy.deepcopy(other.state_dict())
    assert_refused_and_unchanged(method, state, *spoil(state))


@pytest.mark.parametrize("thing", [None, [1, 2], torch.zeros(3)], ids=["None", "a list", "a tensor"])
def test_what_is_no_dict_is_refused(thing):
    _, optimizer = trained(SAQ, steps=0)
    with pytest.raises(
        TypeError,
        match=rf"`state_dict` must be a dict, what optimizer\.state_dict\(\) returned, got {type(thing).__name__}\.",
    ):
        optimizer.load_state_dict(thing)


def test_a_checkpoint_without_the_newer_entries_still_loads():
    """Those of before the format was written into the optimizer's state."""
    model, optimizer = trained(SAQ)
    state = copy.deepcopy(optimizer.state_dict())
    for key in ("qsam_format", "qsam_parameters", "qsam_base_class"):
        del state["param_groups"][0][key]
    before = everything(optimizer, model)
    optimizer.load_state_dict(state)
    assert_same(everything(optimizer, model), before)
