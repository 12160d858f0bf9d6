"""The model that the benchmarks train: a small BERT, from a configuration, with random tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from qsam.presets import squat_bert

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a BERT, and the batches ``(sentences, tokens)`` it is trained on."""

    layers: int = 4
    hidden: int = 384
    heads: int = 12
    intermediate: int = 1536
    vocabulary: int = 30522
    batches: tuple[tuple[int, int], ...] = ((16, 32), (32, 64))


FULL = Size()
QUICK = Size(layers=1, hidden=32, heads=2, intermediate=32, vocabulary=64, batches=((2, 8),))


def build(size: Size) -> nn.Module:
    """Return the model, the same for the same size, in training mode with a dropout of .1."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = BertForSequenceClassification(config)
    return model.train()


def batch_of(size: Size, sentences: int, tokens: int) -> Batch:
    """Return random tokens and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocabulary, (sentences, tokens), generator=generator)
    labels = torch.randint(2, (sentences,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers that the preset ``squat_bert`` quantizes, by name."""
    wanted: Any = squat_bert[0][0]
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and wanted(n + ".weight", m)}
