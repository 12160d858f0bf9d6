"""Kernels that are kept on the disk: found by a later process without the compiler, and never trusted blindly."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsam import compiling, formulas, kernel_build, kernel_cache, kernels
from qsam.native import Native, Plan

CPU = torch.device("cpu")
KERNELS = [getattr(formulas, name) for name in "write backward distance scale_gradient pull_back".split()]
POSIX = pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows keeps its users apart by itself")
WRITE = ((torch.float32,) * 3, 1)
PROCESS = """
import sys, torch
from qsam import compiling, formulas
kernel, dtype = formulas.write, torch.float32
call = compiling.compiled(kernel, (dtype, dtype, dtype), 1, torch.device("cpu"))
x, out = torch.linspace(-3, 3, 1001), torch.zeros(1001)
call(x, out, torch.tensor([0.3]), torch.tensor([-4.0, 3.0]))
print(type(call).__name__, "torch._inductor" in sys.modules, "torch._dynamo" in sys.modules, out.double().sum().item())
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A directory in which a process has kept the kernels of a step."""
    place = tmp_path_factory.mktemp("inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
        fresh(formulas.write, *WRITE, kernels._of_a_step)
        compiling._BUILT.clear()
    return place


@pytest.fixture
def cache(first, tmp_path, monkeypatch):
    """A copy of it."""
    place = tmp_path / "inductor"
    (place / "qsam").mkdir(parents=True, mode=0o700)
    for file in (first / "qsam").iterdir():
        (place / "qsam" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    return place / "qsam"


def fresh(kernel, dtypes, dims, companions=lambda *_: ()):
    """As a process that has compiled nothing yet."""
    compiling._BUILT.clear()
    return compiling.compiled.__wrapped__(kernel, dtypes, dims, CPU, companions)


def no_compiler(*_: object) -> None:
    raise RuntimeError("the compiler was called")


def dtypes_of(kernel):
    return (torch.float32,) * (len(inspect.signature(kernel).parameters) - 1)


def entry(cache: Path) -> Path:
    return cache / f"{kernel_cache.key(formulas.write, *WRITE)}.json"


def started(cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROCESS], env=env, cwd=Path(__file__).parent.parent, **pipes)


def said(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def test_a_later_process_imports_no_compiler(cache):
    assert said(started(cache)).split()[:3] == ["Native", "False", "False"]


def test_a_kernels_companions_are_one_library_with_it(cache, monkeypatch):
    monkeypatch.setattr(kernel_build, "library", no_compiler)
    assert len(list(cache.glob("*.so"))) == 1
    assert {type(fresh(kernel, dtypes_of(kernel), 1)) for kernel in KERNELS} == {Native}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__.strip("_"))
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_kept_kernel_is_its_formula_at_all_sizes_and_thread_counts(cache, kernel, threads):
    call = fresh(kernel, dtypes_of(kernel), 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (1, 2, 15, 16, 17, 1001, 70_001):
            rows = [
                torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(len(dtypes_of(kernel)) - 1)
            ]
            others = [torch.tensor([0.3]), torch.tensor([-4.0, 3.0])]
            ours, theirs = [t.clone() for t in rows], [t.clone() for t in rows]
            found, expected = call(*ours, *others), kernel(*theirs, *others)
            assert all(map(torch.equal, ours, theirs))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def broken_library(cache):
    for file in cache.glob("*.so"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def short_library(cache):
    for file in cache.glob("*.so"):
        file.write_bytes(b"")


def absent_library(cache):
    for file in cache.glob("*.so"):
        file.unlink()


def no_json(cache):
    entry(cache).write_text("{", encoding="utf-8")


def other_json(cache):
    entry(cache).write_text("[1]", encoding="utf-8")


def other_plan(cache):
    """The call of another kernel: as sound as the real one, to the eye."""
    found = json.loads(entry(cache).read_text(encoding="utf-8"))
    found["plan"]["arguments"][:2] = reversed(found["plan"]["arguments"][:2])
    entry(cache).write_text(json.dumps(found), encoding="utf-8")


def other_path(cache):
    found = json.loads(entry(cache).read_text(encoding="utf-8"))
    found["library"] = "../../evil"
    found["digest"] = kernel_cache._digest_of(found["library"], found["plan"])
    entry(cache).write_text(json.dumps(found), encoding="utf-8")


DAMAGES = [broken_library, short_library, absent_library, no_json, other_json, other_plan, other_path]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_loaded(cache, damage, monkeypatch):
    damage(cache)
    assert kernel_cache.load(entry(cache).stem) is None
    monkeypatch.setattr(kernel_build, "library", no_compiler)
    with pytest.raises(RuntimeError, match="the compiler was called"):
        fresh(formulas.write, *WRITE)


def test_what_is_damaged_is_compiled_anew(cache):
    broken_library(cache)
    assert isinstance(fresh(formulas.write, *WRITE), Native)
    assert kernel_cache.load(entry(cache).stem) is not None


def test_a_kept_kernel_that_is_not_its_formula_is_compiled_anew(cache, monkeypatch):
    """A sound entry of the wrong function: only trying it out tells."""
    found = json.loads(entry(cache).read_text(encoding="utf-8"))
    plan = Plan.from_json(found["plan"])
    scale, limits = plan.arguments[1:3]
    wrong = dataclasses.replace(plan, arguments=(plan.arguments[0], limits, scale, *plan.arguments[3:]))
    kernel_cache.store({entry(cache).stem: wrong}, cache / f"{found['library']}.so")
    assert kernel_cache.load(entry(cache).stem) is not None
    monkeypatch.setattr(kernel_build, "library", no_compiler)
    with pytest.raises(RuntimeError, match="the compiler was called"):
        fresh(formulas.write, *WRITE)
    assert not entry(cache).exists()


@POSIX
def test_nothing_of_another_user_is_loaded_or_written(cache, monkeypatch, caplog):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert kernel_cache.load(entry(cache).stem) is None
    assert "belongs to another user" in caplog.text
    with pytest.raises(PermissionError, match="belongs to another user"):
        kernel_cache.store({}, next(cache.glob("*.so")))


@POSIX
def test_nothing_is_loaded_from_where_everybody_may_write(cache):
    cache.chmod(0o777)
    assert kernel_cache.load(entry(cache).stem) is None
    cache.chmod(0o700)
    assert kernel_cache.load(entry(cache).stem) is not None


@POSIX
def test_a_link_is_not_followed(cache):
    library = next(cache.glob("*.so"))
    library.rename(cache / "elsewhere")
    library.symlink_to(cache / "elsewhere")
    assert kernel_cache.load(entry(cache).stem) is None


@pytest.mark.long
def test_where_nothing_can_be_kept_the_kernels_run_all_the_same(cache, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    for file in cache.iterdir():
        file.unlink()
    monkeypatch.setattr(kernel_cache, "_write", full)
    assert isinstance(fresh(formulas.write, *WRITE, lambda *_: [(formulas.distance, *WRITE)]), Native)
    assert "the disk is full" in caplog.text
    monkeypatch.setattr(kernel_build, "library", no_compiler)
    assert isinstance(compiling.compiled.__wrapped__(formulas.distance, *WRITE, CPU), Native)


@pytest.mark.long
def test_two_processes_at_once_agree(cache):
    for file in cache.iterdir():
        file.unlink()
    processes = [started(cache) for _ in range(2)]
    found = {said(process).split()[-1] for process in processes}
    assert found == {said(started(cache)).split()[-1]}
    assert not [file for file in cache.iterdir() if file.suffix not in {".so", ".json"}]


def test_the_key_holds_kernel_dtypes_dimensions_and_processor(monkeypatch):
    kinds = [(formulas.write, *WRITE), (formulas.distance, *WRITE), (formulas.write, WRITE[0], 2)]
    kinds.append((formulas.write, (torch.bfloat16, torch.bfloat16, torch.float32), 1))
    names = {kernel_cache.key(*kind) for kind in kinds}
    monkeypatch.setattr(kernel_cache, "_facts", kernel_cache._facts.__wrapped__)
    assert kernel_cache.key(*kinds[0]) in names
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "num_logical_cores": 2})
    names.add(kernel_cache.key(*kinds[0]))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    names.add(kernel_cache.key(*kinds[0]))
    assert len(names) == 6


@pytest.mark.long
def test_kernels_are_kept_where_torch_keeps_its_own(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    code = "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert kernel_cache.directory() == Path(done.stdout.strip()) / "qsam"


# --- kernels of other forms -----------------------------------------------------------------------------------------


def counted(x, out, scale, limits):
    """Writes another dtype, and returns an integer."""
    out.copy_((x / scale).round().clamp(*limits.unbind()).to(torch.int8))
    return (x / scale).abs().amax(-1, keepdim=True)


def averaged(x, out, scale, limits):
    """Two functions: the second sweep needs the first one's result."""
    out.copy_(torch.cumsum(x / scale, -1) @ torch.ones(x.shape[-1]) + x * limits[0])


