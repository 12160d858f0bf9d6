"""The catalogue of wrong calls: what each raises, word for word, with the code as it stands in the catalogue's files."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

CHAPTERS = {
    "Quantizing a model": "tests.wrong_calls.quantizing",
    "Rules": "tests.wrong_calls.rules",
    "Building an optimizer": "tests.wrong_calls.building",
    "The order of calls": "tests.wrong_calls.order",
    "Checkpoints and spec files": "tests.wrong_calls.files",
    "BatchNorm": "tests.wrong_calls.batchnorm",
    "Measuring": "tests.wrong_calls.measuring",
    "Quantizers of your own": "tests.wrong_calls.quantizers",
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"

INTRO = """# What the errors say

Written by `python -m tests.wrong_calls` from the catalogue in `tests/wrong_calls/`: every call here is made by a test,
which compares the error word for word and checks that model, optimizer and files are as they were before. `TypeError`
is a wrong kind of thing, `ValueError` a wrong value, `RuntimeError` a wrong order of calls. In the code `model` is a
float model of three layers, `quantized` one that `quantize_` was called on, `optimizer` a `SQuAT` and `qat` a `QAT`
round it, `closure` what `step` takes, `folder` a path.
"""


@dataclasses.dataclass(frozen=True)
class WrongCall:
    """One entry.

    Attributes:
        call: Makes the call; its parameters name what it needs.
        kind: What it raises.
        message: The whole message, with FOLDER for the temporary folder.
    """

    call: Callable[..., object]
    kind: type[BaseException]
    message: str

    @property
    def needs(self) -> list[str]:
        """What the call is made with."""
        return list(inspect.signature(self.call).parameters)


def wrong(kind: type[BaseException], message: str) -> Callable[[Callable[..., object]], WrongCall]:
    """Return a decorator that makes an entry of a function, and adds it to the ``ENTRIES`` of the function's module."""

    def enter(call: Callable[..., object]) -> WrongCall:
        entry = WrongCall(call, kind, message)
        call.__globals__.setdefault("ENTRIES", []).append(entry)  # type: ignore[attr-defined]
        return entry

    return enter


def chapters() -> Iterator[tuple[str, list[tuple[WrongCall, str]]]]:
    """Yield each chapter's title, and its entries with their code."""
    for title, name in CHAPTERS.items():
        module = importlib.import_module(name)
        yield title, list(zip(module.ENTRIES, _codes(Path(str(module.__file__))), strict=True))


def _codes(file: Path) -> Iterator[str]:
    """Yield the body of each entry in a file, in one line."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "_":
            yield "; ".join(" ".join(ast.unparse(statement).split()) for statement in node.body)


def page() -> str:
    """Return the page."""
    lines = [INTRO]
    for title, entries in chapters():
        lines += [f"## {title}", "", "| the call | raises | and says |", "|---|---|---|"]
        for entry, code in entries:
            cells = (f"`{code}`", f"`{entry.kind.__name__}`", entry.message)
            lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
