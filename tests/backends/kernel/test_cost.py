"""The kernel backend's cost table: interpolation, the file it is kept in, and what it decides."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Residual, made, random

import sparsec
from sparsec import api, registry
from sparsec.backends.kernel import cost, measuring
from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.cost import DENSE, TokenRange
from sparsec.errors import UsageError
from sparsec.models import Loaded
from sparsec.pattern import NM, VNM, Pattern, Strip
from sparsec.tasks import Work

pytestmark = pytest.mark.skipif(library.level() is None, reason="the CPU kernels are not built")
GRID = tuple(itertools.product(cost.SIZES, cost.SIZES, cost.TOKENS))
RANGE = TokenRange(1, 512)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost._table_for.cache_clear()
    yield tmp_path / "sparsec"
    cost._table_for.cache_clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[Pattern]]:
    """Measurements that take no time: 1 ns for each weight kept and token; returns what was measured together."""
    asked: list[list[Pattern]] = []

    class Bed:
        def __init__(self, patterns, values="fp32"):
            self.patterns = patterns
            asked.append(patterns)

        def seconds(self, rows, cols, tokens, budget):
            return [[1e-9 * rows * cols * count * pattern.density for pattern in self.patterns] for count in tokens]

    monkeypatch.setattr(cost, "Bed", Bed)
    return asked


def table_where(sparse_speed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured table by which every sparse layer is so many times faster than dense."""
    series = {
        "dense": {at: 1e-9 * math.prod(at) for at in GRID},
        **{f"fp32 {p}": {at: 1e-9 * math.prod(at) / sparse_speed for at in GRID} for p in ("2:4", "2:5")},
    }
    monkeypatch.setattr(cost._table(), "series", series)


sizes = st.integers(1, 10_000)


@given(st.sampled_from(GRID))
def test_a_point_of_the_grid_is_what_was_measured(at: tuple[int, int, int]) -> None:
    points = {place: 1e-6 + 1e-9 * math.prod(place) ** 0.9 for place in GRID}

    assert points[at] == pytest.approx(cost.interpolate(points, *at))


@given(sizes, sizes, sizes)
def test_a_constant_rate_stays_one_everywhere(rows: int, cols: int, tokens: int) -> None:
    points = {at: 1e-9 * math.prod(at) for at in GRID}
    least = points[cost.SIZES[0], cost.SIZES[0], 1]

    assert max(1e-9 * rows * cols * tokens, least) == pytest.approx(cost.interpolate(points, rows, cols, tokens))


@given(st.integers(64, 3072), st.integers(64, 3072), st.integers(1, 512))
def test_between_points_seconds_a_weight_lie_between_theirs(rows: int, cols: int, tokens: int) -> None:
    points = {at: 1e-9 * math.prod(at) * (1 + (at[0] * 7 + at[1] * 3 + at[2]) % 5) for at in GRID}
    rate = cost.interpolate(points, rows, cols, tokens) / (rows * cols * tokens)

    assert 1e-9 * (1 - 1e-9) <= rate <= 5e-9 * (1 + 1e-9)


def test_v_shares_a_series_up_to_m_16_but_not_for_int8() -> None:
    assert NM(2, 8) == cost.series_of(VNM(64, 2, 8)) == cost.series_of(VNM(16, 2, 8))
    assert VNM(64, 2, 32) == cost.series_of(VNM(64, 2, 32))
    assert VNM(64, 2, 8) == cost.series_of(VNM(64, 2, 8), "int8")
    assert Strip(64, 2, 8) == cost.series_of(Strip(64, 2, 8))


def test_a_pattern_is_measured_once_beside_dense_and_kept(quick: list[list[Pattern]], cache: Path) -> None:
    patterns = [Pattern.parse(text) for text in ("2:4", "64:2:4", "unstructured:0.5")]
    cost.calibrate(patterns)
    cost.calibrate(patterns)
    cost._table_for.cache_clear()
    cost.calibrate(patterns)

    assert [[DENSE, NM(2, 4)]] == quick
    assert [cost.cache_file(torch.get_num_threads()).name] == [path.name for path in cache.iterdir()]
    assert "measured" == cost.basis(NM(2, 4)) == cost.basis(DENSE)
    assert 0.5e-9 * 100 * 200 * 40 == pytest.approx(cost.seconds((1, 100, 200), NM(2, 4), 40))
    assert 3e-9 * 100 * 200 * 40 == pytest.approx(cost.seconds((3, 100, 200), DENSE, 40))


def test_a_later_series_keeps_its_ratio_to_the_first_dense_one() -> None:
    table = cost.Table(None)
    table.add({"dense": dict.fromkeys(GRID, 2.0), "fp32 2:4": dict.fromkeys(GRID, 1.0)})
    table.add({"dense": dict.fromkeys(GRID, 4.0), "fp32 1:4": dict.fromkeys(GRID, 1.0)})

    assert (2.0, 1.0, 0.5) == tuple(table.series[name][GRID[0]] for name in ("dense", "fp32 2:4", "fp32 1:4"))


def test_what_stands_for_the_machine_is_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {cost.cache_file(1), cost.cache_file(2)}
    for place in ("_library_hash", "_processor"):
        with monkeypatch.context() as changed:
            changed.setattr(cost, place, lambda: ("another", "machine"))
            names.add(cost.cache_file(1))

    assert 4 == len(names)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"series": {"dense": [[1, 2]]}}', '{"series": {"dense": []}}', "{}"])
