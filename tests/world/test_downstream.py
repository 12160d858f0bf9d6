"""A quantizer of another package, installed for real, is used by its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "downstream"

PROGRAM = """
import json, sys, torch, qsam, qsam.testing
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

def closure():
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss

def latents():
    with optimizer.latents():
        return [row.module.weight.detach().clone() for row in coverage.quantized]

told = {"listed": qsam.list_quantizers()}
torch.manual_seed(0)
model, x, y = mlp(), torch.randn(32, 6), torch.randint(3, (32,))
coverage = qsam.quantize_(model, weights="ternary")
optimizer = qsam.SQuAT(model, torch.optim.AdamW, lr=1e-3, rho=0.1)
weights, scales = latents(), [row.quantizer.scale.item() for row in coverage.quantized]
for _ in range(3):
    optimizer.step(closure)

told["moved"] = [not torch.equal(a, b) for a, b in zip(latents(), weights)]
told["learned"] = [row.quantizer.scale.item() != s for row, s in zip(coverage.quantized, scales)]
told["levels"] = [(row.module.weight / row.quantizer.scale).unique().tolist() for row in coverage.quantized]
told["bits"] = [row.quantizer.bits for row in coverage.quantized]
told["rebuilt"] = str(qsam.quantize_(mlp(), spec=coverage.save(sys.argv[1]))) == str(coverage)
told["laws"] = dict(qsam.testing.check_quantizer("ternary"))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a process that has the package installed tells of it."""
    pytest.importorskip("hatchling", reason="the package is built with the hatchling of this environment: extra `test`")
    target, folder = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("spec")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, PACKAGE], check=True)
    path = os.pathsep.join([str(target), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, folder],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return json.loads(run.stdout)


def test_it_is_listed_with_qsams_own(told):
    assert {"ternary", "lsq"} <= set(told["listed"])


def test_it_is_not_known_where_it_is_not_installed():
    import qsam

    assert "ternary" not in qsam.list_quantizers()


def test_it_trains_weights_and_scales(told):
    assert all(told["moved"])
    assert all(told["learned"])


def test_the_weights_have_three_levels(told):
    assert told["levels"] == [[-1.0, 0.0, 1.0]] * 3
    assert told["bits"] == [2, 2, 2]


def test_its_spec_is_rebuilt_by_name(told):
    assert told["rebuilt"]


def test_it_keeps_the_laws_of_a_quantizer(told):
    assert told["laws"]["idempotent"] > 0
