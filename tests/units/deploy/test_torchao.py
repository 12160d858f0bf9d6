"""A copy in torchao's tensors computes what the model computes."""

import pytest
import torch
from torch import nn

import qsam
from qsam import deploy
from tests.models import GPT2, MLP, TIED

quantization = pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_copy_computes_the_same_bit_for_bit(bits, granularity):
    model = MLP.quantized(bits=bits, granularity=granularity, activations=None)
    qsam.write_(model)
    twin = deploy.to_torchao(model)
    x = MLP.batch(1)["x"]
    assert torch.equal(twin(x), model(x))
    assert isinstance(twin[0].weight, quantization.IntxUnpackedToInt8Tensor)
    assert torch.equal(twin[0].weight.qdata, deploy.integers(model)[0].codes)
    assert type(model[0].weight) is nn.Parameter
    assert not any("quantizer" in name for name, _ in twin.named_modules())


def test_inputs_stay_quantized_and_tied_weights_tied():
    model = TIED.quantized(bits=4)
    qsam.write_(model)
    twin = deploy.to_torchao(model)
    assert twin.a.weight is twin.b.weight
    x = TIED.batch(1)["x"]
    torch.testing.assert_close(twin(x), model(x))  # the model multiplies integers where the processor can
    floats = TIED.quantized(bits=4, activations=None)
    qsam.write_(floats)
    assert not torch.allclose(twin(x), floats(x))


def test_other_layers_keep_their_quantized_values_in_float():
    model = GPT2.quantized(bits=4, activations=None, rules=[("*wte", None), ("*wpe", None), ("*", {})])
    qsam.write_(model)
    model.eval()
    twin = deploy.to_torchao(model)
    assert torch.equal(twin.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
    batch = GPT2.batch(0)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


def test_16_bit_parameters_that_torchao_computes_otherwise_are_refused_and_the_advice_works():
    model = MLP.build().bfloat16()
    qsam.quantize_(model, bits=8, activations=None, rules=[("*", {})])
    qsam.write_(model)
    with pytest.raises(
        ValueError, match=r"'0\.weight': torchao multiplies codes by scales in torch\.bfloat16.*model\.float"
    ):
        deploy.to_torchao(model)
    model.float()
    qsam.write_(model)
    deploy.to_torchao(model)
