"""Contract 7, and the parts of 1 that concern it: what is saved, and that resuming is as if nothing had stopped."""

import copy
import io

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW

import qsam
from qsam.optim import QAT, SAQ
from tests.models import BERT, CONV, MLP, TIED
from tests.optim.methods import (
    METHODS,
    PERTURBING,
    QUANTIZING,
    assert_on_grid,
    assert_same,
    everything,
    latents,
    long_but,
    train,
)

each_method = pytest.mark.parametrize("method", METHODS, ids=str)
each_quantizing = pytest.mark.parametrize("method", QUANTIZING, ids=str)
BASES = {AdamW: {}, SGD: {"momentum": 0.9}}


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


def resumed(method, task, saved, base, build=None, **options):
    """Return a new model and optimizer that go on from ``saved``: model first, then optimizer."""
    model = method.model(task) if build is None else build()
    optimizer = method(model, base, **BASES.get(base, {}), **options)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    return model, optimizer


def quantized_latents(optimizer):
    return {slot.path: slot.latent.detach().clone() for slot in optimizer._latents.slots}


def snapshot(model, optimizer):
    return through_a_file(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    )


def assert_resumes(method, task, stop, base=AdamW, build=None, steps=3, **options):
    model = method.model(task) if build is None else build()
    optimizer = method(model, base, **BASES.get(base, {}), **options)
    torch.manual_seed(0)
    train(optimizer, model, task, stop)
    saved = snapshot(model, optimizer)
    losses = train(optimizer, model, task, steps, start=stop)
    new_model, new = resumed(method, task, saved, base, build, **options)
    assert train(new, new_model, task, steps, start=stop) == losses
    assert_same(everything(new, new_model), everything(optimizer, model))
    assert new.steps == optimizer.steps


