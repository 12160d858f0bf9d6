"""The library of kernels: compiled once, kept where only its owner can write, and never in the way of training."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import qsam
from qsam.functional import fake_quantize
from qsam.fused import native
from qsam.fused.kernels import using

POSIX = pytest.mark.skipif(os.name == "nt", reason="there are no kernels on Windows")
ROOT = Path(qsam.__file__).parents[1]

PROCESS = """
import sys, torch
from qsam.fused import kernels, native
from qsam.functional import fake_quantize
x, s = torch.linspace(-3, 3, 70_001), torch.tensor([0.3], requires_grad=True)
out = fake_quantize(x, s, -4, 3)
out.sum().backward()
print(kernels._BACKEND.failure, out.double().sum().item(), s.grad.double().item(), "torch._inductor.compile_fx" in sys.modules)
"""
OPENMP = (
    PROCESS
    + """
print(sorted({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}))
"""
)


@pytest.fixture(autouse=True)
def _needs_compiler():
    try:
        native.find_compiler()
    except OSError as error:
        pytest.skip(f"no kernels here: {error}")
    with using("auto"):
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own, in a process that has loaded nothing, and a compiler in a hurry."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS))
    monkeypatch.setattr(native, "function", native.function.__wrapped__)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    return tmp_path / "qsam"


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so")) if folder.is_dir() else []


def counted(monkeypatch) -> list[list[str]]:
    """Return a list that grows by one with each file that is compiled."""
    found, run = [], native._run
    monkeypatch.setattr(
        native, "_run", lambda command: (found.append(command) if "-c" in command else None, run(command))[1]
    )
    return found


def started(code: str = PROCESS, **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, cwd=ROOT, **pipes)


def said(process: subprocess.Popen[str]) -> list[str]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out.split("\n")


def quantized() -> torch.Tensor:
    return fake_quantize(torch.linspace(-3, 3, 70_001), torch.tensor([0.3]), -4, 3)


def test_a_library_is_compiled_once_and_found_by_the_next_process(cache, monkeypatch):
    compiled = counted(monkeypatch)
    assert native.library() is not None
    (kept,) = libraries(cache)
    count = len(compiled)
    assert count >= 1
    assert native.library() is not None
    assert len(compiled) == count
    assert [path for path in cache.iterdir() if path != kept] == [], "nothing is left over"


def test_only_its_owner_can_write_to_the_cache_whatever_the_umask(cache):
    before = os.umask(0)
    try:
        native.library()
    finally:
        os.umask(before)
    for path in (cache, *libraries(cache)):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    native.refuse_foreign(cache)


def library_is_a_link(cache: Path, monkeypatch) -> None:
    (path,) = libraries(cache)
    path.rename(cache / "elsewhere")
    path.symlink_to(cache / "elsewhere")


SPOILED = {
    "the folder is open to the group": lambda cache, monkeypatch: cache.chmod(0o770),
    "its parent is open to all": lambda cache, monkeypatch: cache.parent.chmod(0o777),
    "the library is open to all": lambda cache, monkeypatch: libraries(cache)[0].chmod(0o777),
    "the library is a link": library_is_a_link,
    "all is another user's": lambda cache, monkeypatch: monkeypatch.setattr(os, "getuid", lambda: 12345),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_another_user_could_have_written_is_not_loaded(cache, monkeypatch, caplog, spoil):
    native.library()
    spoil(cache, monkeypatch)
    compiled = counted(monkeypatch)
    loaded = native.library()
    assert compiled, "it is compiled again"
    assert cache not in Path(loaded._name).parents
    assert "cannot keep its kernels" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x7fELF no library"])
def test_a_damaged_library_is_compiled_again(cache, monkeypatch, content):
    path = cache / f"sweeps-{native._key(native.find_compiler())}.so"
    cache.mkdir(mode=0o700)
    path.write_bytes(content)
    path.chmod(0o700)
    compiled = counted(monkeypatch)
    assert native.library()._name == str(path)
    assert compiled
    assert path.stat().st_size > 1000


@POSIX
def test_where_nothing_can_be_written_the_kernels_are_for_one_process(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder can be made below a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    loaded = native.library.__wrapped__()
    assert loaded.write_float is not None
    assert not Path(loaded._name).exists(), "nothing is left over"
    assert "cannot keep its kernels" in caplog.text


def test_the_key_holds_source_flags_compiler_and_processor(monkeypatch, tmp_path):
    found = native.find_compiler()
    keys = [native._key(found), native._key(found)]
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DX"))
    keys.append(native._key(found))
    monkeypatch.setattr(native, "_processor", lambda: ["another one"])
    keys.append(native._key(found))
    source = tmp_path / "sweeps.c"
    source.write_text("int x;")
    monkeypatch.setattr(native, "SOURCE", source)
    keys.append(native._key(found))
    keys.append(native._key([compiler(tmp_path / "cc", "print('another compiler 99')")]))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


@pytest.mark.long
def test_two_processes_at_once_agree_and_one_library_stays(tmp_path):
    processes = [started(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    found = {said(process)[0] for process in processes}
    assert len(found) == 1
    assert found.pop().startswith("None "), "no failure"
    assert [path.suffix for path in (tmp_path / "qsam").iterdir()] == [".so"]


@pytest.mark.long
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_do_not_depend_on_the_instructions_that_torch_uses(capability):
    first = said(started(ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS="1"))[0]
    assert first == said(started(OMP_NUM_THREADS="2"))[0]
    assert first.startswith("None ")
    assert first.endswith("False"), "torch's own compiler was not imported, but for what any optimizer imports"


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_second_openmp_is_loaded_and_a_kernel_uses_the_threads_that_torch_was_given():
    threads = "\nimport os; torch.set_num_threads(2); out = fake_quantize(x, s, -4, 3); print(len(os.listdir('/proc/self/task')) > 1)"
    lines = said(started(OPENMP + threads, OMP_NUM_THREADS="1"))
    assert lines[1].count("libgomp") + lines[1].count("libiomp") + lines[1].count("libomp") == 1
    exported = subprocess.run(["nm", "-D", native.library()._name], capture_output=True, text=True, check=False).stdout
    assert ("GOMP_parallel" not in exported and exported) or lines[2] == "True"


# --- no kernels ---------------------------------------------------------------------------------------------------------


def compiler(path: Path, code: str) -> str:
    """Write a compiler of one's own; return its path."""
    path.write_text(f"#!{sys.executable}\nimport os, sys\n{code}\n")
    path.chmod(0o700)
    return str(path)


