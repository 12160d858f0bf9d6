"""Check all laws for one quantizer, over its settings and the battery of inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from qsam.quantizers import QUANTIZERS, Quantizer
from qsam.quantizers.base import GRANULARITIES
from qsam.registry import nearest
from qsam.testing.inputs import GROUP_SIZE, NARROWER, Case, battery, normal
from qsam.testing.laws import LAWS, Law


def check_quantizer(
    name_or_class: str | type[Quantizer],
    *,
    bits: int | Iterable[int] | None = None,
    signed: Iterable[bool] = (True, False),
    granularities: Iterable[str] = GRANULARITIES,
    axes: Iterable[int] = (0, 1),
    laws: Iterable[str] | None = None,
) -> Counter[str]:
    """Check that a quantizer keeps every law that applies to it.

    A setting that the class refuses with ValueError is skipped. A class that breaks a law on purpose says so in a
    class attribute ``exempt_laws: dict[str, str]``, law -> reason. The widest grid is checked on the whole battery of
    inputs, the narrower ones on ties and bounds.

    Args:
        name_or_class: A registered name, or a subclass of ``qsam.Quantizer``.
        bits: One width or several; None for 2 to 8.
        signed: Grids to check.
        granularities: Granularities to check. Activations (no axis) are checked with ``"per_tensor"``.
        axes: Channel dimensions of the weights, which have three dimensions.
        laws: Names in ``qsam.testing.LAWS``; None for all.

    Returns:
        The number of checks of each law, all of which it passed.

    Raises:
        AssertionError: A law is broken; the message has its name, the setting, the input, the property and the first
            offending values. Or the class refused every setting.
        RuntimeError: Python runs with ``-O``, which removes the assertions of the laws.
        TypeError: ``name_or_class`` is neither a name nor a quantizer class.
        ValueError: The quantizer or a law is unknown, or there is no setting to check.

    Example:
        >>> check_quantizer("lsq", bits=4, laws=["idempotent"])["idempotent"] > 100
        True
    """
    if not __debug__:
        raise RuntimeError("check_quantizer needs Python's assertions: run it without `python -O` (PYTHONOPTIMIZE).")
    cls = _resolve(name_or_class)
    chosen = _chosen(cls, laws)
    widths = range(2, 9) if bits is None else (bits,) if isinstance(bits, int) else bits
    asked_for = list(_settings(widths, signed, list(granularities), list(axes)))
    if not asked_for:
        raise ValueError("`bits`, `signed`, `granularities` and `axes` leave no setting to check.")
    taken = [(setting, q) for setting in asked_for if (q := _taken(cls, setting)) is not None]
    if not taken:
        raise AssertionError(f"{cls.__name__} refused every setting with ValueError: there was nothing to check.")
    widest = max(setting["bits"] for setting, _ in taken)
    asked: Counter[str] = Counter()
    for setting, q in taken:
        applying = [law for law in chosen if law.applies(q)]
        for label, (x, scale) in battery(q).items():
            if setting["bits"] < widest and label not in NARROWER:
                continue
            case = Case(cls, x, setting, scale, label)
            for law in applying:
                if law.inputs is None or label in law.inputs:
                    law(case)
                    asked[law.name] += 1
    return asked


def _resolve(name_or_class: str | type[Quantizer]) -> type[Quantizer]:
    if isinstance(name_or_class, str):
        return QUANTIZERS.get(name_or_class)
    if not (isinstance(name_or_class, type) and issubclass(name_or_class, Quantizer)):
        raise TypeError(f"`name_or_class` must be a registered name or a qsam.Quantizer class, got {name_or_class!r}.")
    return name_or_class


def _chosen(cls: type[Quantizer], laws: Iterable[str] | None) -> list[Law]:
    """Return the named laws, without those from which the class exempts itself."""
    exempt: dict[str, str] = getattr(cls, "exempt_laws", {})
    names = list(LAWS if laws is None else laws)
    for name in [*names, *exempt]:
        if name not in LAWS:
            raise ValueError(f"There is no law {name!r}.{nearest(str(name), list(LAWS))} See qsam.testing.LAWS.")
    if not all(exempt.values()):
        raise ValueError(f"{cls.__name__}.exempt_laws must give a reason for each law.")
    return [LAWS[name] for name in names if name not in exempt]


def _settings(
    bits: Iterable[int], signed: Iterable[bool], granularities: list[str], axes: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments of a quantizer: activations, and weights of each granularity along each axis."""
    kinds: list[tuple[str, int | None]] = [("per_tensor", None)] if "per_tensor" in granularities else []
    for granularity in granularities:
        kinds += [(granularity, axis) for axis in (axes[:1] if granularity == "per_tensor" else axes)]
    signs = list(signed)
    for width in bits:
        for sign in signs:
            for granularity, axis in kinds:
                size = GROUP_SIZE if granularity == "per_group" else None
                yield {"bits": width, "signed": sign, "granularity": granularity, "axis": axis, "group_size": size}


def _taken(cls: type[Quantizer], setting: dict[str, Any]) -> Quantizer | None:
    """Return a quantizer set from ordinary data, or None if the class refuses the setting with ValueError."""
    try:
        q = cls(**setting)
        q.observe_(normal(q))
    except ValueError:
        return None
    return q
