"""The page about an artifact, as a parser reads it; `tests/e2e/test_report_browser.py` opens it in a browser."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import made, random
from report_pages import Page, changed, compiled
from torch import nn
from typer.testing import CliRunner

import sparsec
from sparsec import trace
from sparsec.artifact import Artifact
from sparsec.cli import app
from sparsec.errors import ArtifactError, UsageError
from sparsec.loaded import Loaded
from sparsec.report.page import render, write

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></script>$\\frac{{{7*7}}"
SPEED = [
    {"tokens": 1, "threads": 1, "clock": "thread CPU time", "seconds": {"kernel": 1.0, "dense": 2.25}},
    {"tokens": 128, "threads": 1, "clock": "thread CPU time", "seconds": {"kernel": 1.0, "dense": 0.5}},
]
TRAINED = {
    "pass": "admm{epochs=2}", "seconds": 3.0, "steps": 4, "error": {"0.weight": 0.125},
    "curves": {"loss": [[1, 0.9], [4, 0.2]], "primal": [[2, 0.5], [4, 0.1]], "dual": [[2, 0.01], [4, 0.001]]},
    "evaluation": [{"step": 4, "accuracy": 0.75, "loss": 0.3, "samples": 8.0}],
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("made") / "net.sparsec")


@pytest.fixture(scope="module")
def page(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write(artifact, tmp_path_factory.mktemp("page") / "r.html"))


@pytest.fixture(scope="module")
def rich(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of an artifact that was trained and timed."""

    def change(manifest: dict[str, Any]) -> None:
        manifest |= {"speed": SPEED, "passes": [TRAINED]}
        manifest["quality"]["task"] = {
            "metric": "accuracy", "sparse": {"accuracy": 0.75}, "dense": {"accuracy": 0.875}, "data": "8 rows of d.tsv",
        }  # fmt: skip

    folder = tmp_path_factory.mktemp("rich")
    return Page(write(changed(artifact, folder / "a.sparsec", change), folder / "r.html"))


def test_the_page_says_how_many_sites_are_sparse_and_why_the_others_are_not(page: Page) -> None:
    found = page.text()

    assert "2 of 3 sites are sparse; 4 dense: the model's output layer (role head)" in found
    assert "16:2:5 = keep 2 of 5 (60 % zeros), V=16" in found
    assert "Why is this layer dense?" in found


def test_the_table_has_a_row_for_each_site_and_buttons_that_sort(artifact: Path, page: Page) -> None:
    sites = sparsec.Artifact.open(artifact).manifest["sites"]

    assert [site["name"] for site in sites] == [
        attrs["data-value"] for attrs, _ in page.all("th", scope="row") if attrs.get("data-value")
    ]
    heads = [text for _, text in page.all("th", scope="col", aria_sort="none")]
    assert ["Site", "Role", "Shape", "Pattern", "Kept", "Density", "Bytes", "kernel"] == heads
    assert len(heads) == sum(1 for _, text in page.all("button", type="button") if text in heads)


def test_the_density_is_counted_in_the_tables(artifact: Path, page: Page) -> None:
    from sparsec.layout import decompress
    from sparsec.lowered import packed_calls
    from sparsec.program import read_graph

    shares = {
        call.site: int(decompress(call.layout).count_nonzero()) / decompress(call.layout).numel()
        for call in packed_calls(read_graph(artifact))
    }

    for look in looks(page):
        assert f"{100 * shares[look['name']]:.1f} % of the weights are not zero" in look["about"]
    assert {"0.weight", "2.weight"} == {look["name"] for look in looks(page)}


def looks(page: Page) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(page.text("script", id="looks"))
    return found


