"""The stable surface: adding to this list is a decision, removing from it a breaking change."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sparsec

SURFACE = [
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


def test_the_surface_is_pinned() -> None:
    assert SURFACE == sparsec.__all__
    assert SURFACE == dir(sparsec)


@pytest.mark.parametrize("name", SURFACE)
def test_every_name_is_there_and_documented(name: str) -> None:
    found = getattr(sparsec, name)

    assert name == "__version__" or found.__doc__


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sparsec' has no attribute 'Compiler'"):
        sparsec.Compiler  # noqa: B018


@pytest.mark.parametrize("top", ["passes", "backends"])
def test_plugins_are_no_packages_of_their_own(top: str) -> None:
    root = sparsec.__path__[0] + "/.."
    code = f"import sys; sys.path.insert(0, {root!r}); import {top}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert 1 == done.returncode
    assert f"imported as sparsec.{top}" in done.stderr
