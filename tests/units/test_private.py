"""The private names of torch: all in one list, and none of those that may go is needed to train."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import qsam
from qsam import private
from qsam.fused import linear
from qsam.fused.kernels import using

SOURCES = sorted(Path(qsam.__file__).parent.rglob("*.py"))
CLASSES = (nn.Module, torch.optim.Optimizer)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(trees: list[ast.AST]) -> set[str]:
    """Return the names that qsam defines itself."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def used(trees: list[ast.AST]) -> set[str]:
    """Return the private names that are attributes, imported, overridden, or named by a string in getattr or vars."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "vars"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in found if is_private(name)}


def test_every_private_name_of_torch_is_in_the_list_and_every_name_of_the_list_is_used():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    inherited = {name for name in used(trees) if any(hasattr(cls, name) for cls in CLASSES)}
    ours = defined(trees) - inherited - set(private.STABLE)
    parts = {part for name in private.WITH_FALLBACK for part in name.split(".") if is_private(part)}
    listed = parts | set(private.STABLE)
    assert used(trees) - ours - listed == set(), "say in qsam/private.py why it is used"
    assert listed - used(trees) == set(), "take it off the list"


def replaced(monkeypatch, name: str) -> None:
    """Replace a private name by one that raises."""

    def gone(*_: object, **__: object) -> None:
        raise AttributeError(f"{name} is gone")

    owner, _, attribute = name.rpartition(".")
    try:
        target = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, cls = owner.rpartition(".")
        target = getattr(importlib.import_module(module), cls)
    if attribute == "_module_state_mapping":
        monkeypatch.delattr(target, attribute)
    else:
        monkeypatch.setattr(target, attribute, gone)


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(private, "_WARNED", set())
    monkeypatch.setattr(linear, "_has_instructions", linear._has_instructions.__wrapped__)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    x, y = torch.randn(130, 32), torch.randn(130, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(3)]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize(
    ("name", "backend"), list(zip(private.WITH_FALLBACK, itertools.cycle(["compiled", "compiled", "eager"])))
)
def test_without_a_private_name_a_model_is_built_and_trains_the_same(monkeypatch, name, backend):
    def run() -> list[float]:
        model = small()
        return trained(model, qsam.SQuAT(model, torch.optim.SGD, lr=0.1))

    with using(backend), warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape("this release of torch does not offer"))
        torch.manual_seed(1)
        expected = run()
        replaced(monkeypatch, name)
        torch.manual_seed(1)
        found = run()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("nothing_said", "one_process")
@pytest.mark.parametrize(
    ("name", "ask", "safe"),
    [
        ("torch._C._len_torch_dispatch_stack", private.dispatch_mode_is_active, True),
        ("torch.nn.modules.module._has_any_global_hook", private.has_global_hook, True),
        ("torch.nn.parallel.DistributedDataParallel._get_active_ddp_module", private.active_data_parallel, None),
        ("torch.distributed._composable_state._module_state_mapping", private.composed_modules, None),
        ("torch.distributed.fsdp.FSDPModule._get_fsdp_state", lambda: private.fsdp_param_dtype(None), None),
    ],
)
def test_what_is_missing_is_said_once_with_what_follows(monkeypatch, name, ask, safe):
    replaced(monkeypatch, name)
    with pytest.warns(UserWarning, match=f"(?s)does not offer {re.escape(name)} .*Without it"):
        assert ask() is safe
    assert ask() is safe


@pytest.mark.usefixtures("nothing_said", "one_process")
@pytest.mark.parametrize(
    "name", ["torch.nn.parallel.DistributedDataParallel._get_active_ddp_module",
             "torch.distributed._composable_state._module_state_mapping"],
)  # fmt: skip
def test_in_a_process_group_a_calibrated_model_trains_without_it(monkeypatch, name):
    model = small()
    qsam.quantize_(model)
    replaced(monkeypatch, name)
    qsam.calibrate(model, [torch.randn(130, 32)])
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = trained(wrapped, qsam.QAT(wrapped, torch.optim.SGD, lr=0.1))
    assert losses[-1] < losses[0]