def test_nothing_is_loaded_from_anywhere_and_only_the_pages_own_script_may_run(page: Page) -> None:
    for tag, attributes, _ in page.elements:
        for key in ("src", "href", "xlink:href", "action", "data"):
            assert re.match(r"(#|data:|$)", attributes.get(key) or ""), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
    (policy,) = (attrs["content"] for attrs, _ in page.all("meta", http_equiv="Content-Security-Policy"))
    assert policy
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_every_id_is_there_once_and_every_reference_leads_to_one(rich: Page) -> None:
    ids = [attrs["id"] for _, attrs, _ in rich.elements if "id" in attrs]
    links = [
        str(attrs[key])[1:]
        for _, attrs, _ in rich.elements
        for key in ("href", "xlink:href")
        if str(attrs.get(key)).startswith("#")
    ]
    named = [
        attrs[key]
        for _, attrs, _ in rich.elements
        for key in ("for", "aria-labelledby", "aria-describedby")
        if key in attrs
    ]

    assert len(set(ids)) == len(ids)
    assert set(links) | set(named) | set(re.findall(r"url\(#([^)]+)\)", rich.source)) <= set(ids)


def test_training_speed_and_task_are_drawn_and_told(rich: Page) -> None:
    found = rich.text()

    for words in (
        "residuals of ADMM (relative)",
        "loss on --eval",
        "Whole model, measured, 1 thread: times faster than dense",
        "2.25x",
        "0.50x",
        "At 128 tokens it is slower than dense: 0.50 times as fast.",
        "Task: accuracy 0.750 (dense 0.875) on 8 rows of d.tsv.",
        "Error of outputs",
    ):
        assert words in found


def test_what_an_artifact_does_not_hold_is_said_and_not_invented(page: Page) -> None:
    found = page.text()

    assert "An artifact does not hold the dense weights" in found
    assert "Speed was not measured when this was compiled" in found
    assert "Training" not in found


@pytest.mark.parametrize("tables", [True, False])
def test_names_of_a_model_are_text_and_nothing_else(artifact: Path, tmp_path: Path, tables: bool) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for site in manifest["sites"]:
            if not tables or not site["pattern"]:  # the names of tables are checked against the graph
                site["name"] = f"{site['name']}{HOSTILE}1"
            site["role"] += HOSTILE
            for verdict in site["verdicts"].values():
                verdict |= {"kernel": HOSTILE, "reason": HOSTILE}
        if not tables:
            del manifest["files"]["graph.json"], manifest["files"]["weights.safetensors"]
        manifest["sites"][2]["excluded"] = manifest["source"]["model"] = manifest["sparsec"] = HOSTILE
        manifest["exclusions"][0] |= {"role": HOSTILE, "reason": HOSTILE, "name": HOSTILE}
        manifest["checks"] = [{"name": HOSTILE, "detail": HOSTILE}]
        manifest["quality"] |= {"words": HOSTILE, "samples": HOSTILE}
        manifest["speed"] = SPEED
        manifest["passes"] = [{**TRAINED, "pass": HOSTILE, "words": HOSTILE, "curves": {HOSTILE: [[1, 2.0], [2, 1.0]]}}]

    folder = changed(artifact, tmp_path / "a.sparsec", change)
    found = Page(write(folder, tmp_path / "r.html"))

    own = 2 if tables else 1  # the page's script and, with tables, its data
    assert own == len(found.all("script"))
    assert all(str(attrs["src"]).startswith("data:image/png") for attrs, _ in found.all("img"))
    assert not [attrs for _, attrs, _ in found.elements if any(key.startswith("on") for key in attrs)]
    assert HOSTILE == found.text("h1")
    assert found.source.count("alert(1)") > 10
    if tables:
        assert all(HOSTILE not in look["name"] for look in looks(found))


def test_the_same_artifact_gives_the_same_page(artifact: Path, page: Page) -> None:
    assert page.source == render(Artifact.open(artifact), {})