def fails_to_compile(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path / "broken-cc", "sys.exit('internal compiler error')"))


def makes_nothing_that_loads(tmp_path: Path, monkeypatch) -> None:
    code = "open(sys.argv[sys.argv.index('-o') + 1], 'w').write('no library')"
    monkeypatch.setenv("CC", compiler(tmp_path / "odd-cc", code))
    monkeypatch.setattr(native, "_key", lambda compiler: "odd")


def is_absent(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


MISSING = {
    "the compiler fails": (fails_to_compile, "internal compiler error"),
    "what it makes does not load": (makes_nothing_that_loads, "(invalid ELF header|file too short|not a mach-o|slice is not valid)"),
    "there is none": (is_absent, "no C compiler was found: cc, gcc, clang"),
    "it is named wrongly": (lambda folder, patch: patch.setenv("CC", "no-such-compiler -m64"), "no C compiler was found: no-such-compiler"),
    "on Windows": (lambda folder, patch: patch.setattr(native, "IS_WINDOWS", True), "on Windows there are no kernels"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), MISSING.values(), ids=MISSING)
def test_without_kernels_auto_is_eager_says_so_once_and_the_cure_works(cache, tmp_path, monkeypatch, spoil, words):
    with using("eager"):
        expected = quantized()
    with monkeypatch.context() as patch:
        spoil(tmp_path, patch)
        with using("auto"):
            with pytest.warns(
                UserWarning, match=rf"(?s)cannot be compiled here.*{words}.*Install a C compiler or name one in"
            ):
                assert torch.equal(quantized(), expected)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(quantized(), expected)
        with using("compiled"), pytest.raises(OSError, match=words):
            quantized()
        with warnings.catch_warnings(), using("eager"):
            warnings.simplefilter("error")
            assert torch.equal(quantized(), expected)
    with warnings.catch_warnings(), using("compiled"):  # the compiler is back
        warnings.simplefilter("error")
        assert torch.equal(quantized(), expected)


def test_a_model_trains_without_a_compiler(cache, tmp_path, monkeypatch):
    is_absent(tmp_path, monkeypatch)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 4))
    with pytest.warns(UserWarning, match="cannot be compiled here"):
        optimizer = qsam.SQuAT(model, torch.optim.SGD, lr=0.1)
    x = torch.randn(400, 300)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("refused", [("-march=native",), ("-fopenmp", "-march=native", "-fopenmp-simd")])
def test_a_compiler_that_refuses_a_flag_is_used_without_it(cache, tmp_path, monkeypatch, refused):
    real = native.find_compiler()
    code = f"if set(sys.argv) & {set(refused)}: sys.exit('no such option')\nos.execvp({real[0]!r}, [*{real}, *sys.argv[1:]])"
    monkeypatch.setenv("CC", compiler(tmp_path / "plain-cc", code))
    with using("eager"):
        expected = quantized()
    with using("compiled"):
        assert torch.equal(quantized(), expected)
