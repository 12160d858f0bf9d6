"""The kernels of ``sweeps.c``: compiled once by the system's C compiler, kept on the disk, and called through ctypes.

The library gets addresses and sizes and uses nothing of torch, so no release of torch can break it. It is compiled for
OpenMP but not linked to a runtime: it uses the one that torch has loaded, and so obeys ``torch.set_num_threads``.

Another user who could write into the cache folder could run code in this process. So the folder and the library in it
are used only if they belong to this user and no other user can write to them. Otherwise, or if the folder cannot be
written, the library is compiled into a temporary folder for this process alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

_log = logging.getLogger("qsam")

IS_WINDOWS = os.name == "nt"

SOURCE = Path(__file__).with_name("sweeps.c")

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
"""With these the compiled code rounds exactly as torch's eager operations do."""

ATTEMPTS = (
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-fopenmp-simd",),
    (),
)
"""Tried in this order, because some compilers do not know their processor or OpenMP, and torch may not have loaded the
OpenMP runtime that the compiler needs (clang's on Linux, any on macOS). Without it a kernel runs on one thread."""

_SUFFIX = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTER, _SIZE, _NUMBER, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_GRID = (_POINTER, _SIZE, _SIZE, _NUMBER, _NUMBER, _NUMBER, _COUNT)

ROWS = {"write": 2, "backward": 3, "pull_back": 3, "scale_gradient": 3, "perturb": 3, "codes": 2}
"""The number of tensors that each kernel takes, all of one shape."""

SUMS = ("backward", "pull_back", "scale_gradient")
"""The kernels that sum up ds."""

_OTHERS = {"perturb": (_NUMBER,), **dict.fromkeys(SUMS, (_POINTER,))}
_ARGUMENTS = {name: ((_POINTER,) * count + _OTHERS.get(name, ()) + _GRID) for name, count in ROWS.items()}
_ARGUMENTS["rescale"] = (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _COUNT)

_COMPILER_SECONDS = 300.0


@functools.cache
def function(name: str, dtype: torch.dtype) -> Callable[..., float] | None:
    """Return the C function of this name and dtype or None; raise OSError if there is no library."""
    found = getattr(library(), f"{name}_{_SUFFIX.get(dtype)}", None)
    if found is not None:
        found.argtypes, found.restype = _ARGUMENTS[name], ctypes.c_double
    return found


def call(name: str, dtype: torch.dtype, *arguments: int | float | None) -> float:
    """Call a C function that exists, and return its result."""
    found = function(name, dtype)
    assert found is not None
    return found(*arguments)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library from the cache, or compile it; raise OSError if it cannot be compiled or loaded."""
    compiler = find_compiler()
    name = f"sweeps-{_key(compiler)}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        refuse_foreign(folder)
        return _kept(folder / name) or _build(compiler, folder, name)
    except CompilerError:
        raise
    except OSError as error:
        _log.warning("qsam cannot keep its kernels for the next process: %s", error)
    with tempfile.TemporaryDirectory(prefix="qsam-", ignore_cleanup_errors=True) as private:
        return _build(compiler, Path(private), name)  # once it is loaded, the file may go


class CompilerError(OSError):
    """There is no C compiler, or it cannot compile ``sweeps.c``; another folder would not help."""


def find_compiler() -> list[str]:
    """Return the command of the C compiler: ``$CC``, or the first of cc, gcc and clang on PATH; none on Windows."""
    if IS_WINDOWS:
        raise CompilerError("on Windows there are no kernels for the CPU")
    wanted = shlex.split(os.environ.get("CC", ""))
    for command in [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise CompilerError(f"no C compiler was found: {wanted[0] if wanted else 'cc, gcc, clang'} is not on PATH")


def cache_folder() -> Path:
    """Return the folder of the library: ``$XDG_CACHE_HOME/qsam``, by default ``~/.cache/qsam``."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsam"
    except RuntimeError as error:  # a process whose user has no home
        raise OSError(str(error)) from error


def _key(compiler: list[str]) -> str:
    """Return a digest of the source, the flags, the compiler with its version, and the processor."""
    version = _run([*compiler, "--version"]).stdout
    facts = [SOURCE.read_text(encoding="utf-8"), repr((FLAGS, ATTEMPTS, compiler)), version, *_processor()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]


def _processor() -> list[str]:
    """Return the machine and its instruction sets, because several machines may share a home."""
    facts = [platform.system(), platform.machine(), platform.processor()]
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if listed.is_file() else []
    facts += [line for line in lines if line.startswith(("model", "flags", "Features", "CPU "))]
    told = torch.cpu.get_capabilities()
    return [*facts, *(name for name, value in sorted(told.items()) if value is True)]


def refuse_foreign(folder: Path) -> None:
    """Raise a PermissionError if another user could put a file into this folder, or replace the folder."""
    _refuse_others(folder)
    _refuse_others(folder.parent, 0)


def _refuse_others(path: Path, *others: int) -> None:
    """Raise a PermissionError unless this user or one of ``others`` owns ``path`` and no other user can write to it."""
    found = path.stat() if path.is_dir() else path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid not in {os.getuid(), *others}:
        raise PermissionError(f"{path} belongs to another user or is a link")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(f"other users may write to {path}")


def _kept(path: Path) -> ctypes.CDLL | None:
    """Return the library of an earlier process, or None if there is none or it cannot be loaded."""
    if not os.path.lexists(path):
        return None
    _refuse_others(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _log.warning("qsam compiles its kernels again: %s", error)
        return None


def _build(compiler: list[str], folder: Path, name: str) -> ctypes.CDLL:
    """Compile the library and move it into ``folder`` in one step, so that no other process loads half a file."""
    _log.info("qsam compiles its kernels with %s", compiler[0])
    problem: OSError = CompilerError(f"{compiler[0]} compiles nothing")
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as place:
        unit, made = Path(place, "sweeps.o"), Path(place, name)
        for attempt in ATTEMPTS:
            compiled = _run([*compiler, *FLAGS, *attempt, "-c", str(SOURCE), "-o", str(unit)])
            linked = (
                compiled if compiled.returncode else _run([*compiler, "-shared", str(unit), "-o", str(made), "-lm"])
            )
            if linked.returncode:
                said = linked.stderr.strip().splitlines() or ["it said nothing"]
                problem = CompilerError(f"{compiler[0]} failed: {said[-1]}")
                continue
            try:
                ctypes.CDLL(str(made))
            except OSError as error:
                problem = error
                continue
            made.chmod(0o700)  # whatever the umask
            os.replace(made, folder / name)
            return ctypes.CDLL(str(folder / name))
    raise problem


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{command[0]} did not end within {_COMPILER_SECONDS:g} s") from error