def test_a_page_goes_into_the_artifact_and_leaves_its_hashes_alone(artifact: Path) -> None:
    written = CliRunner().invoke(app, ["report", str(artifact), "--json"])

    assert 0 == written.exit_code, written.output
    told = json.loads(written.stdout)
    assert str(artifact / "report.html") == told["out"]
    assert (artifact / "report.html").stat().st_size == told["nbytes"] < 300_000
    assert all(check.ok for check in sparsec.verify(artifact))

    again = CliRunner().invoke(app, ["report", str(artifact)])
    assert 2 == again.exit_code
    assert "report.html exists already; choose another -o, or add --force to replace it" in again.output
    assert 0 == CliRunner().invoke(app, ["report", str(artifact), "--force"]).exit_code


def test_the_dense_model_is_drawn_where_it_can_be_loaded(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = made(lambda: nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 3)))
    program = trace(net, [random(6, 20)])
    monkeypatch.setattr("sparsec.report.before.load_model", lambda *_, **__: Loaded(program, (), ""))

    found = Page(write(artifact, tmp_path / "r.html", before=True))

    assert "kept, after" in found.text()
    assert "An artifact does not hold" not in found.text()


def test_another_model_is_not_drawn_as_before(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = trace(made(lambda: nn.Sequential(nn.Linear(20, 31), nn.ReLU(), nn.Linear(31, 3))), [random(6, 20)])
    monkeypatch.setattr("sparsec.report.before.load_model", lambda *_, **__: Loaded(program, (), ""))

    with pytest.raises(UsageError, match="has none of the 2 sparse weights by name and shape"):
        write(artifact, tmp_path / "r.html", before=True)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="--before: the model that was compiled cannot be read"):
        write(artifact, tmp_path / "r.html", before=True)


def test_what_is_no_artifact_or_was_changed_is_refused(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    with pytest.raises(UsageError, match="does not exist; expected an artifact folder"):
        write(tmp_path / "nothing", out)
    with pytest.raises(ArtifactError, match="is not a sparsec folder"):
        write(tmp_path, out)
    program = trace(made(lambda: nn.Linear(4, 3)), [random(2, 4)]).save(tmp_path / "p")
    with pytest.raises(ArtifactError, match="expected a 'sparsec-artifact'"):
        write(program, out)
    cut = changed(artifact, tmp_path / "cut.sparsec", lambda manifest: None)
    (cut / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"weights.safetensors has 1 bytes"):
        write(cut, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["sites"][0].pop("retained"),
            r"site 0 \(0.weight\): found nothing as retained; the data of a site",
        ),
        (lambda m: m["sites"][1].update(shape="<b>"), r"site 1 \(2.weight\): found '<b>' as shape"),
        (lambda m: m["sites"].append(7), r"site 3 \(without a name\): found nothing as name"),
        (lambda m: m["sites"][0].update(name="1.weight"), "1.weight is sparse by manifest.json, and graph.json has no"),
        (
            lambda m: m["sites"][0].update(shape=[1, 4, 4]),
            r"0.weight has shape \(1, 4, 4\) by manifest.json, and tables",
        ),
        (lambda m: m.pop("quality"), "manifest.json has no quality"),
        (lambda m: m["quality"].pop("words"), "manifest.json does not hold what `compile` writes"),
        (lambda m: m.update(speed=[{"tokens": "<b>"}]), "manifest.json does not hold what `compile` writes"),
        (lambda m: m.update(checks=[{}]), "manifest.json does not hold what `compile` writes"),
    ],
)
def test_a_manifest_that_misses_something_is_an_error_in_one_paragraph(
    artifact: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        write(changed(artifact, tmp_path / "a.sparsec", change), tmp_path / "r.html")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(artifact: Path, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "no" / "r.html"):
        with pytest.raises(UsageError, match="expected a file in a folder that is there and writable"):
            write(artifact, out)


def test_without_matplotlib_the_user_is_told_what_to_install(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UsageError, match=r"pip install 'sparsec\[plot\]'"):
        write(artifact, tmp_path / "r.html")
