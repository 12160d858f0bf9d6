"""The table of laws: name -> law, filled by the decorator :func:`law`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qsam.quantizers import Quantizer
from qsam.testing.case import Case


def any_quantizer(q: Quantizer) -> bool:
    """Whether a universal law applies: always."""
    return True


@dataclass(frozen=True)
class Law:
    """One property that a quantizer has; calling it with a :class:`Case` raises AssertionError where it does not hold.

    Args:
        name: The law's name, which is also the name of the function that states it.
        check: Raises AssertionError with one sentence.
        applies: Whether the law is meant for a given quantizer.
        inputs: Labels of the battery on which :func:`check_quantizer` asks it; None for all. A matter of cost only:
            a law holds for every finite input.
    """

    name: str
    check: Callable[[Case], None]
    applies: Callable[[Quantizer], bool]
    inputs: frozenset[str] | None

    def __call__(self, case: Case) -> None:
        """Raise AssertionError, naming the law and the case, if the law does not hold."""
        try:
            self.check(case)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {case}: {error}") from None
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{self.name}: {case}: the quantizer raised {kind}: {error}") from error


LAWS: dict[str, Law] = {}
"""All laws by name, the universal ones first."""


def law(
    applies: Callable[[Quantizer], bool] = any_quantizer, inputs: tuple[str, ...] | None = None
) -> Callable[[Callable[[Case], None]], Law]:
    """Return a decorator that enters a function into :data:`LAWS` under its own name.

    Args:
        applies: Which quantizers the law is for.
        inputs: Labels of the battery; None for all.
    """

    def add(check: Callable[[Case], None]) -> Law:
        name = check.__name__
        LAWS[name] = Law(name, check, applies, None if inputs is None else frozenset(inputs))
        return LAWS[name]

    return add