@each_method
def test_a_state_dict_holds_tensors_and_plain_types_only(method):
    model = method.model(CONV)
    optimizer = method(model)
    for _ in range(2):
        found = plain_types(optimizer.state_dict())
        assert found <= {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
        train(optimizer, model, CONV, 1)


@each_method
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
@pytest.mark.parametrize("stop", [pytest.param(0, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)])
def test_resuming_is_as_if_nothing_had_stopped(method, base, stop):
    """3 and 4 are the two phases of ``next_batch``."""
    assert_resumes(method, CONV, stop, base)


@pytest.mark.parametrize(
    "method", long_but([m for m in METHODS if str(m) in {"qat", "squat-same_batch"}], METHODS), ids=str
)
def test_resuming_a_bert_is_as_if_nothing_had_stopped(method):
    assert_resumes(method, BERT, 2, steps=2)


@pytest.mark.parametrize("method", PERTURBING, ids=str)
@pytest.mark.parametrize(
    "options",
    long_but([{"every": 3}], [{"every": 3}, {"start": 3}, {"max_grad_norm": 0.5}, {"perturb": "all"}]),
    ids=str,
)
def test_resuming_keeps_the_place_of_every_and_start(method, options):
    assert_resumes(method, MLP, 2, **options)


@pytest.mark.parametrize("method", [m for m in METHODS if m.alternates], ids=str)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resuming_keeps_the_place_of_a_period(method, stop):
    assert_resumes(method, CONV, stop, steps=4, period=3)


@each_method
@pytest.mark.parametrize("base", [SGD, Adagrad], ids=lambda base: base.__name__)
def test_resuming_a_base_with_no_state_or_with_state_from_the_start(method, base):
    model = method.model(MLP)
    optimizer = method(model, base)
    train(optimizer, model, MLP, 2)
    saved = snapshot(model, optimizer)
    train(optimizer, model, MLP, 2, start=2)
    new_model = method.model(MLP)
    new = method(new_model, base)
    new_model.load_state_dict(saved["model"])
    new.load_state_dict(saved["optimizer"])
    train(new, new_model, MLP, 2, start=2)
    assert_same(everything(new, new_model), everything(optimizer, model))


@each_quantizing
@pytest.mark.long
def test_resuming_needs_no_second_calibration(method):
    """The new model's inputs have neither scale nor sign before the checkpoint gives them."""

    def uncalibrated():
        model = CONV.build()
        qsam.quantize_(model)
        return model

    assert_resumes(method, CONV, 2, build=uncalibrated)


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


@each_quantizing
def test_the_latents_of_the_checkpoint_win_over_the_model(method):
    model = method.model(MLP)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    saved = through_a_file(optimizer.state_dict())
    expected = quantized_latents(optimizer)
    train(optimizer, model, MLP, 2, start=2)
    optimizer.load_state_dict(saved)
    assert_same(quantized_latents(optimizer), expected)
    assert_on_grid(optimizer)


@each_quantizing
def test_two_optimizers_that_loaded_one_state_share_no_latents(method):
    model = method.model(MLP)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    expected = quantized_latents(optimizer)
    other_model = method.model(MLP)
    other = method(other_model)
    other.load_state_dict(optimizer.state_dict())
    assert_same(quantized_latents(other), expected)
    train(other, other_model, MLP, 2)
    assert_same(quantized_latents(optimizer), expected)


@each_method
def test_the_state_is_a_view_by_parameter(method):
    model = method.model(MLP)
    optimizer = method(model)
    assert not optimizer.state
    train(optimizer, model, MLP, 2)
    named = dict(model.named_parameters())
    assert {id(p) for p in optimizer.state} == {id(p) for p in named.values()}
    for slot in optimizer._latents.slots:
        entry = optimizer.state[slot.parameter]
        assert torch.equal(entry["qsam_latent"], slot.latent)
        assert entry["exp_avg"].shape == slot.latent.shape


@each_method
def test_a_state_dict_goes_by_torch_s_own_format(method):
    """State by index over the groups in order, every parameter once."""
    model = method.model(MLP)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    state = optimizer.state_dict()
    indices = [i for group in state["param_groups"] for i in group["params"]]
    assert indices == list(range(len(indices)))
    assert set(state["state"]) == set(indices)
    live = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(live):
        own = {k: v for k, v in state["state"][i].items() if not k.startswith("qsam_scale_")}  # of a weight's scale
        assert all(value.shape in (p.shape, ()) for value in own.values() if isinstance(value, torch.Tensor))


@each_method
def test_state_dict_hooks_run(method):
    model = method.model(MLP)
    optimizer = method(model)
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


# --- a checkpoint of the bare base ---------------------------------------------------------------------------------

PLAIN = r"this is a checkpoint of the bare base optimizer: the latents start from the model's present weights\."


@each_method
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


@each_quantizing
def test_a_bare_checkpoint_takes_the_present_weights_as_latents(method):
    model = method.model(MLP)
    optimizer = method(model)
    weights = {name: t.clone() for name, t in MLP.build().state_dict().items()}
    weights["0.weight"] += 1.0
    model.load_state_dict(weights, strict=False)
    with pytest.warns(UserWarning, match=PLAIN):
        optimizer.load_state_dict(AdamW(MLP.build().parameters()).state_dict())
    assert_same(latents(optimizer, model), weights)


# --- refusals ------------------------------------------------------------------------------------------------------


def of_other_bits(method):
    return method(
        method.model(MLP, bits=2)
    ), r"is LSQ\(bits=4.*\) here and LSQ\(bits=2.*\) in the checkpoint: call quantize_ as"


def of_another_granularity(method):
    return method(
        method.model(MLP, granularity="per_channel")
    ), r"per_tensor\) here and LSQ\(bits=4, signed, per_channel\) in"


def of_other_input_bits(method):
    return method(
        method.model(MLP, activation_bits=4)
    ), r"'0\.input' is LSQ\(bits=8\) here and LSQ\(bits=4\) in the checkpoint"


def of_a_float_layer(method):
    model = MLP.build()
    qsam.quantize_(model, rules=[("2.weight", None), ("*", {})])
    return method(model), r"parameter groups|parameters in the checkpoint|and float in the checkpoint"


def of_another_model(method):
    return method(method.model(CONV)), r"group 0 has 9 parameters in the checkpoint and 6 here: it is of another model"


def of_other_shapes(method):
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(5)])
    qsam.quantize_(model, rules=[("[13].*", None), ("*", {})])
    own = [p for name, p in model.named_parameters() if name[0] in "024" and "quantizer" not in name]
    model[1].requires_grad_(False)
    model[3].requires_grad_(False)
    return method(model, params=own), r"'0\.weight' has shape 16x8 here and 4x4 in the checkpoint: another model\."


def of_other_groups(method):
    model = method.model(MLP)
    own = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1 and p.shape != (1,)]
    return method(
        model, params=[{"params": own}, {"params": rest}]
    ), r"the checkpoint has \d parameter groups, this optimizer \d: build it as"


REFUSED = [
    of_other_bits,
    of_another_granularity,
    of_other_input_bits,
    of_a_float_layer,
    of_another_model,
    of_other_shapes,
    of_other_groups,
]


