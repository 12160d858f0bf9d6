"""The private names of torch that qsam uses, each with the reason and with what happens where torch has it no more."""

from __future__ import annotations

import warnings

_SAID: set[str] = set()


def missing(name: str, consequence: str, error: BaseException) -> None:
    """Say once that a private name of torch cannot be used, and what follows.

    Args:
        name: What was asked for.
        consequence: What qsam does instead.
        error: What torch raised.
    """
    if name in _SAID:
        return
    _SAID.add(name)
    warnings.warn(
        f"this release of torch offers no {name} to qsam ({error!r}): {consequence}. A newer qsam may know this torch.",
        UserWarning,
        stacklevel=3,
    )
