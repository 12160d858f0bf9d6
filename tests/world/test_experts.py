"""Mixtures of experts: transformers' Mixtral, and experts that FSDP2 has split."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

import qsam
from qsam.distributed import whole
from tests.processes import Processes, running

IDS = torch.arange(12).reshape(2, 6)
RULES = [("*.experts.*", {"granularity": "per_channel", "axis": (0, 1)})]


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    yield from running(2)


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


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 3, 8))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.up)


def experts_equal_one_process(rank: int, group_size: int | None) -> None:
    options = {"granularity": "per_group" if group_size else "per_channel", "group_size": group_size, "axis": (0, 1)}
    x = torch.linspace(-1, 1, 4 * 8).sin().reshape(4, 8)
    ends = []
    for shards in (True, False):
        model = Experts()
        qsam.quantize_(model, activations=None, rules=[("up", options)])
        if shards:
            fully_shard(model, mesh=distributed.init_device_mesh("cpu", (2,)))
        optimizer = qsam.SQuAT(model, SGD, lr=0.1, rho=0.05, scale_lr=1e-3, **({} if shards else {"ddp": False}))

        def closure(optimizer=optimizer, model=model, batch=x[rank::2] if shards else x):
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        ends.append((whole(model.up.detach()), whole(model.up_quantizer.scale.detach())))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("group_size", [None, 4])
def test_experts_that_are_sharded_train_as_one_process_does(two, group_size):
    two(experts_equal_one_process, group_size)
