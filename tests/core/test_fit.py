"""What makes a command line pleasant: completion, version, no colours in pipes, a sign of life at once, a plan."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparsec import Recipe, __version__, show
from sparsec.plan import plan

ROOT = Path(__file__).resolve().parents[2]
START = "import sys; from sparsec.cli import app; app(sys.argv[1:], prog_name='sparsec')"


def run(*args: str, code: str = START, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [("sparsec comp", "compile"), ("sparsec compile --patt", "--pattern"), ("sparsec bench --ag", "--against")],
)
def test_the_shell_completes_commands_and_options_without_importing_torch(words: str, expected: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; {START}"
    count = str(len(words.split()) - 1)
    done = run(code=code, _SPARSEC_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)

    assert [expected] == done.stdout.split(), done.stderr


def test_the_version_is_told() -> None:
    assert f"sparsec {__version__}\n" == run("--version").stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_a_pipe_gets_no_colours() -> None:
    table = "from sparsec import show; show.catalogue([('2:4', 'keep 2 of 4')], 'pattern', 'in words')"
    for done in (run("--help", TERM="xterm-256color"), run(code=table, TERM="xterm-256color")):
        assert done.stdout
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["compile x --pattern 2:4", "passes"])
def test_a_terminal_sees_something_before_torch_is_imported(command: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; {START}"
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        with subprocess.Popen(
            [sys.executable, "-c", code, *command.split()], stderr=theirs, stdout=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
        ) as process:  # fmt: skip
            os.close(theirs)
            seen = b""
            while part := _read(screen):
                seen += part
        assert process.returncode

    assert b"loading" in seen
    assert seen.index(b"loading") < seen.index(b"import of torch halted")


def _read(screen) -> bytes:  # type: ignore[no-untyped-def]
    """Nothing more when the other end is closed, which Linux reports as an error."""
    try:
        return bytes(screen.read(4096) or b"")
    except OSError:
        return b""


def test_the_plan_stands_above_the_recipe_and_is_no_part_of_it() -> None:
    made = Recipe.from_data({"model": "bert", "targets": {"*": "2:4", "re:fc": "ignore"}, "backends": ["onnx"]})
    text = plan(made, Path("b.sparsec"))

    assert (
        "# Nothing was loaded or written. compile would:\n"
        "# 1. load bert and trace it\n"
        "# 2. sites: * gets 2:4, re:fc is left dense\n"
        "# 3. passes: oneshot where there are calibration data for the model, else mask | freeze\n"
        "# 4. write b.sparsec for onnx; prove it from disk; measure quality and speed\n"
    ) == text
    assert made == Recipe.from_data(yaml.safe_load(text + made.to_yaml()))


def test_the_plan_names_the_data() -> None:
    data = {"calib": "c.txt", "train": "t.tsv", "eval": "d.tsv", "passes": "admm"}
    text = plan(Recipe.from_data({"model": "bert", "targets": {"*": "2:4"}, **data}), Path("b"))

    for step in ("3. passes: admm", "4. calibrate on 128 samples of c.txt", "5. train on t.tsv", "6. judge on d.tsv"):
        assert f"# {step}\n" in text


def test_the_end_of_a_compile_says_how_to_look_at_it(capsys: pytest.CaptureFixture[str]) -> None:
    show.wrote(Path("my model.sparsec"))

    assert "Wrote my model.sparsec\nLook at it: sparsec report 'my model.sparsec'\n" == capsys.readouterr().out


def test_the_changelog_has_a_heading_for_each_version_newest_first_and_whole_sentences() -> None:
    title, *parts = re.split(r"(?m)^## ", (ROOT / "CHANGELOG.md").read_text())
    versions = [part.partition("\n")[0].partition(" ")[0] for part in parts]
    numbered = [tuple(map(int, name.split("."))) for name in versions if name != "Unreleased"]

    assert "# Changelog" == title.strip()
    assert versions[0] in ("Unreleased", __version__)
    assert sorted(numbered, reverse=True) == numbered
    for part in parts:
        for entry in re.split(r"\n(?=- )", part.partition("\n")[2].strip()):
            assert entry.startswith("- ")
            assert entry.endswith((".", ".)", "`.")), entry
            assert "\n\n" not in entry
