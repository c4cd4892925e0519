"""Find passes and backends by name: two tables of this project, and the entry points of installed distributions.

An entry is imported only when it is asked for. A distribution adds passes in the entry-point group `sparsec.passes`
and backends in `sparsec.backends`. A name that two of them give is nobody's: asking for it is an error that names both.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import TYPE_CHECKING, Any

from sparsec.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from sparsec.backend import Backend
    from sparsec.pipeline import Pass

OURS = "sparsec"
_PASSES, _BACKENDS = "sparsec.passes", "sparsec.backends"  # our packages, and the entry-point groups of others


@dataclass(frozen=True)
class Entry:
    """A name that can be asked for: where its class is, who gives it, and why it cannot be used, if so."""

    name: str
    target: str
    """`module:Class`"""
    distribution: str = OURS
    problem: str | None = None


def passes() -> dict[str, Entry]:
    """Every pass by name: our own first, then those of installed distributions."""
    return _entries(_PASSES)


def backends() -> dict[str, Entry]:
    """Every backend by name: our own first, then those of installed distributions."""
    return _entries(_BACKENDS)


def backend_table() -> dict[str, str]:
    """Backend name -> `module:Class`, of those that can be asked for."""
    return {name: entry.target for name, entry in backends().items() if not entry.problem}


def pass_class(name: str) -> type[Pass]:
    """The class of a pass. Raises RecipeError when there is none of this name, or it cannot be loaded."""
    from sparsec.pipeline import contract_problem

    try:
        entry = _entry(name, "pass", passes())
        cls: type[Pass] = _load(entry, "pass")
        if entry.distribution != OURS:
            _check(entry, "pass", cls, contract_problem(cls) if inspect.isclass(cls) else "it is not a class")
    except UsageError as error:
        raise RecipeError(str(error)) from error
    return cls


def backend_class(name: str) -> type[Backend]:
    """The class of a backend. Raises UsageError when there is none of this name, or it cannot be loaded."""
    from sparsec.backend import Backend

    entry = _entry(name, "backend", backends())
    cls: type[Backend] = _load(entry, "backend")
    if entry.distribution != OURS:
        sound = inspect.isclass(cls) and issubclass(cls, Backend) and not inspect.isabstract(cls)
        sound = sound and isinstance(getattr(cls, "describes", None), str)
        _check(entry, "backend", cls, None if sound else "it is not a complete subclass of sparsec.backend.Backend")
    return cls


def backend(name: str) -> Backend:
    """The backend of this name, with the options it has by default. Raises UsageError as `backend_class` does."""
    cls, entry = backend_class(name), backends()[name]
    try:
        made: Backend = cls()
    except Exception as error:  # a stranger's code may raise anything
        if entry.distribution == OURS:
            raise
        raise _broken(entry, "backend", _reason(error)) from error
    return made


def _entry(name: str, kind: str, table: dict[str, Entry]) -> Entry:
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(table)}"
        raise UsageError(f"unknown {kind} {name!r}; {hint}")
    if problem := table[name].problem:
        raise UsageError(f"{kind} {name}: {problem}")
    return table[name]


def _load(entry: Entry, kind: str) -> Any:
    module, _, name = entry.target.partition(":")
    try:
        return reduce(getattr, name.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything while it is imported
        if entry.distribution == OURS:
            raise
        raise _broken(entry, kind, _reason(error)) from error


def _check(entry: Entry, kind: str, cls: type, problem: str | None) -> None:
    if problem is None and getattr(cls, "name", None) != entry.name:
        problem = f"its class calls itself {getattr(cls, 'name', None)!r}; the two names must agree"
    if problem is not None:
        raise _broken(entry, kind, problem)


def _broken(entry: Entry, kind: str, reason: str) -> UsageError:
    return UsageError(
        f"{kind} {entry.name} of distribution {entry.distribution} ({entry.target}) cannot be used: {reason}; "
        f"repair or uninstall {entry.distribution}"
    )


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@cache
def _entries(group: str) -> dict[str, Entry]:
    from sparsec.pipeline import NAME

    given: dict[str, list[Entry]] = {}
    for name, target in importlib.import_module(group).TABLE.items():
        given[name] = [Entry(name, target)]
    for entry in _declared(group):
        if not entry.problem and not NAME.fullmatch(entry.name):
            why = f"distribution {entry.distribution} gives a name that is not of lower-case letters, digits and dashes"
            entry = replace(entry, problem=why)
        given.setdefault(entry.name, []).append(entry)
    return {name: entries[0] if len(entries) == 1 else _clash(entries) for name, entries in given.items()}


def _clash(entries: list[Entry]) -> Entry:
    owners = " and ".join(f"{entry.distribution} ({entry.target or entry.problem})" for entry in entries)
    why = f"the name is given by {owners}; uninstall all but one of them, or have an author rename it"
    return Entry(entries[0].name, "", ", ".join(dict.fromkeys(entry.distribution for entry in entries)), why)


def _declared(group: str) -> list[Entry]:
    """What installed distributions declare; one whose metadata cannot be read is an entry with that problem.

    `importlib.metadata.entry_points` would fail as a whole on the first unreadable distribution.
    """
    found: list[Entry] = []
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        if f"[{group}]" not in (distribution.read_text("entry_points.txt") or ""):
            continue
        name = distribution.name
        if name in seen:  # the same distribution further down sys.path, which Python would not import either
            continue
        seen.add(name)
        try:
            points = distribution.entry_points.select(group=group)
            found += [Entry(point.name, point.value.partition("[")[0].strip(), name) for point in points]  # no extras
        except Exception as error:  # whatever the standard library's parser raises on damaged text
            why = f"the entry points of distribution {name} cannot be read: {_reason(error)}; reinstall it"
            found.append(Entry(name, "", name, why))
    return sorted(found, key=lambda entry: (entry.distribution, entry.name))
