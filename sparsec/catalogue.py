"""The lists behind `sparsec passes`, `patterns` and `backends`, generated from the code so that they cannot drift."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from sparsec import registry
from sparsec.layout import table_bytes
from sparsec.pattern import Pattern
from sparsec.pipeline import quote

_PATTERNS = ("2:4", "1:4", "2:8", "4:8", "64:2:5", "64:2:8", "128:2:8", "64:2:16", "unstructured:0.7", "dense")


def passes() -> list[dict[str, str]]:
    """Name, first docstring line and options of every pass."""
    found = []
    for name in registry.pass_table():
        cls = registry.pass_class(name)
        options = ", ".join(f"{f.name}={quote(f.default)}" for f in dataclasses.fields(cls))
        found.append({"name": name, "summary": _summary(cls), "options": options})
    return found


def patterns() -> list[dict[str, Any]]:
    """Examples of every family, in words, with the size of a 3072 x 768 weight."""
    found = []
    for text in _PATTERNS:
        pattern = Pattern.parse(text)
        size = "1.000x" if text == "dense" else f"{table_bytes(pattern, (1, 3072, 768)) / (4 * 3072 * 768):.3f}x"
        found.append({"text": text, "words": pattern.words, "bytes": size})
    return found


def backends() -> list[dict[str, str]]:
    """Name, what it writes, and whether it is available here."""
    found = []
    for name in registry.backend_table():
        one = registry.backend(name)
        found.append({"name": name, "describes": one.describes, "status": one.unavailable() or "available"})
    return found


def _summary(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
