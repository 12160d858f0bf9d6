"""Which faults the tests provoke, and the page that is made from them.

    python -m tests.reliability    # writes docs/reliability.md

A test that provokes a fault says so with :func:`fault`; the page lists them all, so that nothing is claimed there that
is not tested.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"

MODULES = {
    "A process that is killed, a disk that is full": ("tests.recipes.test_kill", "tests.recipes.test_bert_glue"),
    "Files that are torn, foreign or newer": ("tests.optim.test_foreign_checkpoints", "tests.optim.test_checkpoints", "tests.units.test_spec_files"),
    "Exceptions and bad numbers in a step": ("tests.optim.test_exactness", "tests.optim.test_bad_numbers", "tests.test_batchnorm"),
    "Data that say nothing, and data that came first": ("tests.contract.test_first_data",),
    "Other hands on the model": ("tests.optim.test_guard", "tests.optim.test_taken_off", "tests.contract.test_one_owner", "tests.units.test_registry"),
}  # fmt: skip

INTRO = """# What goes wrong, what happens then, and what is kept

Written by `python -m tests.reliability` from the tests: each row is a fault that a test provokes, for every method that
it concerns. The contract behind it: outside the blocks the model holds exactly Q(w), the full-precision weights are
those of before the fault, and the next step works, unless the row says otherwise.
"""

LIMITS = """## What no test here can show

- Tested on CPUs and Linux only: no GPU was there, and no network file system.
- `SIGKILL` loses what the process had in memory; a power failure may also lose what the disk had promised. A recipe
  compares every file of a checkpoint with its checksum before it goes on from it.
- `torch.load` does not compare a file with its checksums: bits that flip within the tensors of a checkpoint are read as
  if nothing had happened. The recipes compare them first; with a training loop of your own, use
  `zipfile.ZipFile(path).testzip()`.
- `qsam.json` is a text that may be edited, and has no checksum of its own: a flipped bit that leaves it a valid spec is
  not noticed. The checksum of `qsam.safetensors` is in it.
- Infinity in the input of a quantized layer is clipped to its grid, as every value beyond it; NaN passes through.
- A NaN gradient in the pass that updates reaches the weights, as in any torch optimizer: use a `GradScaler` or stop on a
  loss that is not finite, as the recipe does. `max_grad_norm` does not stop it.
- After an exception in the middle of the base optimizer's step its moments and the float parameters are as torch leaves
  them; the quantized weights are rolled back.
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row of the page.

    Attributes:
        name: What goes wrong.
        happens: What the user sees.
        kept: What is not lost.
    """

    name: str
    happens: str
    kept: str


def fault(name: str, *, happens: str, kept: str) -> Callable[[Test], Test]:
    """Return a decorator for a test that provokes a fault; see :class:`Fault`."""

    def mark(test: Test) -> Test:
        test.fault = Fault(name, happens, kept)  # type: ignore[attr-defined]
        return test

    return mark


def faults_of(module: ModuleType) -> Iterator[tuple[Fault, str]]:
    """Yield the faults that the tests of a module provoke, with the test's name."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    for test in [*vars(module).values(), *(value for cls in classes for value in vars(cls).values())]:
        found = getattr(test, "fault", None)
        if isinstance(found, Fault):
            yield found, test.__name__


def page() -> str:
    """Return the page."""
    lines = [INTRO]
    for title, names in MODULES.items():
        lines += [f"## {title}", "", "| the fault | what happens | what is kept | test |", "|---|---|---|---|"]
        for name in names:
            path = name.replace(".", "/") + ".py"
            for found, test in faults_of(importlib.import_module(name)):
                cells = (found.name, found.happens, found.kept, f"[`{test}`](../{path})")
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join([*lines, LIMITS])


if __name__ == "__main__":
    from tests import reliability  # the tests import this module by its name: `Fault` must be the same class

    PAGE.write_text(reliability.page(), encoding="utf-8")
