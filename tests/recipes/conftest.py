"""The fixtures of every test of the recipe."""

from tests.recipes.tiny_glue import glue, tiny

__all__ = ["glue", "tiny"]
