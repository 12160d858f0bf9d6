import sys
import textwrap

import pytest
from torch import nn

from qsam.quantizers import LSQ, QUANTIZERS, Identity, Quantizer, list_quantizers, register_quantizer
from qsam.registry import Registry, nearest


@pytest.fixture
def registry():
    return Registry("animal")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Return a function that installs a module under entry points of the group "qsam.animals"."""

    def install(source, points):
        (tmp_path / "zoo.py").write_text(textwrap.dedent(source))
        info = tmp_path / "zoo-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[qsam.animals]\n" + points)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("zoo", None)


class Cat:
    pass


class Dog:
    pass


def test_a_registered_class_is_found_by_its_name(registry):
    assert registry.name_of(Cat) is None
    assert "cat" not in registry and None not in registry
    assert registry.register("cat")(Cat) is Cat
    assert registry.get("cat") is Cat
    assert registry.name_of(Cat) == "cat"
    assert "cat" in registry


def test_names_come_sorted_and_an_alias_is_a_class_with_options(registry):
    registry.register("dog")(Dog)
    registry.register("cat")(Cat)
    registry.alias("kitten", Cat, age=0)
    assert list(registry) == ["cat", "dog", "kitten"]
    assert registry.get("kitten") is registry.get("cat")
    assert (registry.options("kitten"), registry.options("cat")) == ({"age": 0}, {})
    assert registry.name_of(Cat) == "cat"


@pytest.mark.parametrize("cls", [Cat, Dog])
def test_a_taken_name_is_refused_for_the_same_class_too(registry, cls):
    registry.register("cat")(Cat)
    with pytest.raises(ValueError, match=r"The animal name 'cat' is taken by .*test_registry\.Cat: choose another"):
        registry.register("cat")(cls)
    assert registry.get("cat") is Cat


@pytest.mark.parametrize("name", ["", None, Cat])
def test_a_name_must_be_a_non_empty_string(registry, name):
    with pytest.raises(TypeError, match=r"animal's name must be a non-empty string, got"):
        registry.register(name)


def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(registry):
    registry.register("cat")(Cat)
    registry.register("dog")(Dog)
    with pytest.raises(ValueError, match=r"There is no animal 'cats'\. Did you mean 'cat'\?"):
        registry.get("cats")
    for name in ("zebra", 3, None):
        with pytest.raises(ValueError, match=rf"There is no animal {name!r}\. Registered: cat, dog\."):
            registry.get(name)


def test_nearest_names_at_most_three():
    assert nearest("aaaa", ["aaab", "aaac", "aaad", "aaae"]).count(" or ") == 2
    assert nearest("aaaa", ["zzzz"]) == ""


def test_a_class_that_fails_the_check_is_not_registered():
    def refuse(cls):
        raise TypeError("no")

    registry = Registry("animal", check=refuse)
    with pytest.raises(TypeError, match="no"):
        registry.register("cat")(Cat)
    assert list(registry) == []


def test_an_entry_point_to_a_class_registers_it_under_its_own_name(plugin):
    plugin("class Lion: pass\n", "lion = zoo:Lion\n")
    registry = Registry("animal", entry_points="qsam.animals")
    assert registry.get("lion").__name__ == "Lion"


def test_an_entry_point_to_a_module_registers_what_the_module_registers(plugin, monkeypatch):
    registry = Registry("animal", entry_points="qsam.animals")
    monkeypatch.setattr(sys, "zoo_registry", registry, raising=False)
    plugin("import sys\n@sys.zoo_registry.register('tiger')\nclass Tiger: pass\n", "any = zoo\nsame = zoo:Tiger\n")
    assert list(registry) == ["tiger"]


def test_an_entry_point_is_not_imported_for_a_name_that_is_known(plugin):
    plugin("raise RuntimeError('imported')\n", "lion = zoo:Lion\n")
    registry = Registry("animal", entry_points="qsam.animals")
    registry.register("cat")(Cat)
    assert registry.get("cat") is Cat
    assert "zoo" not in sys.modules


def test_an_entry_point_whose_name_is_taken_is_refused(plugin):
    plugin("class Lion: pass\n", "cat = zoo:Lion\n")
    registry = Registry("animal", entry_points="qsam.animals")
    registry.register("cat")(Cat)
    with pytest.raises(
        ImportError, match=r"the animal 'cat' of the package zoo 1\.0 .*ValueError \(The animal name 'cat' is taken"
    ):
        list(registry)
    assert registry.get("cat") is Cat


BROKEN = (
    r"the animal 'lion' of the package zoo 1\.0 cannot be loaded: its entry point 'zoo:Lion' in the group "
    r"'qsam\.animals' raised RuntimeError \(needs a newer CUDA\)\. Upgrade that package, or uninstall it\."
)


def test_an_entry_point_that_cannot_be_imported_is_named_each_time(plugin):
    plugin("raise RuntimeError('needs a newer CUDA')\n", "lion = zoo:Lion\n")
    registry = Registry("animal", entry_points="qsam.animals")
    registry.register("cat")(Cat)
    for ask in (lambda: registry.get("lion"), lambda: list(registry), lambda: "dog" in registry):
        for _ in range(2):
            with pytest.raises(ImportError, match=BROKEN) as caught:
                ask()
            assert isinstance(caught.value.__cause__, RuntimeError)
    assert registry.get("cat") is Cat


def test_a_broken_entry_point_does_not_hide_the_others(plugin):
    plugin("class Tiger: pass\n", "lion = zoo:Lion\ntiger = zoo:Tiger\n")
    registry = Registry("animal", entry_points="qsam.animals")
    assert registry.get("tiger").__name__ == "Tiger"
    with pytest.raises(ImportError, match=r"'zoo:Lion' .* raised AttributeError"):
        registry.get("lion")


def test_the_quantizers_of_the_library_are_registered():
    assert {"fixed_step", "identity", "lsq", "per_channel"} <= set(list_quantizers())
    assert QUANTIZERS.get("lsq") is LSQ


@pytest.mark.parametrize(
    ("methods", "missing"),
    [
        ({}, "init_ and forward"),
        ({"init_": lambda self, x: None}, "forward"),
        ({"forward": lambda self, x: x}, "init_"),
    ],
)
def test_a_quantizer_without_its_methods_is_refused(methods, missing):
    cls = type("Mine", (Quantizer,), methods)
    with pytest.raises(TypeError, match=f"the quantizer Mine does not implement {missing}\\."):
        register_quantizer("mine")(cls)
    assert "mine" not in QUANTIZERS


@pytest.mark.parametrize("thing", [nn.Linear, Identity(bits=4), lambda: None])
def test_what_is_no_quantizer_is_refused(thing):
    with pytest.raises(TypeError, match=r"a quantizer must be a subclass of qsam\.Quantizer, got"):
        register_quantizer("mine")(thing)
