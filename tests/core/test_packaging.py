"""What is built is what stands in the folders."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ("*.cpp", "*.cc", "*.c", "*.h", "*.hpp")


def test_the_list_of_packages_is_the_folders() -> None:
    inside = (ROOT / "sparsec").glob("*/__init__.py")
    folders = {"sparsec", *(f"sparsec.{path.parent.name}" for path in inside)}
    for top in ("passes", "backends"):
        found = [path.parent.relative_to(ROOT) for path in (ROOT / top).rglob("__init__.py")]
        folders |= {".".join(("sparsec", *folder.parts)) for folder in found}

    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_with_python_is_a_package() -> None:
    for top in ("passes", "backends"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_every_native_source_is_built_and_every_header_is_known() -> None:
    """The names are read from setup.py's text: running it would build."""
    setup = (ROOT / "setup.py").read_text()
    suffixes = {"SOURCES": "cpp", "HEADERS": "h"}
    lists = re.findall(r"^(?:FLOAT_|ORT_)?(SOURCES|HEADERS) = \((.*?)\)$", setup, re.MULTILINE | re.DOTALL)
    named = {f"{name}.{suffixes[kind]}" for kind, names in lists for name in re.findall(r'"(\w+)"', names)}
    found = {path.name for glob in SOURCES for path in (ROOT / "backends").rglob(glob)}

    assert found == named


def test_cuda_sources_are_shipped_with_their_package() -> None:
    shipped = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "backends").rglob("*.cu"):
        package = ".".join(("sparsec", *path.parent.relative_to(ROOT).parts))

        assert "*.cu" in shipped[package], path


def test_the_native_library_needs_no_particular_processor() -> None:
    assert "-march" not in re.sub("#.*", "", (ROOT / "setup.py").read_text())


def test_the_version_is_read_without_importing_anything() -> None:
    assert {"attr": "sparsec.version.__version__"} == PROJECT["tool"]["setuptools"]["dynamic"]["version"]
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', (ROOT / "sparsec" / "version.py").read_text(), re.MULTILINE)


def test_the_command_is_installed() -> None:
    assert {"sparsec": "sparsec.cli:main"} == PROJECT["project"]["scripts"]
