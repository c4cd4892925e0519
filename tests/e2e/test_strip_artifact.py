"""A strip pattern from the outside: compiled, proven from its tables, tampered with, saved as a program, inspected.

Here with strips of 4 rows, which no kernel runs; what kernels run is in test_strip_kernel.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Residual, made, random
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsec
from sparsec import Artifact, PassManager, Program, inspection, registry, store, trace
from sparsec.backends.kernel.cpu import stream
from sparsec.cli import app
from sparsec.errors import ArtifactError, PassError, PatternError, SparsecError
from sparsec.explain import explain
from sparsec.layout import Values, compress
from sparsec.pattern import Pattern
from sparsec.search import Request, choose

PATTERN = "4:2:5@strip"
REASON = f"{PATTERN} is stored packed and multiplied dense: kernels take 16 rows of a strip at once"
RELATIVE = 1e-5  # reordered fp32 sums over at most 33 products


def model() -> nn.Module:
    """Tails of rows and columns; the second weight has 33, of which it keeps 28, the third, a head, stays dense."""
    return made(lambda: nn.Sequential(nn.Linear(14, 33), nn.GELU(), nn.Linear(33, 8), nn.ReLU(), nn.Linear(8, 3)))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return sparsec.compile(model(), [random(6, 14)], pattern=PATTERN, out=tmp_path_factory.mktemp("strip") / "a")


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(args))
    assert code == result.exit_code, result.output
    return " ".join(result.output.split())


def tampered(artifact: Artifact, folder: Path, table: str, change: Callable[[Tensor], None]) -> Path:
    """A copy in which one table is changed and every hash is right."""
    shutil.copytree(artifact.root, folder)
    tensors = store.load_tensors(folder / "weights.safetensors")
    change(tensors[f"0.weight_{table}"])
    store.save_tensors(folder / "weights.safetensors", tensors)
    manifest = json.loads((folder / "manifest.json").read_text())
    store.seal(folder, "sparsec-artifact", {key: value for key, value in manifest.items() if key != "files"})
    return folder


# The artifact ---------------------------------------------------------------------------------------------------------


def test_every_site_is_stored_packed_runs_dense_and_says_why(artifact: Artifact) -> None:
    sites = [site for site in artifact.manifest["sites"] if site["pattern"]]

    assert [PATTERN] * 2 == [site["pattern"] for site in sites]
    assert all("columns from anywhere in the strip" in site["words"] for site in sites)
    for verdict in (site["verdicts"]["kernel"] for site in sites):
        assert (False, "dense") == (verdict["sparse"], verdict["kernel"])
        assert verdict["reason"].startswith(REASON)
    assert torch.int16 == store.load_tensors(artifact.root / "weights.safetensors")["0.weight_columns"].dtype


def test_it_computes_what_the_masked_model_computes(artifact: Artifact) -> None:
    program = PassManager.parse(f"mask{{pattern={PATTERN}}} | freeze").run(trace(model(), [random(6, 14)]))
    x = random(6, 14, seed=1)

    with torch.no_grad():
        torch.testing.assert_close(program(x)["output"], artifact.load()(x)["output"], rtol=RELATIVE, atol=RELATIVE)


def test_verify_proves_it_from_its_tables(artifact: Artifact) -> None:
    checks = {check.name: check for check in artifact.verify()}

    assert all(check.ok for check in checks.values())
    assert "2 sites satisfy their pattern bit for bit" == checks["kernel: pattern"].detail


def test_a_flipped_byte_is_found(artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.root, tmp_path / "b")
    data = bytearray((tmp_path / "b" / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / "weights.safetensors").write_bytes(data)

    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        Artifact.open(tmp_path / "b")


@pytest.mark.parametrize("index", [14, -1, 32767])
def test_a_column_outside_the_weight_is_refused_even_with_right_hashes(
    artifact: Artifact, tmp_path: Path, index: int
) -> None:
    folder = tampered(artifact, tmp_path / "b", "columns", lambda t: t[0, 0, 0].fill_(index))

    with pytest.raises(ArtifactError, match=r"0\.weight: a column index is out of range: columns must be below 14"):
        sparsec.load(folder)


def test_a_column_of_another_group_is_refused_even_with_right_hashes(artifact: Artifact, tmp_path: Path) -> None:
    def change(columns: Tensor) -> None:
        columns[0, 0, 1] = columns[0, 0, 0]

    with pytest.raises(ArtifactError, match=r"0\.weight: a column is in two groups of a strip"):
        sparsec.load(tampered(artifact, tmp_path / "b", "columns", change))


def test_columns_swapped_between_groups_fail_verify(artifact: Artifact, tmp_path: Path) -> None:
    """A legal table of another weight: only the outputs can tell."""

    def change(columns: Tensor) -> None:
        last = columns[0, 0, :2, 3].clone()
        columns[0, 0, :2, 3] = last.flip(0)
        columns[:] = columns.sort(-1).values

    failed = [
        check.name for check in sparsec.verify(tampered(artifact, tmp_path / "b", "columns", change)) if not check.ok
    ]

    assert "kernel: outputs" in failed


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_rounded_values_are_stored_and_multiplied_in_float(tmp_path: Path, values: Values) -> None:
    made_ = sparsec.compile(model(), [random(6, 14)], pattern=PATTERN, values=values, out=tmp_path / "a")
    x = random(6, 14, seed=1)

    assert all(
        site["verdicts"]["kernel"]["reason"].startswith(REASON) for site in made_.manifest["sites"] if site["pattern"]
    )
    assert all(check.ok for check in made_.verify())
    with torch.no_grad():
        assert torch.equal(made_.load_dense()(x)["output"], made_.load()(x)["output"])


def test_a_strip_of_few_rows_never_becomes_a_stream() -> None:
    pattern, weight = Pattern.parse(PATTERN), random(1, 8, 14)

    with pytest.raises(PatternError, match="a strip has a multiple of 16 rows"):
        stream.pack(compress(weight, pattern, pattern.project(weight.abs())))


@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_onnx_holds_the_same_weights(tmp_path: Path, weights: str) -> None:
    backends = ["kernel", f"onnx{{weights={weights}}}"]
    made_ = sparsec.compile(model(), [random(6, 14)], pattern=PATTERN, backends=backends, out=tmp_path / "a")
    checks = {check.name: check for check in made_.verify()}

    assert all(check.ok for check in checks.values())
    assert "break no count of their pattern" in checks["onnx: patterns"].detail
    assert "onnx: packed tables" in checks
    verdicts = [site["verdicts"]["onnx"] for site in made_.manifest["sites"] if site["pattern"]]
    assert ["dense"] * 2 == [verdict["kernel"] for verdict in verdicts]
    if weights == "packed":
        assert all(f"strips of a multiple of 16 rows, not {PATTERN}" in verdict["reason"] for verdict in verdicts)


def test_inspect_and_verify_show_it(artifact: Artifact) -> None:
    assert PATTERN in run("inspect", str(artifact.root))
    assert "2 sites satisfy their pattern bit for bit" in run("verify", str(artifact.root))
    assert PATTERN in run("verify", str(artifact.root), "--pattern", PATTERN)
    assert "64:2:8@strip" in run("patterns")


def test_explain_and_select_say_that_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program, backend = trace(model(), [random(6, 14)]), registry.backend("kernel")
    found = explain(program, backend, {PATTERN: {"*": PATTERN}}, (2,))

    up = found["sites"][0]["variants"][PATTERN]
    assert ("dense", PATTERN) == (up["kernel"], up["pattern"])
    assert up["reason"].startswith(REASON)
    assert up["nbytes"] < 4 * 33 * 14
    with pytest.raises(SparsecError, match=f"no candidate has a sparse kernel here: {REASON}"):
        choose(program, backend, Request("speedup", 1.5, 2, candidates=(PATTERN,)))


# The program ----------------------------------------------------------------------------------------------------------


def frozen() -> Program:
    return PassManager.parse(f"mask{{pattern={PATTERN}}} | freeze").run(trace(made(Residual), (random(2, 5),)))


def test_a_saved_program_is_found_whole_and_proven(tmp_path: Path) -> None:
    before = frozen()
    after = Program.load(before.save(tmp_path / "p"))

    for site in before.sites:
        again = after.sites[site.name]
        assert (site.pattern, PATTERN) == (again.pattern, str(again.pattern))
        assert site.selection is not None
        assert again.selection is not None
        tables = again.selection.tensors()
        assert all(torch.equal(table, tables[name]) for name, table in site.selection.tensors().items())
    assert all(check.ok for check in inspection.verify(tmp_path / "p", None))
    assert PATTERN in run("inspect", str(tmp_path / "p"))


def test_a_program_with_a_damaged_table_is_refused(tmp_path: Path) -> None:
    program = frozen()
    site = program.sites["up.weight"]
    assert site.selection is not None
    assert site.selection.columns is not None
    columns = site.selection.columns.clone()
    columns[0, 0, 0, 3] = 5
    broken = site.replace(selection=type(site.selection)(site.selection.positions, columns))

    with pytest.raises(ArtifactError, match=r"up\.weight: a column index is out of range: columns must be below 5"):
        Program.load(program.with_sites([broken]).save(tmp_path / "p"))


def test_a_weight_outside_its_stored_columns_fails_verify_by_name(tmp_path: Path) -> None:
    program = frozen()
    site = program.sites["up.weight"]
    assert site.pattern is not None
    assert site.selection is not None
    weight = site.read(program.module).clone()
    row, column = (~site.pattern.mask(site.selection, 5)).nonzero()[0, 1:].tolist()
    kept = int(weight[0, row].nonzero()[0])
    weight[0, row, column], weight[0, row, kept] = weight[0, row, kept].clone(), 0.0  # counts are as they were
    site.write(program.module, weight)
    failed = [check for check in inspection.verify(program.save(tmp_path / "p"), None) if not check.ok]

    assert ["up.weight"] == [check.name for check in failed]
    assert f"row {row}, column {column}: a nonzero that is not selected" in failed[0].detail


def test_weights_alone_are_proven_where_their_groups_are_found(tmp_path: Path) -> None:
    pattern, weight = Pattern.parse("32:2:8@strip"), random(1, 64, 40)
    kept = torch.where(pattern.mask(pattern.project(weight.abs()), 40), weight, 0.0)[0]
    swapped = kept.clone()
    for row in swapped:  # as many in every row and column, and no groups
        row[row.nonzero().flatten()[[0, -1]]] = 0.0
        row[(kept.any(0) & (row == 0)).nonzero().flatten()[[1, -2]]] = 1.0
    store.save_tensors(tmp_path / "w.safetensors", {"kept": kept, "swapped": swapped})
    checks = {check.name: check for check in inspection.verify(tmp_path / "w.safetensors", "32:2:8@strip")}

    assert checks["kept"].ok
    assert "holds bit for bit" == checks["kept"].detail
    assert not checks["swapped"].ok
    assert checks["swapped"].detail.startswith("not proven")


def test_freeze_refuses_a_mask_that_is_not_its_selection() -> None:
    program = PassManager.parse(f"mask{{pattern={PATTERN}}}").run(trace(made(Residual), (random(2, 5),)))
    site = program.sites["up.weight"]
    assert site.pattern is not None
    other = site.replace(selection=site.pattern.project(random(1, 8, 5, seed=9).abs()))

    with pytest.raises(PassError, match=r"up\.weight: its mask is not that of its selection"):
        PassManager.parse("freeze").run(program.with_sites([other]))
