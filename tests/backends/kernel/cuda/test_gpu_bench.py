"""The bench on a GPU is rehearsed on the CPU, says so everywhere, and judges by what it measured alone."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from bench.gpu import layers, machines
from bench.gpu.__main__ import compiled, expected, main
from bench.gpu.encoders import REAL as ENCODERS
from bench.gpu.goals import GOALS, judge, ratio
from bench.gpu.report import REHEARSED

from sparsec.backends.kernel.cuda import ahead
from sparsec.backends.kernel.cuda.ceilings import H200

EXPECTED = expected((layers.REAL, ENCODERS))


def row(regime: str, pattern: str, dense: tuple[float, ...], correct: bool = True, **sparse: Any) -> dict[str, Any]:
    return {"regime": regime, "pattern": pattern, "seconds": {"dense": dense, **sparse}, "correct": correct}


def test_a_rehearsal_runs_everything_checks_results_and_shows_no_figure(tmp_path, capsys) -> None:
    assert 0 == main(["--dry-run", "--out", str(tmp_path)])
    page, printed = (tmp_path / "dry-run-gpu.md").read_text(), capsys.readouterr().out
    data = json.loads((tmp_path / "data/dry-run-gpu.json").read_text())

    assert REHEARSED in page and REHEARSED in printed and REHEARSED == data["note"]
    plots = [path.read_text() for path in tmp_path.glob("*.svg")]
    assert (1 if importlib.util.find_spec("matplotlib") else 0) == len(plots)
    assert all(REHEARSED in plot for plot in plots)
    assert "dry run" in page and "not judged" in page and "**missed**" not in page
    rows = [*data["layers"], *data["encoders"]]
    assert all(one["correct"] for one in rows)
    assert {"decode", "prefill", "encoder"} == {one["regime"] for one in rows}
    assert all(len(two) == 2 for one in rows for two in one["seconds"].values())
    assert {"cuSPARSELt, searched", "panels, side by side"} <= {name for one in rows for name in one["seconds"]}


def test_a_wrong_result_ends_the_bench_with_1(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(layers, "panel_linear", lambda x, *_: x.new_full((*x.shape[:-1], 80), torch.nan))

    assert 1 == main(["--dry-run", "--only", "64:2:8", "--out", str(tmp_path)])
    assert "2 wrong results" in capsys.readouterr().out


def test_what_begins_after_the_deadline_is_named(tmp_path) -> None:
    assert 0 == main(["--dry-run", "--limit", "0", "--out", str(tmp_path)])
    page = (tmp_path / "dry-run-gpu.md").read_text()

    assert "64:2:16 80x96 T=40" in page and "tiny 2x24 2:4" in page
    assert 12 == page.count("not measured")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured(capsys) -> None:
    assert 2 == main([])
    assert "--dry-run rehearses on the CPU" in capsys.readouterr().out


def test_a_ratio_is_the_faster_dense_over_the_slower_median_of_the_fastest() -> None:
    one = row("prefill", "2:4", (6.0, 5.0), panels=(2.0, 4.0), **{"cuSPARSELt": (2.0, 2.5), "else": (0.1, 0.1)})

    assert 2.0 == ratio(one)


def test_a_goal_counts_complete_and_correct_cases_only() -> None:
    two = [row("decode", "2:4", (4.0, 4.0), panels=(2.0, 2.0)), row("decode", "2:4", (4.0, 4.0), panels=(0.5, 0.5))]
    (found,) = [one for one in judge(two, EXPECTED) if one.ratio is not None]

    assert (4.0, True, True) == (pytest.approx(found.ratio), found.met, found.stretched)
    for spoilt in (two[:1], [two[0], {**two[1], "correct": False}]):
        assert {None} == {one.ratio for one in judge(spoilt, EXPECTED)}


def test_dense_counts_where_layers_may_run_dense() -> None:
    rows = [row("prefill", text, (1.0, 1.0), panels=(2.0, 2.0)) for text in ("64:2:5", "64:2:8") for _ in range(6)]
    found = {one.goal.pattern: (one.ratio, one.met) for one in judge(rows, EXPECTED) if one.ratio is not None}

    assert {"64:2:5": (1.0, True), "64:2:8": (pytest.approx(0.5), False)} == found


def test_every_goal_has_cases() -> None:
    assert all(EXPECTED[goal.regime, goal.pattern] for goal in GOALS)
    assert (2, 6, 1) == tuple(EXPECTED[regime, "64:2:8"] for regime in ("decode", "prefill", "encoder"))


def test_a_result_that_was_not_written_is_seen() -> None:
    weight, x = torch.randn(8, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    bias, on = torch.zeros(8).bfloat16(), machines.Rehearsal()

    def right(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight)

    def unwritten(x: torch.Tensor) -> torch.Tensor:
        return right(x).index_fill(1, torch.tensor(7), torch.nan)

    assert layers.error(right, weight, x, bias, on) < layers.RELATIVE
    assert float("inf") == layers.error(unwritten, weight, x, bias, on)
    assert layers.error(lambda x: right(x).roll(1, 1), weight, x, bias, on) > layers.RELATIVE


def test_the_searched_algorithm_runs_torchs_2_4_products(monkeypatch) -> None:
    """Without data: torch's own rules for arguments and shapes."""
    weights = [torch.empty(64, 128, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    inputs = [torch.empty(16, 128, dtype=torch.bfloat16, device="meta")]
    packed = torch.empty(64, 128 * 9 // 16, dtype=torch.bfloat16, device="meta")
    searched: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: packed)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda a, b, transpose_result: searched.append(b.shape) or 7)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    calls = machines.Cuda().searched_2_4(weights, inputs)

    assert [(128, 16)] == searched
    assert [(16, 64)] * 3 == [tuple(call().shape) for call in calls]
    assert {7} == {call.keywords["alg_id"] for call in calls}


def test_all_that_runs_is_compiled_beforehand(monkeypatch) -> None:
    made: list[tuple[str, str]] = []
    monkeypatch.setattr(ahead, "cubin", lambda kernel, macros, arch: made.append((kernel, arch)))
    count = compiled(H200.device, (layers.REAL, ENCODERS))

    assert count == len(made)
    assert {"ceilings", "decode", "window"} <= {kernel for kernel, _ in made}
    assert {"sm_90a"} == {arch for _, arch in made}
