"""Ascent directions, one file each; importing this package registers them."""

from qsam.optim.directions.base import DIRECTIONS, Ascent, Direction, register_direction
from qsam.optim.directions.sam import Sam

__all__ = ["DIRECTIONS", "Ascent", "Direction", "Sam", "register_direction"]
