"""The bar plot: refused before anything is measured, or complete."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from sparsec.errors import UsageError
from sparsec.plot import check_plot, save_front, save_plot

MACHINE = {"processor": "Some CPU", "cores": 2, "kernels": "avx2", "torch": "2.13", "torch_kernels": "AVX2"}


def row(threads: int, tokens: int, **seconds: float) -> dict[str, Any]:
    clock = "thread CPU time" if threads == 1 else "wall time"
    return {"threads": threads, "tokens": tokens, "clock": clock, "seconds": {"kernel": 1.0} | seconds}


RESULT = {
    "model": "some-model",
    "patterns": ["64:2:8"],
    "values": "int8",
    "machine": {**MACHINE, "sparsec": "0.1.0"},
    "speed": [
        row(1, 1, dense=2.25, mkldnn=1.75),
        row(1, 128, dense=1.5, mkldnn=0.5),
        row(2, 1, dense=3.125, mkldnn=1.25),
        row(2, 128, dense=2.5) | {"batch": 8, "length": 16},
    ],
}


def test_a_plot_says_model_pattern_machine_clock_and_every_ratio(tmp_path: Path) -> None:
    save_plot(RESULT, tmp_path / "p.svg")

    texts = re.findall(r">([^<>]+)</text>", (tmp_path / "p.svg").read_text())
    for expected in (
        "some-model at 64:2:8, int8 values: times faster than the same weights run dense",
        "1 thread, thread CPU time",
        "2 threads, wall time",
        "torch, prepacked (oneDNN)",
        "8 x 16 tokens",
        "1 token",
        *("2.25", "1.75", "1.50", "0.50", "3.12", "1.25", "2.50"),
    ):
        assert expected in texts
    assert any(text.startswith("Some CPU, 2 cores; threads 1, 2; kernels avx2") for text in texts)


@pytest.mark.parametrize("name", ["p.png", "p.SVG"])
def test_the_ending_chooses_the_format_and_equal_figures_give_equal_files(name: str, tmp_path: Path) -> None:
    made = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_plot(RESULT, tmp_path / folder / name)
        made.append((tmp_path / folder / name).read_bytes())

    assert made[0] == made[1]
    assert made[0].startswith(b"\x89PNG" if name == "p.png" else b"<?xml")


@pytest.mark.parametrize("name", ["p.jpg", "p", "png", "p.png.pdf"])
def test_another_ending_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a name that ends in \.png or \.svg"):
        check_plot(tmp_path / name)


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")

    for place in ("nowhere/p.png", "folder.png", "file/p.svg"):
        with pytest.raises(UsageError, match="cannot be written; expected a file in a folder that is there"):
            check_plot(tmp_path / place)
    check_plot(tmp_path / "p.png")
    assert ["file", "folder.png"] == sorted(path.name for path in tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UsageError, match=r"pip install 'sparsec\[plot\]'"):
        check_plot(tmp_path / "p.png")


@pytest.mark.parametrize("across", ["speed", "density"])
def test_the_front_is_drawn_with_the_choice_and_what_is_lost(tmp_path: Path, across: str) -> None:
    figure = {"key": "retained", "words": "retained score"}
    found = {across: 0.5, "retained": 0.8, "figure": figure, "front": [{across: 0.3, "retained": 0.6}]}
    for name in ("a.svg", "b.svg"):
        save_front(found, "some-model", tmp_path / name)

    text = (tmp_path / "a.svg").read_text()
    words = "times faster than dense, predicted" if across == "speed" else "share of the weights that stay"
    assert all(part in text for part in ("some-model", "retained score", "this choice", words))
    assert text == (tmp_path / "b.svg").read_text()