def test_a_damaged_file_is_measured_again(text: str, quick: list[list[Pattern]]) -> None:
    file = cost.cache_file(torch.get_num_threads())
    file.parent.mkdir(parents=True)
    file.write_text(text)
    cost.calibrate([NM(2, 4)])

    assert 1 == len(quick)
    assert {"dense", "fp32 2:4"} == json.loads(file.read_text())["series"].keys()


def test_a_folder_that_cannot_be_written_breaks_nothing(
    quick: list[list[Pattern]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made below a file, not even by root
    cost._table_for.cache_clear()
    cost.calibrate([NM(2, 4)])

    assert "measured" == cost.basis(NM(2, 4))


def test_nothing_measured_is_labelled_a_model_and_measures_nothing(quick: list[list[Pattern]]) -> None:
    backend = registry.backend("kernel")
    dense, sparse = (backend.cost((1, 768, 768), pattern, 128) for pattern in (DENSE, NM(2, 8)))

    assert "model" == backend.cost_basis(NM(2, 8))
    assert 0 < sparse < dense
    assert [] == quick


def test_slower_at_the_declared_tokens_is_a_reason_and_no_range_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    table_where(0.9, monkeypatch)

    assert "0.90x at 1-512 tokens" in str(cost.too_slow((1, 768, 768), NM(2, 4), "fp32", RANGE))
    assert cost.too_slow((1, 768, 768), NM(2, 4), "fp32", None) is None
    assert cost.too_slow((1, 768, 768), VNM(64, 2, 4), "int8", RANGE) is None
    table_where(1.1, monkeypatch)
    assert cost.too_slow((1, 768, 768), NM(2, 4), "fp32", RANGE) is None


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """compile measures nothing: the table is what the test says."""
    monkeypatch.setattr(cost, "calibrate", lambda *_: None)


def compiled(folder: Path, **options: object) -> sparsec.Artifact:
    data = {"model": "net", "targets": {"*": "2:4"}, **options}
    return api._compile(
        Loaded(sparsec.trace(made(Residual), {"x": random(3, 5)}), ({"x": random(3, 5)},), "noise"),
        Work(sparsec.Recipe.from_data(data)), folder / "net.sparsec", sparsec.Options(measure_speed=False),
    )  # fmt: skip


@pytest.mark.usefixtures("calm")
def test_a_slower_kernel_is_not_used_at_load_and_the_verdict_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_where(0.9, monkeypatch)
    artifact = compiled(tmp_path, tokens="1-512")
    verdicts = [site["verdicts"]["kernel"] for site in artifact.manifest["sites"]]
    x = random(3, 5)

    assert {("dense", False)} == {(one["kernel"], one["sparse"]) for one in verdicts}
    assert all("predicted 0.90x at 1-512 tokens" in one["reason"] for one in verdicts)
    loaded = artifact.load()
    assert not [node for node in loaded.graph.graph.nodes if node.target is stream_linear]
    table_where(2.0, monkeypatch)  # another machine decides anew
    sparse = artifact.load()
    assert 2 == len([node for node in sparse.graph.graph.nodes if node.target is stream_linear])
    for name, value in loaded(x=x).items():
        torch.testing.assert_close(value, sparse(x=x)[name])


@pytest.mark.usefixtures("calm")
def test_drop_slow_leaves_sites_unpruned_and_the_recipe_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_where(2.0, monkeypatch)
    down = sparsec.trace(made(Residual), {"x": random(3, 5)}).sites.sites[1].name
    real = cost.too_slow
    monkeypatch.setattr(
        "sparsec.backends.kernel.cost.too_slow",
        lambda shape, *rest: "predicted 0.90x" if shape == (1, 5, 8) else real(shape, *rest),
    )
    artifact = compiled(tmp_path, drop_slow=True)
    sites = {site["name"]: site for site in artifact.manifest["sites"]}

    assert (None, "dropped: predicted 0.90x") == (sites[down]["pattern"], sites[down]["excluded"])
    assert (sites[down]["name"], "ignore") == list(artifact.manifest["recipe"]["targets"].items())[-1]
    assert not artifact.manifest["recipe"]["drop_slow"]


@pytest.mark.usefixtures("calm")
def test_drop_slow_refuses_to_drop_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table_where(0.5, monkeypatch)
    with pytest.raises(UsageError, match=r"would drop all 2 sites.*predicted 0.50x"):
        compiled(tmp_path, drop_slow=True)


@pytest.mark.parametrize("pattern", ["dense", "2:4", "1:3", "16:2:8", "64:2:32", "16:2:8@strip"])
def test_products_are_timed_as_they_run(pattern: str) -> None:
    one = Pattern.parse(pattern)
    bed = measuring.Bed([one])
    call = bed._calls(one, bed._pools[0], 37, 50)
    (seconds,), (more,) = bed.seconds(37, 50, [1, 4096], 0.0)

    assert (3, 37) == call(torch.rand(3, 50), 7).shape
    assert 0 < seconds < more


def test_only_activations_behind_sparse_layers_are_absorbed() -> None:
    program = sparsec.trace(made(Residual), {"x": random(3, 5)})

    assert {"gelu": program.sites.sites[0].name} == registry.backend("kernel").absorbed(program)
