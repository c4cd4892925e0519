"""What is measured, how it is judged, and what cannot be measured is said before or beside the figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Residual, made, random

import sparsec
from sparsec import benchmark, peers
from sparsec.errors import UsageError

QUICK = {"tokens": (1, 3), "seconds": 0.01}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> sparsec.Artifact:
    out, options = tmp_path_factory.mktemp("out") / "r.sparsec", sparsec.Options(measure_speed=False)
    return sparsec.compile(made(Residual), {"x": random(4, 5)}, pattern="1:2", out=out, options=options)


def test_a_row_for_every_thread_count_and_size(artifact: sparsec.Artifact) -> None:
    before = torch.get_num_threads()
    result = benchmark.bench(artifact, ("dense", "mkldnn"), threads=(2, 1), layers=True, **QUICK)

    whole = [(row["threads"], row["tokens"], row["clock"]) for row in result["speed"]]
    cpu, wall = "thread CPU time", "wall time"
    assert [(2, 1, wall), (2, 3, wall), (1, 1, cpu), (1, 3, cpu)] == whole
    for row in result["speed"] + result["layers"]:
        assert ["kernel", "dense", "mkldnn"] == list(row["seconds"]) == list(row["wall_seconds"])
        assert all(one > 0 for one in row["seconds"].values())
    shapes = [(row["rows"], row["cols"], row["sites"]) for row in result["layers"]]
    assert [(8, 5, 1), (5, 8, 1)] * 4 == shapes
    assert all(one < 1e-6 for one in result["differences"].values())
    assert before == torch.get_num_threads()


def test_a_peer_that_cannot_run_is_reported_and_the_others_are_measured(
    artifact: sparsec.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any) -> Any:
        raise UsageError("this build of torch has no oneDNN")

    monkeypatch.setitem(peers.MODELS, "mkldnn", absent)
    result = benchmark.bench(artifact, ("mkldnn", "dense"), layers=True, **QUICK)

    assert {"mkldnn": "this build of torch has no oneDNN"} == result["unavailable"]
    assert all("mkldnn" not in row["seconds"] for row in result["speed"] + result["layers"])
    with pytest.raises(UsageError, match="nothing left to compare with: mkldnn: this build of torch has no oneDNN"):
        benchmark.bench(artifact, ("mkldnn",), **QUICK)


def test_a_layer_without_a_kernel_has_its_reason_in_place_of_times(tmp_path: Path) -> None:
    options = sparsec.Options(measure_speed=False)
    made_so = sparsec.compile(
        made(Residual), {"x": random(4, 5)}, targets={"up.weight": "unstructured:0.5", "down.weight": "2:4"},
        out=tmp_path / "r.sparsec", options=options,
    )  # fmt: skip
    rows = benchmark.bench(made_so, ("dense",), tokens=(1,), seconds=0.01, layers=True)["layers"]

    assert ["stored small" in row.get("reason", "") for row in rows] == [True, False]
    assert ["seconds" in row for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"against": ("dense", "tensorflow")}, "'tensorflow' is nothing to compare with; expected some of dense, "),
        ({"against": ()}, "there is nothing to compare with"),
        ({"tokens": (1, 0)}, "0 tokens cannot be measured; expected 1 or more"),
        ({"threads": (-1,)}, "-1 threads cannot be measured"),
        ({"seconds": 0.0}, "0.0 seconds cannot be spent on measuring"),
        ({"seconds": math.nan}, "nan seconds"),
        ({"sizes": ((8, 128),)}, "8x128: this model's length is fixed"),
    ],
)
def test_a_request_that_cannot_be_met(artifact: sparsec.Artifact, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        benchmark.bench(artifact, **wrong)


def row(**seconds: float) -> dict[str, Any]:
    return {"seconds": seconds}


def test_the_best_dense_peer_is_that_of_most_rows_and_int8_is_none() -> None:
    int8 = {"onnxruntime-int8": 1.0}
    rows = [
        row(kernel=1, dense=4, mkldnn=2, **int8),
        row(kernel=2, dense=6, mkldnn=9),
        row(kernel=1, dense=8, mkldnn=9),
    ]

    name, times, mean = benchmark.best_fp32(rows) or ("", 0, 0.0)
    assert ("dense", 2) == (name, times)
    assert mean == pytest.approx((2 * 3 * 8) ** (1 / 3))
    assert benchmark.best_fp32([row(kernel=1, **int8)]) is None


def test_ratios_are_times_faster_than_each_peer() -> None:
    assert {"dense": 3.0, "mkldnn": 0.5} == benchmark.ratios(row(kernel=2.0, dense=6.0, mkldnn=1.0))
