"""Mixtures of experts: transformers' Mixtral. test_fsdp.py has experts that FSDP2 has split."""

import pytest
import torch
from torch.optim import SGD

import qsam

IDS = torch.arange(12).reshape(2, 6)
RULES = [("*.experts.*", {"granularity": "per_channel", "axis": (0, 1)})]


def mixtral():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=20, num_local_experts=4)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


def test_mixtral_warns_that_its_experts_stay_float_and_a_rule_quantizes_them():
    model = mixtral()
    with pytest.warns(UserWarning, match=r"only \d+% of the matrices' entries are quantized: .*experts\.gate_up_proj"):
        coverage = qsam.quantize_(model)
    assert coverage.share < 0.3
    qsam.dequantize_(model)
    coverage = qsam.quantize_(model, rules=RULES)
    assert coverage.share > 0.9
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj_quantizer.scale.shape == (4, 64, 1)
    assert experts.down_proj_quantizer.scale.shape == (4, 16, 1)
    optimizer = qsam.SQuAT(model, SGD, lr=0.1, rho=0.05)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return loss

    for _ in range(2):
        assert optimizer.step(closure).isfinite()
    assert all(w.unique().numel() <= 2**4 for w in experts.gate_up_proj.detach().flatten(0, 1))
    records = {record.name: record for record in qsam.export(model).weights}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(records[name].dequantized(), experts.gate_up_proj)
