"""What README.md and docs/ say is so: every snippet runs, every command exists, generated parts are up to date."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import doc_pages
import pytest
import typer.main
import yaml
from doc_pages import PAGES, ROOT, RUN, SHOWN, commands, snippets

from sparsec import benchmark, catalogue, registry
from sparsec.cli import app

COMMANDS = typer.main.get_group(app).commands
GENERATE = ROOT / "docs" / "generate"
SHORT = 0.05  # seconds for a row of a speed table: its figures are not looked at


def tier(page: Path) -> object:
    """Pages that start commands are slow: each imports torch, and most compile a model."""
    slow = any(one.runs and one.kind in ("sh", "console") for one in snippets(page))
    return pytest.param(page, id=page.name, marks=pytest.mark.slow if slow else ())


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # of the Trainer, on a machine without a GPU
@pytest.mark.parametrize("page", [tier(page) for page in PAGES if any(one.runs for one in snippets(page))])
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = benchmark.measure
    monkeypatch.setattr(benchmark, "measure", lambda runs, case, seconds: real(runs, case, min(seconds, SHORT)))

    doc_pages.run(page, tmp_path)


def test_every_block_says_what_it_is_and_those_that_are_not_run_say_why() -> None:
    unknown = [f"{page.name}:{one.line}" for page in PAGES for one in snippets(page) if one.kind not in RUN | SHOWN]
    fences = {page.name: len(re.findall(r"^```", page.read_text(), re.M)) - 2 * len(snippets(page)) for page in PAGES}
    left_out = {f"{page.name}:{one.line}": one.reason for page in PAGES for one in snippets(page) if one.reason}
    print(*(f"{place} is not run: {reason}" for place, reason in left_out.items()), sep="\n")

    assert not unknown, (
        "name the language of these blocks: sh, python, pycon, console are run; text, toml, yaml are not"
    )
    assert {page.name: 0 for page in PAGES} == fences
    assert all(len(reason or "") > 10 for reason in left_out.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_a_page_shows_exists(page: Path) -> None:
    for one in snippets(page):
        if one.kind in ("sh", "console"):
            for program, *words in commands(one.commands()):
                if program == "sparsec" and words[0] in COMMANDS:
                    COMMANDS[words[0]].make_context(words[0], words[1:])  # raises UsageError for what is no option
                assert program != "sparsec" or words[0] in {*COMMANDS, "--version"}, words
    for name in re.findall(r"`sparsec (\w+)", page.read_text()):
        assert name in COMMANDS, name


@pytest.fixture(scope="module")
def generate() -> dict[str, ModuleType]:
    found = {}
    for name in ("reference", "pictures"):
        spec = importlib.util.spec_from_file_location(f"docs_{name}", GENERATE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        found[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    return found


def test_the_pictures_are_what_the_patterns_keep_today(generate: dict[str, ModuleType]) -> None:
    drawn = generate["pictures"].pictures()

    assert sorted(drawn) == sorted(path.name for path in (ROOT / "docs" / "pictures").glob("*.svg"))
    for name, svg in drawn.items():
        kept = (ROOT / "docs" / "pictures" / name).read_text()
        assert svg == kept, f"{name} is old: python docs/generate/pictures.py"


def test_the_reference_has_every_command_option_pass_pattern_and_backend(generate: dict[str, ModuleType]) -> None:
    pages = {name: write() for name, write in generate["reference"].PAGES.items()}
    text = pages["reference/commands.md"]

    for name, command in COMMANDS.items():
        part = text.partition(f"## sparsec {name}\n")[2].partition("\n## ")[0]
        assert all(option in part for one in command.params if one.param_type_name == "option" for option in one.opts)
    for entry in registry.passes().values():
        if entry.distribution == registry.OURS:
            assert f"\n## {entry.name}\n" in pages["reference/passes.md"]
    assert all(f"`{one['text']}`" in pages["reference/patterns.md"] for one in catalogue.patterns())
    assert all(f"`{name}`" in pages["reference/backends.md"] for name in registry.backends())


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", repr(menu)))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}

    assert pages <= listed, f"add to nav in mkdocs.yml: {sorted(pages - listed)}"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is not installed: pip install '.[docs]'")
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    html = {path.name: path.read_text() for path in (tmp_path / "site").rglob("*.html")}

    assert done.returncode == 0, done.stderr
    assert {"index.html", "tutorial.html", "commands.html", "passes.html", "changelog.html"} <= html.keys()
    assert "WeakRows" in html["write-a-pass.html"]  # an example that the page includes
    for name, text in html.items():
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", text)
        assert not fetched, (name, fetched)
