"""Architectures of timm, built small, and the rows of docs/architectures.md: how much of each is quantized.

``python -m tests.architectures`` writes the rows; the rest of the page is kept by hand.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qsam

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
CLASSES = 5


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model of timm, made small.

    Attributes:
        name: What ``timm.create_model`` knows it by.
        family: Its chapter on the page.
        arguments: What makes it small.
        size: Of its images.
        default: Whether the tests that always run have it.
        parts: "module:Class" below ``timm.models``, built directly where timm's function fixes the size; arguments
            that end in "_layer" then name classes of that module.
    """

    name: str
    family: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: int = 32
    default: bool = False
    parts: str = ""

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> nn.Module:
        """Return the model with random weights."""
        import timm

        torch.manual_seed(seed)
        if self.parts:
            module_name, _, kind = self.parts.partition(":")
            module = importlib.import_module(f"timm.models.{module_name}")
            layers = {
                key: getattr(module, value) if key.endswith("_layer") else value
                for key, value in self.arguments.items()
            }
            model: nn.Module = getattr(module, kind)(num_classes=CLASSES, **layers)
        else:
            model = timm.create_model(self.name, pretrained=False, num_classes=CLASSES, **self.arguments)
        return model.train()

    def images(self) -> Tensor:
        """Return four images."""
        return torch.randn(4, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


def _of(family: str, table: dict[str, dict[str, Any]]) -> Iterator[Architecture]:
    for name, entry in table.items():
        own = {key: entry[key] for key in ("size", "default", "parts") if key in entry}
        yield Architecture(name, family, {k: v for k, v in entry.items() if k not in own}, **own)


TINY = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
CHANNELS = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
MIXER = {"img_size": 32, "patch_size": 16, "num_blocks": 2, "embed_dim": 24}

ARCHITECTURES = [
    *_of(
        "Convolutions",
        {
            "resnet18": {**CHANNELS, "default": True},
            "resnext50_32x4d": {**CHANNELS, "cardinality": 4, "base_width": 32},
            "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 64), "stem_chs": 8},
            "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
            "vgg11_bn": {"mlp_ratio": 0.01},
            "mobilenetv2_035": {},
            "mobilenetv3_small_050": {},
            "efficientnet_b0": {},
            "efficientnet_lite0": {},
            "mixnet_s": {},
            "tf_efficientnet_cc_b0_4e": {},
            "regnety_002": {},
            "repvgg_a0": {},
            "ghostnet_050": {},
            "repghostnet_050": {},
            "dla46_c": {},
            "hrnet_w18_small": {},
            "inception_v3": {"size": 80},
            "xception41": {},
            "cspdarknet53": {},
            "resnetv2_50x1_bit": {"channels": (128, 128, 128, 128), "stem_chs": 32},
            "test_nfnet": {},
            "convmixer_768_32": {"dim": 24, "depth": 2, "kernel_size": 3, "patch_size": 7, "parts": "convmixer:ConvMixer"},
            "convnext_atto": STAGES,
            "convnextv2_atto": STAGES,
        },
    ),
    *_of(
        "Transformers",
        {
            "vit_tiny_patch16_224": {**TINY, "default": True},
            "deit_tiny_distilled_patch16_224": TINY,
            "beit_base_patch16_224": TINY,
            "eva02_tiny_patch14_224": {**TINY, "embed_dim": 32, "img_size": 28, "size": 28},
            "cait_xxs24_224": TINY,
            "xcit_nano_12_p16_224": {**TINY, "cls_attn_layers": 1},
            "swin_tiny_patch4_window7_224": {
                "embed_dim": 24, "depths": (2, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 4, "size": 64,
            },
            "swinv2_tiny_window8_256": {
                "embed_dim": 24, "depths": (2, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 4, "size": 64,
            },
            "pit_ti_224": {"base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 8), "img_size": 64, "size": 64},
            "levit_128s": {
                "embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1), "img_size": 64, "size": 64,
            },
            "tnt_s_patch16_224": {"embed_dim": 48, "inner_dim": 12, "depth": 2, "num_heads_outer": 3, "img_size": 32},
            "crossvit_tiny_240": {
                "embed_dim": (24, 48), "depth": ((1, 1, 0),), "img_scale": (1.0, 1.0), "patch_size": (8, 16), "img_size": 48, "size": 48,
            },
        },
    ),
    *_of(
        "Convolutions and attention",
        {
            "mobilevit_xxs": {"size": 64},
            "test_coatnet": {"img_size": 64, "size": 64, "default": True},
            "test_maxvit": {"img_size": 64, "size": 64},
            "convit_tiny": TINY,
            "efficientformer_l1": {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 48), "size": 224},
            "poolformer_s12": {"size": 64},
            "twins_pcpvt_small": {
                "embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "img_size": 64, "size": 64,
            },
            "pvt_v2_b0": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "size": 64},
        },
    ),
    *_of(
        "Mixers",
        {
            "mixer_s16_224": {**MIXER, "parts": "mlp_mixer:MlpMixer", "default": True},
            "gmlp_ti16_224": {
                **MIXER, "mlp_ratio": 6, "block_layer": "SpatialGatingBlock", "mlp_layer": "GatedMlp", "parts": "mlp_mixer:MlpMixer",
            },
            "resmlp_12_224": {**MIXER, "mlp_ratio": 4, "block_layer": "ResBlock", "norm_layer": "Affine", "parts": "mlp_mixer:MlpMixer"},
        },
    ),
]  # fmt: skip

DEFAULT = [a for a in ARCHITECTURES if a.default]
LEAST_SHARE = 0.95


def share_of_matrices(coverage: qsam.Coverage) -> float:
    """Return which share of the entries of all parameters of two or more dimensions is quantized."""
    rows = [row for row in coverage.weights if len(row.shape) >= 2]
    return sum(row.numel for row in rows if row.bits < 32) / sum(row.numel for row in rows)


def row_of(architecture: Architecture) -> str:
    """Build and quantize an architecture; return its line of the table: its size, and what stays float."""
    model = architecture.build()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* of the matrices' entries are quantized")  # the page says it
        coverage = qsam.quantize_(model, bits=4, activation_bits=8, init="absmax")
    weights = [(row.name, row.reason) for row in coverage.weights if row.quantizer is None and len(row.shape) >= 2]
    inputs = [(row.name, f"its input: {row.reason}") for row in coverage.inputs if row.quantizer is None]
    attention = [(name, "scores and probabilities") for name in coverage.attention]
    floats = "; ".join(_grouped([*weights, *inputs, *attention])).replace("|", "\\|") or "nothing"
    millions = sum(row.numel for row in coverage.weights) / 1e6
    return f"| `{architecture.name}` | {millions:.2f} M | {share_of_matrices(coverage):.1%} | {floats} |"


def _grouped(pairs: list[tuple[str, str]]) -> Iterator[str]:
    """Yield "`a`, `b.*.c` (reason)": one item a reason, numbers in paths as stars, in order of appearance."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in pairs:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        names = by_reason.setdefault(reason, [])
        if pattern not in names:
            names.append(pattern)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"{', '.join(f'`{name}`' for name in names[:4])}{more} ({reason})"


def rewritten(text: str, architectures: list[Architecture]) -> str:
    """Return the page with the rows of these architectures written again."""
    for architecture in architectures:
        row = row_of(architecture)
        text = re.sub(rf"^\| `{architecture.name}` \|.*$", lambda _, row=row: row, text, flags=re.MULTILINE)
    return text


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), ARCHITECTURES), encoding="utf-8")
