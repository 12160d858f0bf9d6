"""The kernels of ``sweeps.c``: compiled once by the system's C compiler, kept on the disk, and called through ctypes.

The library sees addresses and sizes and nothing of torch, so no release of torch can break it. It is compiled for
OpenMP but not linked to a runtime: it finds the one that torch has loaded, and ``torch.set_num_threads`` holds.

Another user who could write into the folder of the cache could run code in this process. So the folder and the library
in it are used only if they belong to this user and nobody else can write to them; otherwise, and where the folder
cannot be written at all, the library is compiled into a private temporary folder, for this process alone.
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
"""None of these lets the compiler round otherwise than torch's eager operations do."""

ATTEMPTS = (
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-fopenmp-simd",),
    (),
)
"""Tried one after the other: not every compiler knows its own processor or OpenMP, nor has torch always loaded the
OpenMP runtime that the compiler counts on (clang's on Linux, any on macOS); without it, a kernel runs on one thread."""

_SUFFIX = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTER, _SIZE, _NUMBER, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_GRID = (_POINTER, _SIZE, _SIZE, _NUMBER, _NUMBER, _NUMBER, _COUNT)

ROWS = {"write": 2, "backward": 3, "pull_back": 3, "scale_gradient": 3, "perturb": 3, "codes": 2}
"""How many tensors each kernel takes, all of one shape."""

SUMS = ("backward", "pull_back", "scale_gradient")
"""The kernels that sum up ds."""

_OTHERS = {"perturb": (_NUMBER,), **dict.fromkeys(SUMS, (_POINTER,))}
_ARGUMENTS = {name: ((_POINTER,) * count + _OTHERS.get(name, ()) + _GRID) for name, count in ROWS.items()}
_ARGUMENTS["rescale"] = (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _COUNT)

_COMPILER_SECONDS = 300.0


@functools.cache
def function(name: str, dtype: torch.dtype) -> Callable[..., float] | None:
    """Return the C function of this name for tensors of this dtype; None if there is none.

    Raises:
        OSError: the library cannot be compiled or loaded; the message says why.
    """
    found = getattr(library(), f"{name}_{_SUFFIX.get(dtype)}", None)
    if found is not None:
        found.argtypes, found.restype = _ARGUMENTS[name], ctypes.c_double
    return found


def call(name: str, dtype: torch.dtype, *arguments: int | float | None) -> float:
    """Call a C function that there is; return what it returns."""
    found = function(name, dtype)
    assert found is not None
    return found(*arguments)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library: from the cache, or compiled now.

    Raises:
        OSError: there is no compiler, it fails, or what it makes cannot be loaded.
    """
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
    """There is no C compiler, or it does not compile ``sweeps.c``: another folder would not help."""


def find_compiler() -> list[str]:
    """Return the command of the C compiler: ``$CC``, or the first of cc, gcc and clang on PATH.

    Raises:
        CompilerError: there is none, or the system is Windows, where the kernels are not supported.
    """
    if IS_WINDOWS:
        raise CompilerError("on Windows there are no kernels for the CPU")
    wanted = shlex.split(os.environ.get("CC", ""))
    for command in [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise CompilerError(f"no C compiler was found: {wanted[0] if wanted else 'cc, gcc, clang'} is not on PATH")


def cache_folder() -> Path:
    """Return where the library is kept: ``$XDG_CACHE_HOME/qsam``, by default ``~/.cache/qsam``."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsam"
    except RuntimeError as error:  # a process whose user has no home
        raise OSError(str(error)) from error


def _key(compiler: list[str]) -> str:
    """Return what tells one library from another: source, flags, compiler with its version, and processor."""
    version = _run([*compiler, "--version"]).stdout
    facts = [SOURCE.read_text(encoding="utf-8"), repr((FLAGS, ATTEMPTS, compiler)), version, *_processor()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]


def _processor() -> list[str]:
    """Return the machine, and all that Linux or torch tell of its instructions; homes are shared by machines."""
    facts = [platform.system(), platform.machine(), platform.processor()]
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if listed.is_file() else []
    facts += [line for line in lines if line.startswith(("model", "flags", "Features", "CPU "))]
    told = torch.cpu.get_capabilities()
    return [*facts, *(name for name, value in sorted(told.items()) if value is True)]


def refuse_foreign(folder: Path) -> None:
    """Raise a PermissionError if somebody else could put a file into this folder, or another folder in its place."""
    _refuse_others(folder)
    _refuse_others(folder.parent, 0)


def _refuse_others(path: Path, *others: int) -> None:
    """Raise a PermissionError unless this user, or one of ``others``, owns this and nobody else can write to it."""
    found = path.stat() if path.is_dir() else path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid not in {os.getuid(), *others}:
        raise PermissionError(f"{path} belongs to another user or is a link")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(f"other users may write to {path}")


def _kept(path: Path) -> ctypes.CDLL | None:
    """Return the library of an earlier process; None if there is none that can be loaded."""
    if not os.path.lexists(path):
        return None
    _refuse_others(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _log.warning("qsam compiles its kernels again: %s", error)
        return None


def _build(compiler: list[str], folder: Path, name: str) -> ctypes.CDLL:
    """Compile the library and move it into ``folder`` in one step, so that no other process sees half of it.

    Raises:
        CompilerError: no attempt compiles.
        OSError: one compiles, but this folder's files cannot be loaded, or cannot be written.
    """
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
