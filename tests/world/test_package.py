import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import qsam

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def names(requirements: list[str]) -> set[str]:
    return {requirement_name(requirement) for requirement in requirements} - {"qsam"}


EXTRAS = set().union(*(names(extra) for extra in PROJECT["optional-dependencies"].values()))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the wheel is built with the hatchling of this environment: extra `test`")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, ROOT], check=True)
    (path,) = folder.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_package_and_its_metadata_only(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"qsam", f"qsam-{qsam.__version__}.dist-info"}


def test_wheel_holds_every_module_the_kernels_the_type_marker_and_the_licence(wheel):
    modules = {path.relative_to(ROOT).as_posix() for kind in ("py", "c") for path in ROOT.glob(f"qsam/**/*.{kind}")}
    assert "qsam/fused/sweeps.c" in modules
    licence = f"qsam-{qsam.__version__}.dist-info/licenses/LICENSE"
    assert {*modules, "qsam/py.typed", licence} <= set(wheel.namelist())


def test_wheel_registers_no_entry_point(wheel):
    assert not [name for name in wheel.namelist() if name.endswith("entry_points.txt")]


def test_version_is_the_same_in_pyproject_and_in_the_package():
    assert PROJECT["version"] == qsam.__version__


PROGRAM = """
import json, sys, torch, safetensors
before = set(sys.modules)
import qsam
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_import_loads_no_optional_package_and_warns_of_nothing():
    optional = {
        module
        for module, distributions in packages_distributions().items()
        if EXTRAS & {name.lower().replace("_", "-") for name in distributions}
    }
    assert "transformers" in optional, "run the tests in the environment of `make test`"
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    loaded = set(json.loads(run.stdout))
    assert "qsam" in loaded
    assert not optional & loaded


def test_every_dependency_has_one_tested_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert len(pins) == len(set(pins))
    assert set(pins) - {"numpy"} == (EXTRAS | names(PROJECT["dependencies"])) - {"torch", "torchvision"}
