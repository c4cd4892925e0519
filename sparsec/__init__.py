"""sparsec: a compiler for sparse Transformers. Smaller, faster, and proven bit for bit.

Importing it is cheap: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsec.version import __version__

if TYPE_CHECKING:
    from sparsec.api import Options, compile
    from sparsec.artifact import Artifact, load, verify
    from sparsec.attaching import attach, detach
    from sparsec.errors import SparsecError
    from sparsec.pattern import Pattern
    from sparsec.pipeline import Context, Note, Pass, PassManager, PassResult
    from sparsec.program import Program
    from sparsec.recipe import Recipe
    from sparsec.tracing import trace

_HOMES = {
    "Artifact": "artifact",
    "Context": "pipeline",
    "Note": "pipeline",
    "Options": "api",
    "Pass": "pipeline",
    "PassManager": "pipeline",
    "PassResult": "pipeline",
    "Pattern": "pattern",
    "Program": "program",
    "Recipe": "recipe",
    "SparsecError": "errors",
    "attach": "attaching",
    "bench": "benchmark",
    "compile": "api",
    "detach": "attaching",
    "load": "artifact",
    "trace": "tracing",
    "verify": "artifact",
}

__all__ = [
    "Artifact",
    "Context",
    "Note",
    "Options",
    "Pass",
    "PassManager",
    "PassResult",
    "Pattern",
    "Program",
    "Recipe",
    "SparsecError",
    "__version__",
    "attach",
    "bench",
    "compile",
    "detach",
    "load",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsec' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparsec.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
