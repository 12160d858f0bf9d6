"""Print the budgets of the library's size, and fail if one is exceeded: ``python -m tests.budgets``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qsam"
LINES_OF_PACKAGE = 7_500
LINES_OF_A_STEP = 3_800
FILES_OF_A_STEP = 16
OWN_CLASSES = 2
LINES_OF_A_FUNCTION = 60


def files_entered(call: Callable[[], Any]) -> set[Path]:
    """Return the files of ``qsam/`` in which a function runs during ``call``."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    paths = {Path(name).resolve() for name in entered}
    return {path for path in paths if PACKAGE in path.parents}


def files_of_a_step(method: str) -> set[Path]:
    """Return the files that a later step of a method enters, with a closure on a small quantized model."""
    import torch
    from torch import nn

    from qsam.optim import OPTIMIZERS

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = OPTIMIZERS.get(method)(model, torch.optim.AdamW, lr=1e-3)
    x = torch.randn(16, 8)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return files_entered(lambda: optimizer.step(closure))


def lines_of(paths: Any) -> int:
    """Return the number of lines of these files together."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def functions() -> Iterator[tuple[int, str]]:
    """Yield the lines of each function of the package without those of its docstring, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                words = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
                yield node.end_lineno - node.lineno + 1 - words, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def own_classes(method: str) -> list[type]:
    """Return the classes of ours in a method's MRO beside its own."""
    from qsam.optim import OPTIMIZERS

    return [cls for cls in OPTIMIZERS.get(method).__mro__[1:] if cls.__module__.startswith("qsam.")]


def report() -> list[tuple[str, int, int, str]]:
    """Return each budget: its name, the value, the limit, and what it is the value of."""
    from qsam.optim import OPTIMIZERS

    saq, squat = files_of_a_step("saq"), files_of_a_step("squat")
    longest = max(functions())
    widest = max(OPTIMIZERS, key=lambda name: len(own_classes(name)))
    names = ", ".join(cls.__name__ for cls in own_classes(widest))
    return [
        ("lines of qsam/", lines_of(PACKAGE.rglob("*.py")), LINES_OF_PACKAGE, ""),
        ("lines of the files that a step of SAQ enters", lines_of(saq), LINES_OF_A_STEP, ""),
        ("files that a step of SAQ enters", len(saq), FILES_OF_A_STEP, short(saq)),
        ("files that a step of SQuAT enters", len(squat), FILES_OF_A_STEP, short(squat - saq)),
        ("own classes in a method's MRO beside its own", len(own_classes(widest)), OWN_CLASSES, f"{widest}: {names}"),
        ("lines of the longest function", longest[0], LINES_OF_A_FUNCTION, longest[1]),
        ("classes spread over files", len(spread_classes()), 0, ", ".join(spread_classes())),
    ]


def spread_classes() -> list[str]:
    """Return the classes that declare attributes which they never set: each is a part of a class in another file."""
    spread = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        plain = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and not n.decorator_list)
        spread += [node.name for node in plain if declared(node) - assigned(node) and not is_record(node)]
    return spread


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a NamedTuple or a Protocol, whose declarations are its definition."""
    return any(isinstance(base, ast.Name) and base.id in {"NamedTuple", "Protocol", "TypedDict"} for base in node.bases)


def declared(node: ast.ClassDef) -> set[str]:
    """Return the attributes that a class declares without a value."""
    bare = (n for n in node.body if isinstance(n, ast.AnnAssign) and n.value is None)
    return {n.target.id for n in bare if isinstance(n.target, ast.Name)}


def assigned(node: ast.ClassDef) -> set[str]:
    """Return the attributes of ``self`` that the methods of a class assign, or register as buffers."""
    stored = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    names = [n.args[0] for n in calls if n.func.attr == "register_buffer"]
    return stored | {n.value for n in names if isinstance(n, ast.Constant)}


def short(paths: set[Path]) -> str:
    """Return the paths within the package, sorted."""
    return " ".join(sorted(str(path.relative_to(PACKAGE).with_suffix("")) for path in paths))


def main() -> int:
    """Print the table; return 1 if a budget is exceeded."""
    rows = report()
    for name, value, limit, detail in rows:
        print(
            f"{'over' if value > limit else 'ok':5}{value:7,} of {limit:5,}  {name}"
            + (f" ({detail})" if detail else "")
        )
    return int(any(value > limit for _, value, limit, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
