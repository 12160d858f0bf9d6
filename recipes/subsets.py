"""Fixed random parts of a set of rows: the same on every machine, so that two runs speak of the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

SEED = 0
Row = TypeVar("Row")


def fixed_order(count: int) -> list[int]:
    """Return a random order of `range(count)` that is the same everywhere and always.

    Args:
        count: how many.

    Returns:
        The permutation drawn by numpy's legacy generator with seed 0, whose stream numpy has frozen.
    """
    order: list[int] = np.random.RandomState(SEED).permutation(count).tolist()
    return order


def part_of(rows: Sequence[Row], count: int) -> list[Row]:
    """Return `count` of the rows, or all if there are fewer, in their order; a part of what a larger `count` gives."""
    return [rows[index] for index in sorted(fixed_order(len(rows))[:count])]


def held_out(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Return the rows that stay and a fixed random part that is set apart.

    Raises:
        ValueError: if one of them would be empty.
    """
    held = round(fraction * len(rows))
    if not 0 < held < len(rows):
        raise ValueError(f"`--holdout` {fraction} of {len(rows)} training rows leaves nothing on one side.")
    order = fixed_order(len(rows))
    return [rows[i] for i in sorted(order[held:])], [rows[i] for i in sorted(order[:held])]


def held_out_words(count: int) -> str:
    """Say what `held_out` sets apart."""
    return f"{count:,} training rows that are held out of training (a fixed random part), not the dev set"
