"""Keeping compiled kernels on the disk, so that a later process needs neither a compiler nor its import.

They are in the directory ``qsam`` of torch's own cache of kernels (TORCHINDUCTOR_CACHE_DIR): libraries under the hash
of what is in them, and for each kernel a JSON file that names its library and how to call it. A file is complete or
absent, since it is renamed into its place; several processes may write the same ones.

A kernel is found by a key of all that it depends on: our sources, its arguments, torch, Python, and the processor, for
which it was compiled. What is damaged, or belongs to another user, is not loaded: its kernel is compiled anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import getpass
import hashlib
import importlib.machinery
import inspect
import json
import logging
import os
import platform
import re
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qsam.native import Native, Plan

_log = logging.getLogger("qsam")

_SOURCES = ("compiling", "formulas", "functional", "kernel_build", "kernel_cache", "native")


def key(kernel: Callable[..., Any], dtypes: tuple[torch.dtype, ...], dims: int) -> str:
    """Return under what a kernel is kept.

    Raises:
        OSError: a source file cannot be read.
    """
    source = Path(inspect.getsourcefile(kernel) or "")
    facts = [_facts(), _digest(source.read_bytes()), kernel.__name__, [str(dtype) for dtype in dtypes], dims]
    return _digest(json.dumps(facts).encode())


def load(name: str) -> Native | None:
    """Return the kernel that is kept under this key; None: there is none that can be used."""
    entry = directory() / f"{name}.json"
    try:
        if not entry.exists():
            return None
        content = json.loads(_own(entry))
        plan = content["plan"]
        if content["digest"] != _digest_of(content["library"], plan):
            raise ValueError("it was changed")
        library = directory() / _file_name(content["library"])
        if _digest(_own(library)) != content["library"]:
            raise ValueError("its library was changed")
        return Native(Plan.from_json(plan), library)
    except (OSError, ImportError, AttributeError, ValueError, KeyError, TypeError) as error:
        _log.warning("qsam does not use the kernel %s: %s", entry, error)
        return None


def has(name: str) -> bool:
    """Whether something is kept under this key."""
    return (directory() / f"{name}.json").exists()


def store(plans: dict[str, Plan], library: Path) -> Path:
    """Keep a library and the plans of its functions, by their keys, and return where the library is now.

    Raises:
        OSError: the disk is full, or not ours.
    """
    place = directory()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    _refuse_foreign(place)
    content = library.read_bytes()
    digest = _digest(content)
    kept = place / _file_name(digest)
    if not kept.exists() or _digest(_own(kept)) != digest:
        _write(kept, content)
    for name, plan in plans.items():
        listed = json.loads(json.dumps(dataclasses.asdict(plan)))
        entry = {"library": digest, "plan": listed, "digest": _digest_of(digest, listed)}
        _write(place / f"{name}.json", json.dumps(entry).encode())
    return kept


def remove(name: str) -> None:
    """Forget what is kept under this key."""
    with contextlib.suppress(OSError):
        (directory() / f"{name}.json").unlink(missing_ok=True)


def directory() -> Path:
    """Return where kernels are kept: beside torch's, whose rule this is; its own function would import the compiler."""
    found = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if found:
        return Path(found) / "qsam"
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user)) / "qsam"


@functools.cache
def _facts() -> list[Any]:
    """Return what all kernels depend on. Caches and cores are not of the processor: a container may have fewer."""
    here = Path(__file__).parent
    processor = {name: value for name, value in torch.cpu.get_capabilities().items() if not _is_count(value)}
    return [
        [_digest((here / f"{name}.py").read_bytes()) for name in _SOURCES],
        [torch.__version__, torch.version.git_version],
        [sys.version, sys.platform, importlib.machinery.EXTENSION_SUFFIXES],
        [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()],
        sorted(processor.items()),
    ]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _file_name(digest: str) -> str:
    """Return a library's file name; a digest is nothing but digits."""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"not a digest: {digest!r}")
    return f"{digest}.so"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(library: str, plan: Any) -> str:
    return _digest(json.dumps([library, plan], sort_keys=True).encode())


def _own(file: Path) -> bytes:
    """Return what is in a file of ours.

    Raises:
        OSError: it is not ours, or cannot be read.
    """
    _refuse_foreign(file.parent)
    _refuse_others(file)
    return file.read_bytes()


def _refuse_foreign(place: Path) -> None:
    """Raise a PermissionError where somebody else could replace this directory or what is in it.

    The one above it may be root's.
    """
    _refuse_others(place)
    _refuse_others(place.parent, 0)


def _refuse_others(path: Path, *others: int) -> None:
    """Raise a PermissionError where this is not ours. Windows keeps its users apart by itself."""
    if not hasattr(os, "getuid"):
        return
    allowed = {os.getuid(), *others}
    found = path.stat() if path.is_dir() else path.lstat()
    if found.st_uid not in allowed or stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{path} belongs to another user")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(f"everybody may write to {path}")


def _write(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
