"""Every code block of the documents runs, links and tables are right, and all that is registered has its card and twin."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from benchmarks.demos import BEGIN, END, results_block
from qsam.optim import DIRECTIONS, OPTIMIZERS, QuantizedOptimizer
from qsam.quantizers import QUANTIZERS
from tests.reference import quantizers as quantizer_twins

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = ["Idea", "Equation", "Cost", "Settings", "When not", "Differs from the paper", "Sources"]

# What is registered by this package: tests and documents register more.
METHODS = [name for name in OPTIMIZERS if OPTIMIZERS.get(name).__module__.startswith("qsam.")]
QUANTIZER_NAMES = [name for name in QUANTIZERS if QUANTIZERS.get(name).__module__.startswith("qsam.")]
DIRECTION_NAMES = [name for name in DIRECTIONS if DIRECTIONS.get(name).__module__.startswith("qsam.")]

CARDS = [DOCS / "methods" / f"{name}.md" for name in METHODS]
CARDS += [DOCS / "quantizers" / f"{name}.md" for name in QUANTIZER_NAMES]


def relative(path):
    return str(path.relative_to(ROOT))


def blocks(page):
    """Return the code of each block, preceded by empty lines, so that an error names the line of the page."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * (text.count("\n", 0, match.start()) + 1) + match[1] for match in BLOCK.finditer(text)]


@pytest.fixture
def registries_kept():
    registries = (OPTIMIZERS, QUANTIZERS, DIRECTIONS)
    before = [dict(registry._classes) for registry in registries]
    yield
    for registry, classes in zip(registries, before, strict=True):
        registry._classes.clear()
        registry._classes.update(classes)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=relative)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, registries_kept):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("card", CARDS, ids=relative)
def test_every_registered_method_and_quantizer_has_its_card(card):
    text = card.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert blocks(card)
    assert len(text.splitlines()) < 130, "a page"


def test_every_card_is_of_something_registered_and_is_indexed():
    for folder, names in (("methods", METHODS), ("quantizers", QUANTIZER_NAMES)):
        index = (DOCS / folder / "README.md").read_text(encoding="utf-8")
        cards = {page.stem for page in (DOCS / folder).glob("*.md")} - {"README", "directions", "zero_shot"}
        assert cards == set(names)
        assert all(f"({name}.md)" in index for name in names)


def test_every_registered_direction_is_described():
    text = (DOCS / "methods" / "directions.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `(\w+)`$", text, re.MULTILINE) == re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(re.findall(r"^## `(\w+)`$", text, re.MULTILINE)) == set(DIRECTION_NAMES)
    for name in DIRECTION_NAMES:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |")).replace("\\|", "")
        assert int(row.split("|")[4]) == DIRECTIONS.get(name).passes


@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_has_its_slow_twin_and_names_it(name):
    module = importlib.import_module(f"tests.reference.{name}")
    assert any(inspect.isclass(member) and hasattr(member, "step") for member in vars(module).values())
    assert f"`tests/reference/{name}.py`" in (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")


def test_every_registered_quantizer_has_its_slow_twin_and_names_it():
    assert quantizer_twins.TWINS.keys() == set(QUANTIZER_NAMES)
    for name, twin in quantizer_twins.TWINS.items():
        text = (DOCS / "quantizers" / f"{name}.md").read_text(encoding="utf-8")
        assert f"`{twin.__name__}` in `tests/reference/quantizers.py`" in text


def keywords(cls):
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_is_described(name):
    index = (DOCS / "methods" / "README.md").read_text(encoding="utf-8")
    card = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    common = keywords(QuantizedOptimizer)
    assert not [key for key in common if f"`{key}`" not in index]
    assert not [key for key in keywords(OPTIMIZERS.get(name)) - common if f"`{key}`" not in card]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{relative(page)} links to {target}"


def test_every_test_that_a_page_names_exists():
    for page in PAGES:
        links = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert links or page.stem != "reliability"
        for name, target in links:
            assert re.search(rf"^ *def {name}\(", (page.parent / target).read_text(encoding="utf-8"), re.MULTILINE), (
                name
            )


def test_the_extension_in_the_readme_is_the_package_that_the_tests_install():
    package = ROOT / "tests" / "downstream"
    assert f"```python\n{(package / 'qsam_ternary.py').read_text(encoding='utf-8')}```" in README
    project = (package / "pyproject.toml").read_text(encoding="utf-8")
    for line in ('[project.entry-points."qsam.quantizers"]', 'ternary = "qsam_ternary:Ternary"'):
        assert line in project
        assert line in README


def test_the_table_of_results_in_the_readme_is_made_from_the_kept_runs():
    shown = README.split(BEGIN)[1].split(END)[0].strip()
    assert shown == "\n".join(results_block()).strip()
    assert shown
