"""Models of peft: quantized before or after ``get_peft_model``, with ``modules_to_save``, and merged."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qsam

peft = pytest.importorskip("peft")

X = torch.linspace(-1, 1, 5 * 6).sin().reshape(5, 6)
CHANGED = r"'4\.weight', whose module has left|is a copy of a quantized weight, made since quantize_"


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def with_lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["2"], r=2, **options))


def grow(model):
    """Give the LoRA factors values, as training would: the second starts from zeros."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.linspace(-0.3, 0.3, p.numel()).reshape(p.shape))


def levels(model, name):
    return model.get_parameter(name).unique().numel()


def step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure)


USES = [
    lambda model: qsam.SQuAT(model, torch.optim.SGD, lr=0.1),
    qsam.write_,
    lambda model: qsam.calibrate(model, [X]),
    qsam.export,
]


def test_a_copy_that_peft_trains_is_refused_by_its_path():
    model = mlp()
    qsam.quantize_(model)
    model = with_lora(model, modules_to_save=["4"])
    copied = r"'(base_model\.model\.)?4\.modules_to_save\.default\.weight' is a copy of a quantized weight"
    for use in USES:
        with pytest.raises(RuntimeError, match=copied):
            use(model)


def test_the_advice_for_such_a_copy_quantizes_it():
    model = mlp()
    qsam.quantize_(model)
    model = with_lora(model, modules_to_save=["4"])
    qsam.dequantize_(model)
    assert not any(isinstance(module, qsam.Quantizer) for module in model.modules())
    coverage = qsam.quantize_(model)
    rows = {row.name.removeprefix("base_model.model."): row for row in coverage.weights}
    assert rows["4.modules_to_save.default.weight"].quantizer.bits == 8
    assert rows["4.original_module.weight"].reason == "set aside: peft uses its trained copy"
    optimizer = qsam.SQuAT(model, torch.optim.SGD, lr=0.1)
    before = model.state_dict()["base_model.model.4.modules_to_save.default.bias"].clone()
    step(model, optimizer)
    assert not torch.equal(before, model.state_dict()["base_model.model.4.modules_to_save.default.bias"])
    assert levels(model, "base_model.model.4.modules_to_save.default.weight") <= 2**8


def test_a_copy_that_comes_after_the_optimizer_is_refused_before_the_first_step():
    model = mlp()
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    with_lora(model, modules_to_save=["4"])
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"is a copy of .* Call qsam\.dequantize_\(model, optimizer\) and then"):
        step(model, optimizer)
    qsam.dequantize_(model, optimizer)
    qsam.quantize_(model)
    step(model, qsam.QAT(model, torch.optim.SGD, lr=0.1))


def test_a_frozen_copy_is_nobodys_business():
    model = nn.ModuleDict({"student": mlp()})
    qsam.quantize_(model)
    model["teacher_head"] = copy.deepcopy(model["student"][4]).requires_grad_(False)
    qsam.write_(model)
    qsam.QAT(model, torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("first", ["quantize_", "get_peft_model"])
def test_after_merge_and_unload_the_advice_works(first):
    """Quantized first, the merged model is the recorded one and ``write_`` works at once; else ``dequantize_`` does."""
    model = mlp()
    if first == "quantize_":
        qsam.quantize_(model)
        model = with_lora(model)
    else:
        model = with_lora(model)
        qsam.quantize_(model)
    qsam.calibrate(model, [X])
    qsam.write_(model)
    grow(model)
    merged = model.merge_and_unload()
    merged.requires_grad_(True)  # peft froze it
    assert levels(merged, "2.weight") > 2**4
    if first != "quantize_":
        for verb in (qsam.write_, qsam.quantize_, lambda m: qsam.calibrate(m, [X]), qsam.export):
            with pytest.raises(RuntimeError, match=r"'0\.weight' is quantized already.*qsam\.dequantize_\(model\)"):
                verb(merged)
        qsam.dequantize_(merged)
        assert [name for name, _ in merged.named_parameters()] == [name for name, _ in mlp().named_parameters()]
        qsam.quantize_(merged)
        qsam.calibrate(merged, [X])
    merged_weight = merged[2].weight.detach().clone()
    qsam.write_(merged)
    assert levels(merged, "2.weight") <= 2**4
    assert torch.equal(merged[2].weight, merged[2].weight_quantizer(merged_weight))
    optimizer = qsam.QAT(merged, torch.optim.SGD, lr=0.1)
    with pytest.warns(UserWarning, match="on the quantization grid already"):
        step(merged, optimizer)


def test_a_merged_model_with_a_saved_module_is_refused_and_the_advice_works():
    model = mlp()
    qsam.quantize_(model)
    merged = with_lora(model, modules_to_save=["4"]).merge_and_unload()
    with pytest.raises(RuntimeError, match=CHANGED):
        qsam.write_(merged)
    qsam.dequantize_(merged)
    qsam.quantize_(merged)
    qsam.write_(merged)
    assert levels(merged, "4.weight") <= 2**8


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_has_a_coverage_of_its_own_and_no_owner(copied):
    model = mlp()
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    other = copied(model)
    coverage = qsam.coverage_of(other)
    assert coverage is not qsam.coverage_of(model) is optimizer.coverage
    assert coverage.quantized[0].module is other[0]
    qsam.write_(other)  # refused where there is an owner
    with pytest.raises(RuntimeError, match="an optimizer owns"):
        qsam.write_(model)
