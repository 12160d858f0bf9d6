"""Every example runs, and trains."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = [path for path in sorted((Path(__file__).parents[2] / "examples").glob("*.py")) if path.stem != "serve_onnx"]
"""Those that train; tests/recipes/test_deploy.py runs the other."""


QUICK = "by_hand"


@pytest.mark.parametrize(
    "path",
    [path if path.stem == QUICK else pytest.param(path, marks=pytest.mark.long) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated")
def test_an_example_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main()
    assert all(math.isfinite(value) for value in found.values())
    assert found["last"] < 0.8 * found["first"]


def test_there_is_an_example_for_each_loop():
    assert [path.stem for path in EXAMPLES] == ["accelerate_loop", "by_hand", "lightning_loop", "trainer"]
