"""A registry of classes by name, which other packages extend through entry points."""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """Return " Did you mean ...?" for the names in ``known`` that look like ``name``, or an empty string.

    Example:
        >>> nearest("lsg", ["lsq", "identity"])
        " Did you mean 'lsq'?"
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


class Registry(Generic[T]):
    """Classes by name: ``kind`` is for messages, and ``check`` raises if a class does not implement the interface.

    The package entry points of the group ``entry_points`` are imported the first time a name is looked up.
    """

    def __init__(
        self, kind: str, check: Callable[[type[T]], None] | None = None, entry_points: str | None = None
    ) -> None:
        self.kind = kind
        self._check = check
        self._entry_points = entry_points
        self._classes: dict[str, type[T]] = {}
        self._options: dict[str, dict[str, Any]] = {}
        self._broken: list[tuple[str, Exception]] = []

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a decorator that registers a class as ``name``.

        Raises:
            TypeError: ``name`` is not a string, or the class does not implement the interface.
            ValueError: The name is taken (by the same class too, because a module that is imported twice is a mistake).
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"A {self.kind}'s name must be a non-empty string, got {name!r}.")

        def add(cls: type[T]) -> type[T]:
            if (owner := self._classes.get(name)) is not None:
                taken = f"{owner.__module__}.{owner.__qualname__}"
                raise ValueError(f"The {self.kind} name {name!r} is taken by {taken}: choose another.")
            if self._check is not None:
                self._check(cls)
            self._classes[name] = cls
            return cls

        return add

    def alias(self, name: str, cls: type[T], **options: Any) -> None:
        """Register ``name`` for a class that has a name already, built with ``options`` (:meth:`options`)."""
        self.register(name)(cls)
        self._options[name] = options

    def options(self, name: str) -> Mapping[str, Any]:
        """Return the arguments that belong to a name and not to its class: those of an alias."""
        return self._options.get(name, {})

    def get(self, name: str) -> type[T]:
        """Return the class registered as ``name``.

        Raises:
            ValueError: There is none; the message names the nearest.
            ImportError: There is none, and a package that may have it cannot be imported.
        """
        if name not in self._classes:
            self._load_entry_points()
        if name not in self._classes:
            known = list(self)
            hint = nearest(str(name), known) or f" Registered: {', '.join(known)}."
            raise ValueError(f"There is no {self.kind} {name!r}.{hint}")
        return self._classes[name]

    def name_of(self, cls: type[T]) -> str | None:
        """Return the name under which ``cls`` is registered, or None."""
        return next((name for name, known in self._classes.items() if known is cls), None)

    def __iter__(self) -> Iterator[str]:
        """Iterate over all names, sorted; raise ImportError if a package with an entry point cannot be imported."""
        self._load_entry_points()
        for sentence, error in self._broken:
            raise ImportError(sentence) from error
        return iter(sorted(self._classes))

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def _load_entry_points(self) -> None:
        """Import the entry points once. An error is kept for later, so that it does not hide the others."""
        if self._entry_points is None:
            return
        group, self._entry_points = self._entry_points, None
        for point in importlib.metadata.entry_points(group=group):
            try:
                loaded = point.load()
                # A module registers its classes when it is imported; any other class gets the name of its point.
                if isinstance(loaded, type) and loaded not in self._classes.values():
                    self.register(point.name)(loaded)
            except Exception as error:  # the import of a foreign package may raise anything
                package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
                sentence = (
                    f"the {self.kind} {point.name!r} of the package {package} cannot be loaded: its entry point "
                    f"{point.value!r} in the group {group!r} raised {type(error).__name__} ({error}). Upgrade "
                    "that package, or uninstall it."
                )
                self._broken.append((sentence, error))
