"""Contract 1: every optimizer of torch.optim and of torch_optimizer as base runs, steps as it does alone, and resumes."""

from __future__ import annotations

import inspect
import io
import warnings
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import nn

import qsam

TORCH = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
OTHERS = {
    f"torch_optimizer.{name}": cls
    for name, cls in vars(torch_optimizer).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
ALL = TORCH | OTHERS
REFUSED = {
    "SparseAdam": "steps on sparse gradients only",
    "torch_optimizer.Adahessian": "differentiates the gradients once more",
}
"""What no method takes, and why."""


ONLY_QAT = {"LBFGS": "calls its closure itself"}
"""What a method of several passes cannot take, and why."""


USABLE = [name for name in ALL if name not in REFUSED]
IGNORES_ITS_CLOSURE = {"torch_optimizer.Ranger", "torch_optimizer.RangerVA"}
"""Their step takes a closure and does not call it."""


NEEDS_LR = {"LBFGS": 0.1, "torch_optimizer.SGDW": 0.01}
"""Learning rates for those whose default is no use for a few steps of a small network."""


INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS[:, :1].clone()


def build_model() -> nn.Sequential:
    """Matrices only: Muon takes no other parameter."""
    torch.manual_seed(1)
    layers = [
        nn.Linear(6, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 1, bias=False),
    ]
    return nn.Sequential(*layers)


def build_quantized() -> nn.Sequential:
    model = build_model()
    qsam.quantize_(model, bits=4)
    qsam.calibrate(model, [INPUTS])
    return model


def build_base(name: str, model: nn.Module) -> torch.optim.Optimizer:
    params = [p for key, p in model.named_parameters() if "_quantizer." not in key]
    if name == "torch_optimizer.Lookahead":
        return torch_optimizer.Lookahead(torch.optim.Adam(params))
    settings: dict[str, Any] = {"lr": NEEDS_LR[name]} if name in NEEDS_LR else {}
    return ALL[name](params, **settings)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0, ignored: bool = False
) -> list[float]:
    torch.manual_seed(seed)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(INPUTS), TARGETS)
        loss.backward()
        losses.append(loss.item())
        return loss

    with warnings.catch_warnings():  # Ranger calls deprecated functions of torch
        warnings.filterwarnings("ignore", message=".*deprecated", category=UserWarning)
        for _ in range(steps):
            if ignored:
                closure()
            optimizer.step(closure)
    return losses


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", USABLE)
def test_identity_quantizer_is_the_bare_optimizer(name: str) -> None:
    alone, wrapped = build_model(), build_model()
    qsam.quantize_(wrapped, weights="identity", activations=None)
    bare = build_base(name, alone)
    if name == "torch_optimizer.Lookahead":  # it never calls Optimizer.__init__, and torch 2 steps it only then
        torch.optim.Optimizer.__setstate__(bare, {"defaults": {}})
    train(alone, bare, 5, ignored=name in IGNORES_ITS_CLOSURE)
    train(wrapped, qsam.QAT(wrapped, build_base(name, wrapped)), 5)
    assert same(alone, wrapped)


@pytest.mark.parametrize("name", USABLE)
def test_a_base_moves_the_latents_leaves_the_grid_in_the_model_and_resumes(name: str) -> None:
    model = build_quantized()
    optimizer = qsam.QAT(model, build_base(name, model))
    before = [slot.latent.detach().clone() for slot in optimizer._latents.slots]
    losses = train(model, optimizer, 3)
    assert all(torch.isfinite(torch.tensor(losses)))
    for slot, old in zip(optimizer._latents.slots, before, strict=True):
        assert not torch.equal(slot.latent, old)
        assert torch.equal(slot.parameter, slot.quantizer(slot.latent))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = build_quantized()
    resumed_optimizer = qsam.QAT(resumed, build_base(name, resumed))
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert train(model, optimizer, 3, seed=5) == train(resumed, resumed_optimizer, 3, seed=5)
    assert same(model, resumed)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    model = build_quantized()
    with pytest.raises(TypeError, match=REFUSED[name]):
        qsam.QAT(model, build_base(name, model))


@pytest.mark.parametrize("name", ONLY_QAT)
def test_refused_by_methods_of_several_passes(name: str) -> None:
    model = build_quantized()
    with pytest.raises(TypeError, match=ONLY_QAT[name]):
        qsam.SQuAT(model, build_base(name, model), rho=0.1)


def test_muon_on_matrices_names_the_parameters_it_leaves_out() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    qsam.quantize_(model, bits=4)
    matrices = [p for key, p in model.named_parameters() if p.dim() == 2 and "_quantizer." not in key]
    with pytest.warns(UserWarning, match=r"2 trainable parameters are in no group.*0\.bias"):
        qsam.SAQ(model, torch.optim.Muon(matrices), rho=0.1)
