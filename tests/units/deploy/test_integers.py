"""The integers are the model, and scales of 16 bits keep them."""

import copy

import pytest
import torch
from torch import nn

import qsam
from qsam.deploy import integers, round_scales_
from tests.methods import train
from tests.models import EVERYWHERE, GPT2, MLP, TIED


def written(task, **options):
    model = task.quantized(**options)
    qsam.write_(model)
    return model


def test_each_layer_comes_with_its_module_its_input_and_the_weight_that_it_shares():
    model = written(TIED, rules=[("a", {}), ("head", {"activations": None})])
    first, second, head = integers(model)
    assert (first.module, first.attr, first.path, first.shares) == (model.a, "weight", "a", "")
    assert (second.module, second.name, second.input.name, second.shares) == (model.b, "b.weight", "b", "a.weight")
    assert second.codes is first.codes
    assert (head.module, head.input, head.shares) == (model.head, None, "")
    assert (first.input.name, first.input.bits, first.input.quant_min, first.input.quant_max) == ("a", 8, -128, 127)
    assert torch.equal(first.dequantized(), model.a.weight)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("task", [MLP, GPT2], ids=str)
def test_matrix_has_the_outputs_first_and_groups_of_consecutive_inputs(task, granularity):
    model = written(task, granularity=granularity, activations=None)
    for layer in integers(model):
        full = layer.floats()
        weight = layer.module.weight.detach()
        assert torch.equal(full, weight if isinstance(layer.module, nn.Linear | nn.Embedding) else weight.t())


def test_scales_along_the_inputs_have_no_matrix():
    model = written(MLP, activations=None, rules=[("*", {"granularity": "per_channel", "axis": 1})])
    with pytest.raises(ValueError, match=r"'0\.weight' has its scales along axis 1.*quantize it without `axis`"):
        integers(model)[0].matrix()


def test_inside_a_block_integers_are_refused_and_outside_they_are_there():
    model = MLP.quantized(activations=None)
    optimizer = qsam.SAQ(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"'0\.weight' does not hold its quantized values"), optimizer.latents():
        integers(model)
    assert len(integers(model)) == 3


@pytest.mark.parametrize(
    ("weights", "bits", "message"),
    [
        ("gobo", 4, r"'0\.weight': the quantizer 'gobo' has no `scale` to export: .*quantized with 'lsq'"),
        ("qbert", 4, r"'0\.weight': the quantizer 'qbert' is not codes \* scale.*'lsq'; qsam\.deploy\.save also holds"),
        ("stretched", 8, r"'0\.weight': the quantizer 'stretched' is not codes \* scale"),
        ("liq", 8, r"'0\.weight': the quantizer 'liq' is not codes \* scale"),
    ],
)
def test_grids_that_are_no_multiples_of_the_scale_are_refused_by_name(weights, bits, message):
    with pytest.raises(TypeError, match=message):
        integers(written(MLP, weights=weights, bits=bits, activations=None))


