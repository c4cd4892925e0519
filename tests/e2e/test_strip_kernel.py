"""Strips that kernels run, from the outside: with rows in their order, and with rows from anywhere in a strip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import made, random
from torch import Tensor, nn

import sparsec
from sparsec import Artifact, PassManager, Program, store, trace
from sparsec.backends.kernel.cpu import library
from sparsec.errors import ArtifactError
from sparsec.layout import Values
from sparsec.pattern import Pattern, Strip

PATTERN = "16:2:5@strip"
RELATIVE = 1e-5  # reordered fp32 sums over at most 40 products
ROUNDED: dict[Values, float] = {"bf16": 2e-2, "int8": 5e-2}  # of the largest output, two layers after each other

pytestmark = pytest.mark.skipif(library.level() is None, reason=library.unavailable_reason() or "")


def model() -> nn.Module:
    """Tails of rows and columns; the head stays dense."""
    return made(lambda: nn.Sequential(nn.Linear(14, 40), nn.GELU(), nn.Linear(40, 37), nn.ReLU(), nn.Linear(37, 3)))


def selected(moved: bool) -> Program:
    """With strips chosen; where rows `moved`, of rows from anywhere."""
    program, pattern = trace(model(), [random(6, 14)], dynamic={"input": {0: "tokens"}}), Pattern.parse(PATTERN)
    assert isinstance(pattern, Strip)
    chosen = []
    for site in program.sites:
        if site.role != "head":
            score, rows = site.read(program.module).abs(), torch.randperm(site.shape[1])[None]
            by_strip = score.gather(1, rows[:, :, None].expand_as(score)) if moved else score
            selection = pattern.select(score, pattern.project(by_strip).columns, rows if moved else None)
            chosen.append(site.replace(pattern=pattern, selection=selection))
    return program.with_sites(chosen).replace(facts=program.facts | {"selected"})


@pytest.fixture(scope="module", params=["in order", "moved"])
def program(request: pytest.FixtureRequest) -> Program:
    return selected(request.param == "moved")


@pytest.fixture(scope="module")
def masked(program: Program) -> Program:
    return PassManager.parse("mask").run(program)


@pytest.fixture(scope="module")
def artifact(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compiled(program, tmp_path_factory.mktemp("strip"))


def compiled(
    program: Program, folder: Path, values: Values = "fp32", backends: tuple[str, ...] = ("kernel",)
) -> Artifact:
    saved = program.save(folder / "program")
    return sparsec.compile(
        str(saved), pattern=PATTERN, passes="mask | freeze", values=values, backends=list(backends), out=folder / "a"
    )


def sites(artifact: Artifact) -> list[dict[str, object]]:
    return [site for site in artifact.manifest["sites"] if site["pattern"]]


def is_moved(program: Program) -> bool:
    return any(site.selection is not None and site.selection.rows is not None for site in program.sites)


def test_every_site_runs_a_sparse_kernel(artifact: Artifact, program: Program) -> None:
    tables = store.load_tensors(artifact.root / "weights.safetensors")
    loaded = artifact.load()

    assert [(PATTERN, True)] * 2 == [
        (site["pattern"], site["verdicts"]["kernel"]["sparse"]) for site in sites(artifact)
    ]
    assert is_moved(program) == ("0.weight_rows" in tables)
    assert is_moved(program) == all(site.get("moved", False) for site in sites(artifact))
    assert 2 == sum("stream_linear" in str(node.target) for node in loaded.graph.graph.nodes)
    assert not any("gelu" in str(node.target) for node in loaded.graph.graph.nodes)  # the kernel applies it


@pytest.mark.parametrize("tokens", [1, 7, 45])
def test_it_computes_what_the_masked_model_computes(artifact: Artifact, masked: Program, tokens: int) -> None:
    x = random(tokens, 14, seed=1)

    with torch.no_grad():
        expected = masked(x)["output"]
        torch.testing.assert_close(expected, artifact.load()(x)["output"], rtol=RELATIVE, atol=RELATIVE)
        torch.testing.assert_close(expected, artifact.load_dense()(x)["output"], rtol=RELATIVE, atol=RELATIVE)


def test_verify_proves_tables_and_kernel(artifact: Artifact) -> None:
    checks = {check.name: check for check in artifact.verify()}

    assert all(check.ok for check in checks.values())
    assert "2 sites satisfy their pattern bit for bit" == checks["kernel: pattern"].detail
    assert "unpacks to the same bits" in checks["kernel: pack"].detail
    assert "2 sites give what the dense product gives" in checks["kernel: kernel"].detail


def test_export_keeps_the_registered_operator(artifact: Artifact) -> None:
    loaded, x = artifact.load(), random(6, 14, seed=2)
    exported = torch.export.export(loaded, (x,))

    assert 2 == sum(node.target == torch.ops.sparsec.stream_linear.default for node in exported.graph.nodes)
    assert torch.equal(loaded(x)["output"], exported.module()(x)["output"])


def test_a_saved_program_keeps_its_rows(program: Program, tmp_path: Path) -> None:
    again = Program.load(program.save(tmp_path / "p"))

    for site in program.sites.sparse:
        found = again.sites[site.name].selection
        assert site.selection is not None and found is not None
        assert site.selection.tensors().keys() == found.tensors().keys()
        assert all(torch.equal(table, found.tensors()[name]) for name, table in site.selection.tensors().items())


@pytest.mark.slow
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_rounded_values(program: Program, masked: Program, tmp_path: Path, values: Values) -> None:
    artifact, x = compiled(program, tmp_path, values), random(9, 14, seed=1)

    assert all(check.ok for check in artifact.verify())
    assert [values == "bf16"] * 2 == [site["verdicts"]["kernel"]["sparse"] for site in sites(artifact)]
    with torch.no_grad():
        found, expected = artifact.load()(x)["output"], masked(x)["output"]
    assert float((found - expected).abs().max()) < ROUNDED[values] * float(expected.abs().max())


@pytest.mark.parametrize("weights", ["packed", pytest.param("dense", marks=pytest.mark.slow)])
def test_onnx_holds_the_same_weights_and_says_what_runs(program: Program, tmp_path: Path, weights: str) -> None:
    artifact = compiled(program, tmp_path, backends=("kernel", f"onnx{{weights={weights}}}"))
    checks = {check.name: check for check in artifact.verify()}
    verdicts = [site["verdicts"]["onnx"] for site in sites(artifact)]

    assert all(check.ok for check in checks.values()), [check for check in checks.values() if not check.ok]
    assert "onnx: packed tables" in checks
    assert [weights == "packed" and not is_moved(program)] * 2 == [verdict["sparse"] for verdict in verdicts]
    if weights == "packed" and is_moved(program):
        assert all("NMLinear takes no table of rows" in verdict["reason"] for verdict in verdicts)


# What is tampered with -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compiled(selected(True), tmp_path_factory.mktemp("moved"))


def tampered(artifact: Artifact, folder: Path, change: Callable[[Tensor], None]) -> Path:
    """A copy in which the table of rows is changed and every hash is right."""
    shutil.copytree(artifact.root, folder)
    tensors = store.load_tensors(folder / "weights.safetensors")
    change(tensors["0.weight_rows"])
    store.save_tensors(folder / "weights.safetensors", tensors)
    manifest = json.loads((folder / "manifest.json").read_text())
    store.seal(folder, "sparsec-artifact", {key: value for key, value in manifest.items() if key != "files"})
    return folder


@pytest.mark.parametrize("row", [-1, 40, 2**30])
def test_a_row_outside_the_weight_is_refused(moved: Artifact, tmp_path: Path, row: int) -> None:
    folder = tampered(moved, tmp_path / "b", lambda rows: rows[0, 3].fill_(row))

    with pytest.raises(ArtifactError, match=r"0\.weight: the table of rows must name each of 0 to 39 once"):
        sparsec.load(folder)


def test_rows_swapped_between_strips_fail_verify(moved: Artifact, tmp_path: Path) -> None:
    """A legal table of another weight: only the outputs can tell."""

    def change(rows: Tensor) -> None:
        rows[0, [0, 16]] = rows[0, [16, 0]].clone()
        for strip in rows.split(16, 1):
            strip.copy_(strip.sort(1).values)

    failed = [check.name for check in sparsec.verify(tampered(moved, tmp_path / "b", change)) if not check.ok]

    assert "kernel: outputs" in failed
