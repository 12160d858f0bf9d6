"""Ascent directions, one file each; importing this package registers them."""

from qsam.optim.directions.asam import Asam
from qsam.optim.directions.base import DIRECTIONS, Ascent, Direction, global_norm, register_direction
from qsam.optim.directions.friendly import Friendly
from qsam.optim.directions.grid import Grid
from qsam.optim.directions.lookahead import Lookahead
from qsam.optim.directions.momentum import Momentum
from qsam.optim.directions.previous import Previous
from qsam.optim.directions.random import Random
from qsam.optim.directions.sam import Sam

__all__ = [
    "DIRECTIONS",
    "Asam",
    "Ascent",
    "Direction",
    "Friendly",
    "Grid",
    "Lookahead",
    "Momentum",
    "Previous",
    "Random",
    "Sam",
    "global_norm",
    "register_direction",
]
