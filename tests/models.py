"""Small seeded models, their data and their losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qsam

Batch = dict[str, Tensor]
Forward = Callable[..., Any]

EVERYWHERE = [("*", {})]
"""Rules that give every matrix, the head too, the bits of the call."""


PAPERS = {
    "ranges": [
        ("0", {"weights": "stretched", "activations": "lsq_plus"}),
        ("2", {"weights": "minmax_ema", "activations": "minmax_ema"}),
        ("4", {"weights": "qbert", "activations": "pact"}),
    ],
    "levels": [
        ("0", {"weights": "gobo", "activations": "per_token"}),
        ("2", {"weights": "liq", "activations": "liq"}),
        ("4", {"weights": "lsq_statistics", "activations": "qbert"}),
    ],
    "statistics": [("0", {"weights": "lsq_plus", "activations": "lsq_statistics"}), ("*", {})],
}
"""Rules for :data:`MLP` that give each layer quantizers of other papers."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with data that it can learn.

    Attributes:
        name: For test ids.
        build: Returns the model, the same at every call.
        batch: Returns the batch of a number.
        loss: ``(forward, batch)``; ``forward`` is the model, or anything that is called like it.
        group_size: A size of groups that fits every weight.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Forward, Batch], Tensor]
    group_size: int = 4

    def __str__(self) -> str:
        return self.name

    def quantized(self, **options: Any) -> nn.Module:
        """Return the model, quantized and calibrated on batch 0."""
        model = self.build()
        if options.get("granularity") == "per_group":
            options.setdefault("group_size", self.group_size)
        qsam.quantize_(model, **{"rules": EVERYWHERE, **options})
        if options.get("activations", "lsq") is not None:
            qsam.calibrate(model, [_inputs(self.batch(0))])
        return model.train()


def _inputs(batch: Batch) -> Any:
    return batch["x"] if "x" in batch else {k: v for k, v in batch.items() if k != "labels"}


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Run ``build`` from seed 0, and leave torch's generator at seed 0 for what comes next."""

    @functools.wraps(build)
    def run() -> nn.Module:
        torch.manual_seed(0)
        model = build().train()
        torch.manual_seed(0)
        return model

    return run


@seeded
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


@seeded
def convnet() -> nn.Module:
    """Convolutions with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 4),
    )


@seeded
def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, num_labels=4,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@seeded
def gpt2() -> nn.Module:
    """Conv1D layers, and a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2))


@seeded
def resnet18() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("resnet18", num_classes=4)


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


tied = seeded(Tied)


def draw(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + number)


def vectors(number: int) -> Batch:
    x = torch.randn(16, 8, generator=draw(number))
    return {"x": x, "labels": x[:, :4].argmax(1)}


def images(number: int, size: int = 4, channels: int = 4) -> Batch:
    x = torch.randn(8, channels, size, size, generator=draw(number))
    return {"x": x, "labels": x.mean((2, 3))[:, :3].argmax(1)}


def sentences(number: int) -> Batch:
    """Token ids, the second half of each second sentence padding."""
    ids = torch.randint(1, 40, (8, 10), generator=draw(number))
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids[:, 0] % 4}


def text(number: int) -> Batch:
    """Sequences that count upwards from a random start."""
    ids = (torch.randint(0, 40, (8, 1), generator=draw(number)) + torch.arange(10)) % 40
    return {"input_ids": ids, "labels": ids}


def cross_entropy(forward: Forward, batch: Batch) -> Tensor:
    return F.cross_entropy(forward(batch["x"]), batch["labels"])


def own_loss(forward: Forward, batch: Batch) -> Tensor:
    return forward(**batch).loss


MLP = Task("mlp", mlp, vectors, cross_entropy)
CONV = Task("conv", convnet, images, cross_entropy)
TIED = Task("tied", tied, vectors, cross_entropy)
BERT = Task("bert", bert, sentences, own_loss)
GPT2 = Task("gpt2", gpt2, text, own_loss)
RESNET = Task("resnet18", resnet18, functools.partial(images, size=32, channels=3), cross_entropy)
