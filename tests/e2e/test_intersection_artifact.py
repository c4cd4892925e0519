"""Two patterns at once from the outside: one set of weights for the kernels and for ONNX, proven from its tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models import Residual, made, random
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsec
from sparsec import Artifact, PassManager, Program, inspection, registry, store, trace
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.backends.kernel.cpu.stream import pack
from sparsec.cli import app
from sparsec.data import Calibration
from sparsec.errors import PatternError
from sparsec.layout import compress, decompress, stored_as
from sparsec.lowered import packed_calls
from sparsec.ops import int8_linear
from sparsec.pattern import NM, VNM, Pattern
from sparsec.pipeline import Context
from sparsec.program import read_graph

PATTERN, FIRST = "4:2:5+1:4", "4:2:5"  # 2:4 leaves few slots empty, 1:4 some in every row; and it implies 2:4


def model() -> nn.Module:
    """Tails of rows and columns in both sites; the third layer, a head, stays dense."""
    return made(lambda: nn.Sequential(nn.Linear(14, 33), nn.GELU(), nn.Linear(33, 23), nn.ReLU(), nn.Linear(23, 3)))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("intersection") / "a"
    backends = ("kernel", "onnx{weights=packed}")
    return sparsec.compile(model(), [random(6, 14)], pattern=PATTERN, backends=backends, out=out)


def weights(artifact: Artifact) -> dict[str, Tensor]:
    """What the kernel backend's tables hold, by site."""
    return {call.site: decompress(call.layout) for call in packed_calls(read_graph(artifact.root))}