@pytest.mark.parametrize("dims", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_kernel_may_write_integers(cache, dims):
    call = fresh(counted, (torch.float32, torch.int8, torch.float32), dims)
    assert isinstance(call, Native)
    x = torch.randn(5, 33) if dims == 2 else torch.randn(33)
    others = [torch.full((5, 1) if dims == 2 else (1,), 0.1), torch.tensor([-8.0, 7.0])]
    ours, theirs = (torch.zeros_like(x, dtype=torch.int8) for _ in range(2))
    assert torch.equal(call(x, ours, *others), counted(x, theirs, *others))
    assert torch.equal(ours, theirs)


def test_a_kernel_that_is_not_one_function_is_unfit():
    examples = [compiling._examples(averaged, (torch.float32,) * 3, 1, CPU, small=small) for small in (False, True)]
    with torch.no_grad(), pytest.raises((kernel_build.Unfit, AssertionError, AttributeError, TypeError)):
        kernel_build.draft(averaged, *examples, "averaged")


def test_what_is_unfit_is_called_through_torch_compile(cache, monkeypatch, caplog):
    def unfit(*_: object) -> None:
        raise kernel_build.Unfit("for a test")

    monkeypatch.setattr(kernel_build, "draft", unfit)
    called = []
    monkeypatch.setattr(torch, "compile", lambda kernel, **options: called.append(options) or kernel)
    entry(cache).unlink()
    assert not isinstance(fresh(formulas.write, *WRITE), Native)
    assert called == [{"fullgraph": True, "dynamic": True}]
    assert "for a test" in caplog.text


@pytest.mark.parametrize(
    "change",
    [{"arguments": (0, 99)}, {"arguments": (-1, 0)}, {"returned": (3,)}, {"sizes": ((7,),)}, {"function": "a b"}],
    ids=str,
)
def test_a_plan_that_cannot_be_followed_is_refused(change):
    plan = Plan("kernel_0", 2, (("float32", ((),)),), ((0,),), (0, 1, 2, 3), (0,))
    assert Plan.from_json(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan
    with pytest.raises(ValueError, match="not the plan of a kernel"):
        Plan.from_json(json.loads(json.dumps({**dataclasses.asdict(plan), **change})))


def test_the_library_is_named_by_its_content(cache):
    for file in cache.glob("*.so"):
        assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.long
def test_a_library_that_cannot_be_loaded_where_it_is_kept_is_loaded_where_it_was_built(cache, monkeypatch, caplog):
    entry(cache).unlink()
    tried = []

    def picky(plan, library):
        tried.append(library)
        if library.parent == cache:
            raise ImportError("failed to map segment")
        return Native(plan, library)

    monkeypatch.setattr(compiling, "Native", picky)
    assert isinstance(fresh(formulas.write, *WRITE), Native)
    assert "failed to map segment" in caplog.text
    assert len({library.parent for library in tried}) == 2


@pytest.mark.long
def test_a_library_that_cannot_be_loaded_at_all_is_a_failure_of_the_compiler(cache, monkeypatch):
    entry(cache).unlink()

    def none(plan, library):
        raise ImportError("failed to map segment")

    monkeypatch.setattr(compiling, "Native", none)
    with pytest.raises(compiling.ERRORS, match="compiled kernels cannot be loaded"):
        fresh(formulas.write, *WRITE)
