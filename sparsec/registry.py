"""Find passes and backends by name. The core knows two tables and imports an entry only when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from sparsec.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from sparsec.backend import Backend
    from sparsec.pipeline import Pass


def pass_table() -> dict[str, str]:
    """Pass name -> `module:Class`."""
    table: dict[str, str] = importlib.import_module("sparsec.passes").TABLE
    return table


def backend_table() -> dict[str, str]:
    """Backend name -> `module:Class`."""
    table: dict[str, str] = importlib.import_module("sparsec.backends").TABLE
    return table


def pass_class(name: str) -> type[Pass]:
    """The class of a pass; raises RecipeError with the nearest name when there is none."""
    if name not in pass_table():
        raise RecipeError(f"unknown pass {name!r}{_nearest(name, pass_table())}")
    found: type[Pass] = _load(pass_table()[name])
    return found


def backend(name: str) -> Backend:
    """The backend of this name; raises UsageError when there is none."""
    if name not in backend_table():
        raise UsageError(f"unknown backend {name!r}{_nearest(name, backend_table())}")
    found: Backend = _load(backend_table()[name])()
    return found


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _nearest(name: str, table: dict[str, str]) -> str:
    close = difflib.get_close_matches(name, table, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(table)}"
