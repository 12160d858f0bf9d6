"""Reading the standard GLUE download: `<folder>/{train,dev}.tsv`, tab-separated, one row a line, no quoting.

Many users have these files on disk. A byte order mark (MRPC has one) and Windows line ends are read away; only a line
feed ends a row, since the sentences hold other Unicode line separators; blank lines are not rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from recipes.glue_tasks import FileLayout, Row, parse_score

_Line = tuple[int, list[str]]


def read_rows(layout: FileLayout, path: Path) -> tuple[list[Row], int]:
    """Read one file of the GLUE download.

    Args:
        layout: the task's layout.
        path: the file.

    Returns:
        The rows in the order of the file, and how many short rows were skipped (only QQP may have some).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not UTF-8, lacks a column, has no rows, has a row with a wrong number of columns or a
            bad label (file and line are named), or more short rows than the task's official files.
    """
    lines = _lines(path)
    columns = list(layout.columns) or _header(lines)
    places = _places(layout, columns, path)
    rows, short = [], 0
    for number, cells in lines:
        if len(cells) < len(columns) and short < layout.max_short_rows:
            short += 1
        else:
            rows.append(_row(layout, cells, places, len(columns), f"{path}, line {number}"))
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows, short


def _lines(path: Path) -> Iterator[_Line]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. --glue-dir must name the folder of the standard GLUE download, "
            f"which holds {path.parent.name}/{path.name}."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, start=1):
                text = line.removesuffix("\n").removesuffix("\r")
                if text:
                    yield number, text.split("\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}).") from error


def _header(lines: Iterator[_Line]) -> list[str]:
    return next(lines, (1, []))[1]


def _places(layout: FileLayout, columns: Sequence[str], path: Path) -> list[int]:
    """Positions of the text columns and, last, of the label."""
    if not columns:
        raise ValueError(f"{path} has no rows.")
    for name in (*layout.texts, layout.label):
        if name not in columns:
            raise ValueError(f"{path} has no column {name!r}; its header is {', '.join(columns)}.")
    return [columns.index(name) for name in (*layout.texts, layout.label)]


def _row(layout: FileLayout, cells: Sequence[str], places: Sequence[int], width: int, where: str) -> Row:
    if len(cells) != width:
        raise ValueError(f"{where}: {len(cells)} columns where {width} are expected.")
    *texts, label = (cells[place] for place in places)
    return Row(texts[0], texts[1] if len(texts) > 1 else None, _label(layout, label, where))


def _label(layout: FileLayout, word: str, where: str) -> float:
    if not layout.label_words:
        try:
            return parse_score(word)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
    if word not in layout.label_words:
        raise ValueError(f"{where}: the label must be one of {', '.join(layout.label_words)}, got {word!r}.")
    return layout.label_words.index(word)