@pytest.mark.parametrize("weights", ["stretched", "liq"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_levels_half_way_between_integers_are_odd_integers_of_one_more_bit(weights, granularity):
    group_size = 4 if granularity == "per_group" else None
    model = written(
        MLP,
        weights=weights,
        bits=2,
        granularity=granularity,
        group_size=group_size,
        activations=None,
        rules=[("*", {})],
    )
    for layer in integers(model):
        assert layer.bits == 3
        assert set(layer.codes.unique().tolist()) <= {-3, -1, 1, 3}
        assert torch.equal(layer.dequantized(), layer.module.weight)


@pytest.mark.parametrize(
    ("activations", "found"), [("lsq_plus", "has levels between or beside"), ("per_token", "follows each batch")]
)
def test_inputs_on_other_grids_are_refused_by_name(activations, found):
    with pytest.raises(TypeError, match=rf"the input of '0': the quantizer '{activations}' {found}.*activations='lsq'"):
        integers(written(MLP, activations=activations))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("weights", ["lsq", "stretched"])
def test_round_scales_keeps_the_codes_and_the_scales_are_of_that_dtype(dtype, granularity, weights):
    model = written(MLP, bits=3, granularity=granularity, weights=weights, rules=EVERYWHERE)
    before = integers(model)
    round_scales_(model, dtype)
    for old, new in zip(before, integers(model), strict=True):
        assert torch.equal(old.codes, new.codes)
        assert torch.equal(new.scale, old.scale.to(dtype).float())
        assert torch.equal(new.dequantized(), new.module.weight)


@pytest.mark.parametrize(
    ("granularity", "weights"), [("per_tensor", "lsq"), ("per_group", "lsq"), ("per_channel", "stretched")]
)
def test_round_scales_moves_the_latents_with_the_grid_and_training_goes_on(granularity, weights):
    model = MLP.quantized(granularity=granularity, weights=weights, rules=EVERYWHERE)
    optimizer = qsam.SQuAT(model, torch.optim.AdamW, lr=1e-2, scale_lr=0.0)
    train(optimizer, model, MLP, 3)
    before, latents = integers(model), [slot.latent.detach().clone() for slot in optimizer._latents.slots]
    round_scales_(model, torch.bfloat16)
    after = integers(model)
    for old, new, w, slot in zip(before, after, latents, optimizer._latents.slots, strict=True):
        assert torch.equal(old.codes, new.codes)
        assert torch.equal(slot.quantized(), slot.parameter)
        # bf16 has 8 bits, so s moves by at most 2^-8 of itself, and w with it; at the edge of a cell, w goes to its level
        assert not torch.equal(w, slot.latent)
        bound = 2.0**-8 * w.abs() + 2.0**-7 * float(old.scale.max()) + torch.finfo(torch.float32).eps * w.abs()
        assert bool((((slot.latent - w).abs() <= bound) | (slot.latent == new.dequantized())).all())
    train(optimizer, model, MLP, 2)
    assert all(torch.equal(a.scale, b.scale) for a, b in zip(after, integers(model), strict=True))


def test_an_optimizer_that_is_built_later_takes_the_moved_latents():
    model = MLP.quantized()
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    train(optimizer, model, MLP, 2)
    optimizer.release()
    round_scales_(model, torch.float16)
    before = integers(model)
    later = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    assert not torch.equal(later._latents.slots[0].latent, model[0].weight)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(before, integers(model), strict=True))


def test_round_scales_refuses_before_it_writes():
    model = written(MLP, activations=None)
    with pytest.raises(TypeError, match=r"`dtype` must be torch\.float16 or torch\.bfloat16, got torch\.float32"):
        round_scales_(model, torch.float32)
    with torch.no_grad():
        model[4].weight.mul_(2.0**-30)
        model[4].weight_quantizer.scale.mul_(2.0**-30)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'4\.weight' has scales from .* torch\.float16 rounds to 0 or infinity: use"):
        round_scales_(model, torch.float16)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    round_scales_(model, torch.bfloat16)


def test_a_row_of_zeros_has_no_scale_and_hinders_nothing():
    model = MLP.build()
    with torch.no_grad():
        model[2].weight[3] = 0.0
    qsam.quantize_(model, granularity="per_channel", activations=None)
    qsam.write_(model)
    round_scales_(model, torch.float16)
    assert float(model[2].weight_quantizer.scale[3]) == 0
    layer = integers(model)[1]
    codes, scale = layer.matrix()
    assert not codes[3].any() and not scale[3].any()
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal(layer.floats(), model[2].weight)


def test_round_scales_warns_of_subnormal_scales():
    model = written(MLP, activations=None)
    with torch.no_grad():
        model[2].weight.mul_(2.0**-13)
        model[2].weight_quantizer.scale.mul_(2.0**-13)
    with pytest.warns(
        UserWarning, match=r"'2\.weight' has scales below 6\.1e-05, which torch\.float16 holds with fewer"
    ):
        round_scales_(model, torch.float16)


def test_round_scales_inside_a_block_and_on_a_derived_scale_is_refused():
    model = MLP.quantized(activations=None)
    optimizer = qsam.SAQ(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"round_scales_\(\) inside the block"), optimizer.latents():
        round_scales_(model, torch.float16)
    model = written(MLP, weights="qbert", activations=None)
    with pytest.raises(TypeError, match="'qbert' is not codes"):
        round_scales_(model, torch.float16)
    model = written(MLP, weights="liq", activations=None, rules=EVERYWHERE)
    with pytest.raises(TypeError, match="the scale of LIQ follows from something else"):
        round_scales_(model, torch.float16)