def initializers(artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of its ONNX file."""
    read = onnx.numpy_helper.to_array
    tensors = onnx.load(artifact.root / "model.onnx").graph.initializer
    return {tensor.name: torch.from_numpy(read(tensor).copy()) for tensor in tensors}


def cli(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(args))
    assert code == result.exit_code, result.output
    return " ".join(result.output.split())


def dry_run(*args: str) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(cli("compile", "demo:minilm", "--dry-run", "--json", *args))
    return recipe


# The artifact ---------------------------------------------------------------------------------------------------------


def test_every_site_follows_both_patterns_and_runs_as_the_first(artifact: Artifact) -> None:
    sites = {site["name"]: site for site in artifact.manifest["sites"] if site["pattern"]}

    assert [PATTERN] * 2 == [site["pattern"] for site in sites.values()]
    assert all(site["verdicts"]["kernel"]["sparse"] for site in sites.values())
    for call in packed_calls(read_graph(artifact.root)):
        weight, spare = decompress(call.layout), int((call.layout.values == 0).sum())
        assert VNM(4, 2, 5) == call.layout.pattern
        assert call.layout.nbytes == sites[call.site]["nbytes_sparse"]
        assert not NM(1, 4).violations(weight).count
        assert spare > call.layout.values.numel() // 4


def test_verify_proves_both_patterns_from_the_tables(artifact: Artifact) -> None:
    assert all(check.ok for check in artifact.verify())
    for pattern in ("2:4", "1:4", FIRST, PATTERN):
        assert all(check.ok for check in inspection.verify(artifact.root, pattern)), pattern
    assert ["pattern 1:8"] == [check.name for check in inspection.verify(artifact.root, "1:8") if not check.ok]


def test_onnx_holds_the_kernels_tables_bit_for_bit(artifact: Artifact) -> None:
    tables, held = store.load_tensors(artifact.root / "weights.safetensors"), initializers(artifact)

    assert "onnx: packed tables" in {check.name for check in artifact.verify()}
    for site in (site for site in artifact.manifest["sites"] if site["pattern"]):
        assert "sparsec::NMLinear" == site["verdicts"]["onnx"]["kernel"]
        for table in ("values", "positions", "columns"):
            name = f"{site['name']}_{table}"
            assert torch.equal(tables[name].view(torch.uint8), held[name].view(torch.uint8)), name


@pytest.mark.slow
def test_dense_onnx_holds_the_same_weights_with_zeros_in_place(artifact: Artifact, tmp_path: Path) -> None:
    backends = ("kernel", "onnx{weights=dense}")
    dense = sparsec.compile(model(), [random(6, 14)], pattern=PATTERN, backends=backends, out=tmp_path / "a")

    assert all(check.ok for check in dense.verify())
    for name, weight in weights(artifact).items():
        assert torch.equal(weight[0].view(torch.int32), initializers(dense)[name].view(torch.int32)), name


def test_a_nonzero_in_a_spare_slot_fails_verify_by_name(artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.root, tmp_path / "b")
    tensors = store.load_tensors(tmp_path / "b/weights.safetensors")
    values = tensors["2.weight_values"]
    spare = (values[:, :, :-1] == 0).nonzero()[0].tolist()  # not in the tail, where it would be padding
    values[*spare] = 1.0
    store.save_tensors(tmp_path / "b/weights.safetensors", tensors)
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    store.seal(tmp_path / "b", "sparsec-artifact", {key: value for key, value in manifest.items() if key != "files"})
    failed = {check.name: check.detail for check in sparsec.verify(tmp_path / "b") if not check.ok}

    assert failed["kernel: pattern"].startswith(f"2.weight: row {spare[1]}, group ")
    assert failed["kernel: pattern"].endswith("2 nonzero columns, at most 1 allowed (1:4)")


def test_what_the_second_pattern_costs_is_told_for_each_site_and_all(artifact: Artifact) -> None:
    dense = dict(model().named_parameters())
    kept, alone, total = 0.0, 0.0, 0.0
    for name, weight in weights(artifact).items():
        (site,) = [one for one in artifact.manifest["sites"] if one["name"] == name]
        size = dense[name].detach().abs()
        first = float(size[Pattern.parse(FIRST).choose(size)[1][0]].sum())
        assert site["intersection"]["alone"] == pytest.approx(first / float(size.sum()))
        assert site["intersection"]["together"] == pytest.approx(float(weight.abs().sum() / size.sum()))
        assert site["intersection"]["together"] == pytest.approx(site["retained"])
        assert site["intersection"]["together"] < site["intersection"]["alone"]
        kept, alone, total = kept + float(weight.abs().sum()), alone + first, total + float(size.sum())

    whole = artifact.manifest["intersections"][PATTERN]
    assert (2, pytest.approx(alone / total), pytest.approx(kept / total)) == (
        whole["sites"],
        whole["alone"],
        whole["together"],
    )
    said = f"both keep {whole['together']:.3f} of the weights' magnitude in 2 sites, {FIRST} alone {whole['alone']:.3f}"
    assert f"{PATTERN}: {said}" in cli("inspect", str(artifact.root))


def test_rounded_values_follow_both_patterns_too(tmp_path: Path) -> None:
    made_ = sparsec.compile(model(), [random(6, 14)], pattern="16:2:5+1:4", values="int8", out=tmp_path / "a")

    assert all(check.ok for check in made_.verify())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("text", ["64:2:5+2:4", "64:2:5+1:4"])
def test_the_kernel_gives_the_bits_of_the_same_weights_stored_as_the_first_pattern(text: str, tokens: int) -> None:
    pattern, first = Pattern.parse(text), VNM(64, 2, 5)
    weight, x, bias = random(1, 150, 203), random(tokens, 203, seed=1), random(150, seed=2)
    selection, mask = pattern.choose(weight.abs())
    kept = torch.where(mask, weight, 0.0)
    layouts = [compress(weight, pattern, selection), compress(kept, first, first.project(kept.abs(), "l1"))]
    products = [stream_linear(x, pack(layout), bias, 150) for layout in layouts]

    assert torch.equal(*map(decompress, layouts))
    assert torch.equal(*products)
    assert torch.equal(*(int8_linear(x, stored_as(layout, "int8"), bias) for layout in layouts))


# The program ----------------------------------------------------------------------------------------------------------


def frozen() -> Program:
    return PassManager.parse(f"mask{{pattern={PATTERN}}} | freeze").run(trace(made(Residual), (random(2, 5),)))


def test_a_saved_program_is_found_whole_and_proven(tmp_path: Path) -> None:
    before = frozen()
    after = Program.load(before.save(tmp_path / "p"))

    for site in before.sites:
        again = after.sites[site.name]
        assert site.pattern is not None and again.pattern == site.pattern
        assert site.selection is not None and again.selection is not None and again.selection.kept is not None
        cols = site.shape[2]
        assert torch.equal(site.pattern.mask(site.selection, cols), again.pattern.mask(again.selection, cols))
    assert all(check.ok for check in inspection.verify(tmp_path / "p", None))
    masked = PassManager.parse("mask").run(after.replace(facts=after.facts - {"frozen"}))
    for site in before.sites:
        assert torch.equal(site.read(before.module), masked.sites[site.name].read(masked.module))


def test_a_weight_in_a_spare_slot_fails_verify_by_name(tmp_path: Path) -> None:
    program = frozen()
    site = program.sites["down.weight"]
    assert site.pattern is not None and site.selection is not None
    left_out = site.pattern.executable.mask(site.selection, 8) & ~site.pattern.mask(site.selection, 8)
    row, column = left_out.nonzero()[0, 1:].tolist()
    weight = site.read(program.module).clone()
    weight[0, row], weight[0, row, column] = 0.0, 1.0  # which breaks neither pattern
    site.write(program.module, weight)
    failed = [check for check in inspection.verify(program.save(tmp_path / "p"), None) if not check.ok]

    assert ["down.weight"] == [check.name for check in failed]
    assert f"row {row}, column {column}: a nonzero that is not selected" in failed[0].detail


# Commands and passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "targets"),
    [
        (("--pattern", "64:2:5", "--also", "2:4"), {"*": "64:2:5+2:4"}),
        (("--pattern", "64:2:8", "--also", "2:4"), {"*": "64:2:8"}),
        (("--pattern", "dense", "--layer", "re:fc=2:5", "--also", "2:4"), {"*": "dense", "re:fc": "2:5+2:4"}),
        (("--pattern", "2:5", "--ignore", "re:fc", "--also", "2:4"), {"*": "2:5+2:4", "re:fc": "ignore"}),
        (("--pattern", "64:2:5", "--backend", "kernel,tensorrt"), {"*": "64:2:5+2:4"}),
        (("--pattern", "64:2:5", "--backend", "tensorrt{precision=fp16}"), {"*": "64:2:5+2:4"}),
        (("--pattern", "64:2:5", "--backend", "tensorrt", "--also", "1:4"), {"*": "64:2:5+1:4"}),
        (("--pattern", "unstructured:0.7", "--backend", "tensorrt"), {"*": "unstructured:0.7"}),  # it refuses itself
        (("--pattern", "64:2:5", "--backend", "kernel,onnx"), {"*": "64:2:5"}),
    ],
)
def test_also_adds_a_pattern_where_it_is_not_implied(args: tuple[str, ...], targets: dict[str, str]) -> None:
    assert targets == dry_run(*args)["targets"]


def test_a_recipe_file_is_changed_by_also_and_by_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: demo:minilm\ntargets: {'*': 64:2:5}\nbackends: [tensorrt]\n")
    recipe = ("--recipe", str(tmp_path / "r.yaml"))

    assert {"*": "64:2:5"} == dry_run(*recipe)["targets"]
    assert {"*": "64:2:5+2:4"} == dry_run(*recipe, "--also", "2:4")["targets"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--pattern", "unstructured:0.7", "--also", "2:4"), "found unstructured:0.7 and 2:4"),
        (("--pattern", "64:2:5", "--also", "banana"), "pattern 'banana' cannot be read"),
        (("--pattern", "64:2:5", "--also", "64:2:8"), "found 64:2:5 and 64:2:8"),
        (("--pattern", "64:2:5", "--also", "64:2:5"), "found 64:2:5 and 64:2:5"),
        (("--pattern", "2:4", "--also", "dense"), "found 2:4 and dense"),
        (("--passes", "mask{pattern=2:5} | freeze", "--also", "2:4"), "found none of them"),
    ],
)
def test_also_is_refused_where_it_means_nothing(args: tuple[str, ...], message: str) -> None:
    assert message in cli("compile", "demo:minilm", "--dry-run", *args, code=2)


def test_also_goes_with_a_target_speedup() -> None:
    assert (
        "choose-vm{speedup=1.5, objective=reconstruction, also=2:4} | oneshot"
        == dry_run("--target-speedup", "1.5", "--also", "2:4")["passes"]
    )


def test_patterns_are_chosen_among_those_that_follow_both() -> None:
    program = trace(model(), [random(6, 14)])
    passes = "choose-vm{density=0.35, also=2:4, candidates='4:2:5,4:2:8,2:4'}".replace("'", '"')
    after = PassManager.parse(passes).run(program)

    chosen = [site.pattern for site in after.sites.sparse if site.pattern]
    assert chosen
    assert all(pattern.implies(NM(2, 4)) for pattern in chosen)


def test_what_runs_faster_is_predicted_as_for_the_first_pattern(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend, shape = registry.backend("kernel"), (1, 64, 40)
    pattern = Pattern.parse("64:2:5+2:4")

    assert backend.cost(shape, pattern.executable, 8) == backend.cost(shape, pattern, 8)


def test_sparsegpt_refuses_it_by_name_with_advice() -> None:
    program = trace(model(), [random(6, 14)])
    given = Context(resources={"calibration": Calibration((program.inputs,), "made here", "0" * 64, 6)})

    with pytest.raises(PatternError, match=r"0\.weight: 4:2:5\+1:4: solver sparsegpt .*use alps or refit"):
        PassManager.parse(f"oneshot{{pattern={PATTERN}, solver=sparsegpt}}").run(program, given)
