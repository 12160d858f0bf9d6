"""Generators of inputs for zero-shot training: modules with ``draw(rows, chance) -> z`` and ``forward(z) -> x``.

TextGenerator    random tokens -> a pretrained language model -> adaptation layer -> the student's embedding space
ImageGenerator   random vectors -> convolutions -> normalized images
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

TOKENS = ("continuous", "soft", "hard")
TRAINED = ("all", "adapter", "language_model")


class TextGenerator(nn.Module):
    """Token representations of a language model, mapped into the embedding space of the models that read them.

        v = mean + std * A LayerNorm(h),   h the last hidden state of the language model for random tokens z

    mean and std are those of the embedding table E, per coordinate, so that v starts at the scale of real embeddings.
    ``"continuous"``: x = v. ``"soft"``: x = sum_k p_k E_k, p the softmax of -||v - E_k||^2 / (2 * temperature * var)
    over the vocabulary, var the mean variance of a coordinate. ``"hard"``: x = E_k at the largest p_k, with the
    gradient of the soft tokens.

    Args:
        language_model: Any ``AutoModel`` of transformers: with ``input_ids`` (rows, length) it returns
            ``last_hidden_state`` (rows, length, width). It runs in the mode that it is in.
        embedding: The input embedding (vocabulary, width) of the teacher and the student. They must not train it.
        template: Length of the sequences; or ids (length,) of fixed tokens such as [CLS], with -1 where x is generated.
        tokens: ``"continuous"``, ``"soft"`` or ``"hard"``.
        trained: ``"all"``, the ``"adapter"`` A alone, or the ``"language_model"`` alone.
        inputs: Further inputs of the models, the same for every row, such as ``token_type_ids`` (length,).
        vocabulary: Number of tokens of the language model, or the ids (count,) of those that z may hold.
        temperature: Of the softmax, > 0. At 1 soft tokens of an untrained generator are almost hard.

    Raises:
        ValueError: An argument has a value outside its range.
    """

    table: Tensor
    template: Tensor
    ids: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        language_model: nn.Module,
        embedding: nn.Embedding | Tensor,
        template: int | Tensor,
        *,
        tokens: str = "continuous",
        trained: str = "all",
        inputs: Mapping[str, Tensor] | None = None,
        vocabulary: int | Tensor | None = None,
        temperature: float = 4.0,
    ) -> None:
        for name, value, known in (("tokens", tokens, TOKENS), ("trained", trained, TRAINED)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature!r}.")
        super().__init__()
        table = (embedding.weight if isinstance(embedding, nn.Embedding) else embedding).detach()
        template = torch.full((template,), -1) if isinstance(template, int) else template
        if template.dim() != 1 or not bool((template == -1).any()) or int(template.max()) >= len(table):
            raise ValueError(
                f"`template` must be a length, or ids of shape (length,) below {len(table)} with -1 where tokens are "
                f"generated, got {template.tolist()}."
            )
        self.language_model, self.tokens, self.temperature = language_model, tokens, temperature
        config: Any = getattr(language_model, "config", None)
        vocabulary = config.vocab_size if vocabulary is None else vocabulary
        ids = torch.arange(vocabulary) if isinstance(vocabulary, int) else vocabulary
        width = config.hidden_size
        self.adapter = nn.Linear(width, table.shape[1], bias=False)
        with torch.no_grad():
            if width == table.shape[1]:
                self.adapter.weight.copy_(torch.eye(width))
            else:
                nn.init.orthogonal_(self.adapter.weight)
                self.adapter.weight *= max(1.0, (table.shape[1] / width) ** 0.5)  # each coordinate has variance 1
        for module, name in ((language_model, "adapter"), (self.adapter, "language_model")):
            if trained == name:
                module.requires_grad_(False)
        # The buffers come with the models, and need no place in a checkpoint.
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("template", template, persistent=False)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("mean", table.float().mean(0), persistent=False)
        self.register_buffer("std", table.float().std(0, correction=0), persistent=False)
        self.more = sorted(inputs or ())
        for name in self.more:
            self.register_buffer(f"input_{name}", dict(inputs or {})[name], persistent=False)
        self.reach = float((table - self.mean).norm(dim=1).max())

    def draw(self, rows: int, chance: torch.Generator) -> Tensor:
        """Return random token ids (rows, length) for the language model."""
        numbers = torch.randint(len(self.ids), (rows, len(self.template)), generator=chance)
        z: Tensor = self.ids[numbers.to(self.ids.device)]
        return z

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Return ``inputs_embeds`` (rows, length, width), ``attention_mask``, and the further inputs."""
        h = self.language_model(input_ids=z).last_hidden_state
        x = self._tokens(self.mean + self.std * self.adapter(functional.layer_norm(h, h.shape[-1:])))
        fixed = self.template >= 0
        x = torch.where(fixed[:, None], self.table[self.template.clamp_min(0)].to(x.dtype), x)
        more = {name: getattr(self, f"input_{name}").expand(len(z), -1) for name in self.more}
        return {"inputs_embeds": x, "attention_mask": torch.ones_like(z), **more}

    def _tokens(self, v: Tensor) -> Tensor:
        if self.tokens == "continuous":
            return v
        scale = self.temperature * self.std.square().mean()
        p = ((v @ self.table.T - self.table.square().sum(1) / 2) / scale).softmax(-1)
        soft = p @ self.table
        return soft if self.tokens == "soft" else soft + (self.table[p.argmax(-1)] - soft).detach()

    def outside(self, x: Mapping[str, Tensor]) -> float:
        """Return the share of generated tokens that are further from the mean embedding than every real token."""
        v = x["inputs_embeds"].detach()[:, self.template < 0]
        return float(((v - self.mean).norm(dim=-1) > self.reach * 1.0001).float().mean())


class ImageGenerator(nn.Module):
    """A convolutional generator: a linear layer, and two times upsampling, convolution, BatchNorm and LeakyReLU.

    Its output has mean 0 and variance 1 per channel over each batch, as images that were normalized for a classifier.

    Args:
        latent: Entries of z, a standard normal vector.
        channels: Channels of the images.
        size: Their height and width in pixels, a multiple of 4.
        width: Channels within.

    Raises:
        ValueError: ``size`` is not a multiple of 4.
    """

    def __init__(self, latent: int = 64, channels: int = 3, size: int = 32, width: int = 32) -> None:
        if size < 4 or size % 4:
            raise ValueError(f"`size` must be a multiple of 4, got {size}.")
        super().__init__()
        self.latent, self.shape = latent, (2 * width, size // 4, size // 4)
        self.start = nn.Linear(latent, 2 * width * (size // 4) ** 2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            *self._doubled(2 * width, 2 * width),
            *self._doubled(2 * width, width),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels, affine=False),
        )

    @staticmethod
    def _doubled(channels: int, out: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(channels, out, 3, padding=1)
        return nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)

    def draw(self, rows: int, chance: torch.Generator) -> Tensor:
        """Return z (rows, latent), standard normal."""
        return torch.randn(rows, self.latent, generator=chance).to(self.start.weight.device)

    def forward(self, z: Tensor) -> Tensor:
        """Return images (rows, channels, size, size)."""
        images: Tensor = self.layers(self.start(z).unflatten(1, self.shape))
        return images
