"""A quantizer of another package, installed for real, is used by its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qsam

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


def test_an_installed_quantizer_trains_by_its_name_is_rebuilt_from_its_spec_and_keeps_the_laws(tmp_path):
    pytest.importorskip("hatchling", reason="the package is built with the hatchling of this environment: extra `test`")
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, PACKAGE], check=True)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    told = json.loads(run.stdout)
    assert {"ternary", "lsq"} <= set(told["listed"])
    assert "ternary" not in qsam.list_quantizers()  # where it is not installed
    assert all(told["moved"])
    assert all(told["learned"])
    assert told["levels"] == [[-1.0, 0.0, 1.0]] * 3
    assert told["bits"] == [2, 2, 2]
    assert told["rebuilt"]
    assert told["laws"]["idempotent"] > 0
