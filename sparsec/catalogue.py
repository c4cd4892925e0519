"""The lists behind `sparsec passes`, `patterns` and `backends`, generated from the code so that they cannot drift."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from sparsec import registry
from sparsec.errors import SparsecError
from sparsec.layout import table_bytes
from sparsec.pattern import Pattern
from sparsec.pipeline import quote

_NM = "2:4", "1:4", "2:8", "4:8"
_VNM = "64:2:5", "64:2:8", "128:2:8", "64:2:16", "64:2:8@strip", "64:2:5+2:4"
_PATTERNS = (*_NM, *_VNM, "unstructured:0.7", "dense")


def passes() -> list[dict[str, str]]:
    """Name, first docstring line, options, who gives it, and whether it can be used here."""
    found = []
    for entry in registry.passes().values():
        one = {"name": entry.name, "summary": "", "options": "", "from": entry.distribution, "status": "available"}
        try:
            cls = registry.pass_class(entry.name)
            one |= {"summary": _summary(cls), "options": ", ".join(map(_option, dataclasses.fields(cls)))}
        except SparsecError as error:
            one["status"] = str(error)
        found.append(one)
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
    """Name, what it writes, who gives it, and whether it is available here."""
    found = []
    for entry in registry.backends().values():
        one = {"name": entry.name, "describes": "", "from": entry.distribution, "status": "available"}
        try:
            backend = registry.backend(entry.name)
            one |= {"describes": backend.describes, "status": backend.unavailable() or "available"}
        except SparsecError as error:
            one["status"] = str(error)
        except Exception as error:  # a stranger's code may raise anything
            if entry.distribution == registry.OURS:
                raise
            one["status"] = f"{type(error).__name__} of distribution {entry.distribution}: {error}"
        found.append(one)
    return found


def _option(field: dataclasses.Field[Any]) -> str:
    """`score=magnitude`, or the bare name of an option that must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.name}={quote(field.default_factory())}"
    return field.name if field.default is dataclasses.MISSING else f"{field.name}={quote(field.default)}"


def _summary(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