@pytest.mark.parametrize(
    ("method", "other"),
    [
        pytest.param(
            method,
            other,
            id=f"{method}-{other.__name__}",
            marks=() if str(method) in {"sam", "saq", "squat-fused"} else pytest.mark.long,
        )
        for method in METHODS
        for other in (REFUSED if method.quantizes else [of_another_model, of_other_groups])
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(method, other):
    saving, message = other(method)
    model = saving._latents.root
    task = CONV if other is of_another_model else MLP
    if other is not of_other_shapes:
        train(saving, model, task, 2)
    saved = through_a_file(saving.state_dict())
    model = method.model(MLP)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    before, groups = (
        everything(optimizer, model),
        copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]),
    )
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(everything(optimizer, model), before)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    train(optimizer, model, MLP, 2, start=2)


@each_method
@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_what_is_no_state_dict_is_refused(method, key):
    optimizer = method(method.model(MLP))
    state = {k: v for k, v in optimizer.state_dict().items() if k != key}
    with pytest.raises(ValueError, match=rf"the checkpoint has no '{key}': it is not an optimizer's state_dict\."):
        optimizer.load_state_dict(state)


# --- torch.distributed.checkpoint ----------------------------------------------------------------------------------


def zero_gradients(optimizer):
    """Do what torch.distributed.checkpoint does before it loads: zero gradients, every lr 0, one step."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)


@each_method
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_a_step_with_every_lr_zero_creates_the_state_only(method, base):
    model = method.model(CONV)
    optimizer = method(model, base, **BASES[base])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    w = latents(optimizer, model)
    zero_gradients(optimizer)
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    assert optimizer.steps == 0
    assert optimizer.param_groups[0]["qsam_phase"] == method(method.model(CONV)).param_groups[0]["qsam_phase"]
    assert_same(model.state_dict(), before)
    assert_same(latents(optimizer, model), w)


@each_quantizing
def test_the_initialising_step_does_not_mind_that_the_model_was_just_loaded(method):
    model = method.model(MLP)
    optimizer = method(model)
    model.load_state_dict({name: t + 0.1 for name, t in model.state_dict().items()})
    zero_gradients(optimizer)


@each_method
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("base", [AdamW, pytest.param(SGD, marks=pytest.mark.long)])
@pytest.mark.parametrize("flat", [pytest.param(False, marks=pytest.mark.long), True], ids=["nested", "flat"])
@pytest.mark.parametrize("stop", [pytest.param(0, marks=pytest.mark.long), 3])
def test_resuming_through_distributed_checkpoint(method, base, flat, stop, tmp_path):
    """SGD without momentum: a base that never has a state of its own."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def states(model, optimizer):
        model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
        return {"model": model_state, "optimizer": optimizer_state}

    model = method.model(MLP)
    optimizer = method(model, base)
    train(optimizer, model, MLP, stop)
    dcp.save(states(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    train(optimizer, model, MLP, 4, start=stop)

    new_model = method.model(MLP)
    new = method(new_model, base)
    loaded = states(new_model, new)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        new_model, new, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    train(new, new_model, MLP, 4, start=stop)
    assert_same(everything(new, new_model), everything(optimizer, model))


# --- copies --------------------------------------------------------------------------------------------------------


def by_deepcopy(pair):
    return copy.deepcopy(pair)


def by_pickle(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_method
@pytest.mark.parametrize("how", [by_deepcopy, by_pickle], ids=lambda how: how.__name__)
@pytest.mark.parametrize("stop", [0, 3])
@pytest.mark.long
def test_a_copy_of_model_and_optimizer_goes_on_by_itself(method, how, stop):
    model = method.model(MLP)
    optimizer = method(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    train(optimizer, model, MLP, stop)
    other_model, other = how((model, optimizer))
    frozen = everything(optimizer, model)
    losses = train(other, other_model, MLP, 3, start=stop)
    assert_same(everything(optimizer, model), frozen)
    assert train(optimizer, model, MLP, 3, start=stop) == losses
    assert_same(everything(other, other_model), everything(optimizer, model))
    assert other.scales.owner is other
    assert_on_grid(other)
    del scheduler


@each_quantizing
def test_a_copy_owns_the_weights_of_its_model(method):
    model = method.model(TIED, activations=None)
    optimizer = method(model)
    other_model, other = copy.deepcopy((model, optimizer))
    with pytest.raises(RuntimeError, match="another qsam optimizer owns the weights of this model"):
        QAT(other_model, AdamW)
    qsam.dequantize_(other_model, other)
    SAQ(other_model, AdamW, lr=1e-3)
    train(optimizer, model, TIED, 1)


@each_quantizing
def test_a_copy_of_the_model_alone_belongs_to_nobody(method):
    model = method.model(MLP)
    optimizer = method(model)
    copied = copy.deepcopy(model)
    other = method(copied)
    with pytest.warns(UserWarning, match="on the quantization grid already: training starts from rounded weights"):
        train(other, copied, MLP, 1)
    train(optimizer, model, MLP, 1)
