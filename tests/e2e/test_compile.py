"""The main job from the outside: the command line on a small model with real files, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec
from sparsec import Options, show, store
from sparsec.errors import ArtifactError, UsageError, VerificationError
from sparsec.layout import Values

RELATIVE = 1e-5  # reordered fp32 sums over at most 64 products, far below it


def run(*args: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsec.cli", *args]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a small BERT: odd sizes, so that every tail rule is met."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=70,
        max_position_embeddings=40,
    )
    path = tmp_path_factory.mktemp("model")
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "small.sparsec"
    done = run(
        "compile", str(folder), "--pattern", "16:2:5", "--backend", "kernel,onnx", "-o", str(out), cwd=out.parent
    )
    assert done.returncode == 0, done.stderr
    return out


def test_compile_prints_sites_sizes_quality_proofs_and_speed(folder: Path, tmp_path: Path) -> None:
    done = run("compile", str(folder), "--pattern", "2:4", "-o", "x.sparsec", cwd=tmp_path, env={"COLUMNS": "120"})

    assert done.returncode == 0, done.stderr
    for part in (
        "12 of 13 sites sparse",
        "--include-pooler",
        "keep 2 of 4 (50 % zeros)",
        "Quality",
        "proven",
        "speed vs dense",
    ):
        assert part in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["x.sparsec"]


def test_both_backends_agree_with_the_masked_model_for_all_sizes(folder: Path, artifact: Path) -> None:
    from transformers import BertModel

    model = BertModel.from_pretrained(folder).eval()
    kernel, onnx = sparsec.load(artifact), sparsec.load(artifact, backend="onnx")
    masked = sparsec.Artifact.open(artifact).load_dense()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in dict(masked.graph.named_parameters()):
                parameter.copy_(masked.graph.get_parameter(name))
            elif f"{name}_dense" in dict(masked.graph.named_buffers()):
                parameter.copy_(masked.graph.get_buffer(f"{name}_dense"))

        for batch, length in [(1, 2), (3, 37), (8, 40), (1, 1)]:
            inputs = {
                "input_ids": torch.randint(0, 50, (batch, length)),
                "attention_mask": torch.ones(batch, length).long(),
            }
            expected = model(**inputs)
            for runnable in (kernel, onnx):
                found = runnable(**inputs)
                for key in ("last_hidden_state", "pooler_output"):
                    scale = float(expected[key].abs().max())
                    torch.testing.assert_close(found[key], expected[key], rtol=0, atol=RELATIVE * scale)


def test_load_needs_neither_transformers_nor_onnx_nor_pydantic(artifact: Path, tmp_path: Path) -> None:
    code = f"""
import sys, torch, sparsec
module = sparsec.load({str(artifact)!r})
ids = torch.zeros(1, 3, dtype=torch.int64)
print(tuple(module(input_ids=ids, attention_mask=torch.ones_like(ids))["last_hidden_state"].shape))
print(sorted({{"transformers", "onnx", "onnxruntime", "pydantic", "typer", "rich"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert done.stdout.splitlines() == ["(1, 3, 36)", "[]"], done.stderr


def test_verify_proves_every_backend_and_a_forced_instruction_set(artifact: Path, tmp_path: Path) -> None:
    for level in ("", "portable", "reference"):
        done = run("verify", str(artifact), "--json", cwd=tmp_path, env={"SPARSEC_ISA": level})
        names = [check["name"] for check in json.loads(done.stdout)["checks"]]

        assert done.returncode == 0, done.stdout
        assert "kernel: outputs" in names
        assert any(name.startswith("onnx") for name in names)
        assert ("kernel: pack" in names) == (level != "reference")


def test_the_reference_path_says_so_once(artifact: Path, tmp_path: Path) -> None:
    code = f"import sparsec; sparsec.load({str(artifact)!r}); sparsec.load({str(artifact)!r})"
    env = {**os.environ, "SPARSEC_ISA": "reference"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )

    assert done.stderr.count("dense reference path") == 1


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.sha256", "graph.json", "weights.safetensors", "check.safetensors", "model.onnx"]
)
def test_one_flipped_byte_is_found_and_the_file_named(artifact: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "broken.sparsec"
    shutil.copytree(artifact, broken)
    data = bytearray((broken / name).read_bytes())
    data[len(data) // 2] ^= 1
    (broken / name).write_bytes(data)

    done = run("verify", str(broken), cwd=tmp_path)

    assert done.returncode == 1
    assert name in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        sparsec.load(broken)


def test_a_column_out_of_range_never_reaches_native_code_even_with_right_hashes(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.sparsec"
    shutil.copytree(artifact, broken)
    tensors = store.load_tensors(broken / "weights.safetensors")
    name = next(key for key in tensors if key.endswith("_columns"))
    tensors[name][0, 0, 0, 3] = 200
    store.save_tensors(broken / "weights.safetensors", tensors)
    manifest = json.loads((broken / "manifest.json").read_text())
    store.seal(broken, "sparsec-artifact", {k: v for k, v in manifest.items() if k != "files"})

    with pytest.raises(ArtifactError, match="column index is out of range"):
        sparsec.load(broken)


def test_a_weight_outside_its_pattern_fails_verify_by_name(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.sparsec"
    shutil.copytree(artifact, broken)
    tensors = store.load_tensors(broken / "weights.safetensors")
    name = next(key for key in tensors if key.endswith("_values"))
    tensors[name][0, 0, 0, 0] += 0.5
    store.save_tensors(broken / "weights.safetensors", tensors)
    manifest = json.loads((broken / "manifest.json").read_text())
    store.seal(broken, "sparsec-artifact", {k: v for k, v in manifest.items() if k != "files"})

    failed = [check.name for check in sparsec.verify(broken) if not check.ok]

    assert "kernel: outputs" in failed
    assert any(name.startswith("onnx") for name in failed)  # the two backends no longer hold the same weights


@pytest.mark.slow
def test_compiling_again_from_the_manifest_gives_the_same_bits(artifact: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.sparsec"
    done = run("compile", "--recipe", str(artifact / "manifest.json"), "-o", str(again), cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    for name in ("graph.json", "weights.safetensors"):
        assert (artifact / name).read_bytes() == (again / name).read_bytes()


def test_dry_run_prints_a_recipe_that_compiles(folder: Path, tmp_path: Path) -> None:
    printed = run("compile", str(folder), "--layer", "re:output.dense=2:4", "--allow-dense", "--dry-run", cwd=tmp_path)
    (tmp_path / "recipe.yaml").write_text(printed.stdout)

    done = run("compile", "--recipe", "recipe.yaml", "--allow-dense", "-o", "r.sparsec", "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert sum(site["pattern"] == "2:4" for site in manifest["sites"]) == 4


def test_quality_below_the_asked_one_fails_and_leaves_nothing_where_no_pass_keeps_work(
    folder: Path, tmp_path: Path
) -> None:
    done = run("compile", str(folder), "--pattern", "16:2:16", "--min-quality", "1", "-o", "q.sparsec", cwd=tmp_path)

    assert done.returncode == 1
    assert "--min-quality" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_paragraph_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    limited = f"""
import resource, sys
from sparsec.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # bytes a file may have
sys.argv = ["sparsec", "compile", {str(folder)!r}, "--pattern", "2:4", "-o", "full.sparsec"]
main()
"""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", limited], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.slow  # tests/e2e/test_bench.py looks at tables, plots and JSON in every run
def test_bench_reports_ratios_against_dense_and_onnxruntime(artifact: Path, tmp_path: Path) -> None:
    done = run("bench", str(artifact), "--against", "dense,onnxruntime", "--seconds", "0.1", "--json", cwd=tmp_path)

    rows = json.loads(done.stdout)["speed"]
    assert [row["tokens"] for row in rows][:2] == [1, 32]
    assert set(rows[0]["seconds"]) == {"kernel", "dense", "onnxruntime"}


def test_inspect_finds_patterns_in_artifacts_checkpoints_and_onnx_files(
    artifact: Path, folder: Path, tmp_path: Path
) -> None:
    assert "16:2:5" in run("inspect", str(artifact), cwd=tmp_path).stdout
    checkpoint = json.loads(run("inspect", str(folder), "--json", cwd=tmp_path).stdout)
    assert {weight["pattern"] for weight in checkpoint["weights"]} == {None}
    onnx = json.loads(run("inspect", str(artifact / "model.onnx"), "--json", cwd=tmp_path).stdout)
    assert "16:2:5" in {weight["pattern"] for weight in onnx["weights"]}
    assert run("verify", str(artifact / "model.onnx"), "--pattern", "16:2:5", cwd=tmp_path).returncode == 0
    assert run("verify", str(artifact / "model.onnx"), "--pattern", "1:4", cwd=tmp_path).returncode == 1


def test_the_catalogues_list_every_name(tmp_path: Path) -> None:
    assert "magnitude" in run("passes", cwd=tmp_path).stdout
    assert "keep 2 of 5" in run("patterns", cwd=tmp_path).stdout
    assert "onnx" in run("backends", "--json", cwd=tmp_path).stdout


def test_python_compiles_a_module_with_its_own_example(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 33), torch.nn.GELU(), torch.nn.Linear(33, 20), torch.nn.GELU(), torch.nn.Linear(20, 3)
    )

    made = sparsec.compile(model, [torch.randn(4, 20)], pattern="8:2:5", out=tmp_path / "mlp.sparsec")

    x = torch.randn(7, 20)
    with torch.no_grad():
        torch.testing.assert_close(made.load()(x)["output"], made.load_dense()(x)["output"], rtol=0, atol=1e-6)
    assert [site["role"] for site in made.manifest["sites"]] == ["ffn.up", "ffn.up", "head"]
    with pytest.raises(UsageError, match="exists already"):
        sparsec.compile(model, [torch.randn(4, 20)], pattern="8:2:5", out=tmp_path / "mlp.sparsec")
    with pytest.raises(VerificationError, match="min-quality"):
        sparsec.compile(
            model,
            [torch.randn(4, 20)],
            pattern="8:2:16",
            out=tmp_path / "q",
            options=sparsec.Options(min_quality=0.9999),
        )


@pytest.mark.parametrize(("pattern", "changed"), [("2:4", 0), ("1:4", 2)])
def test_pruning_a_sparse_model_anew_is_said_where_it_changed_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str, changed: int
) -> None:
    up, down, head = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), torch.nn.Linear(16, 3)
    for layer in (up, down):
        layer.weight.data *= torch.tensor([1.0, 0, 0, 1]).repeat(layer.in_features // 4)
    model, quick = torch.nn.Sequential(up, torch.nn.ReLU(), down, torch.nn.ReLU(), head), Options(measure_speed=False)
    artifact = sparsec.compile(
        model, [torch.randn(2, 16)], pattern=pattern, passes="mask | freeze", out=tmp_path / "anew", options=quick
    )
    show.manifest(artifact.manifest, 0)
    words = f"2 sites had zeros when they came, and {changed} of them were changed here; to keep"

    assert bool(changed) == (words in " ".join(capsys.readouterr().out.split()))
    assert bool(changed) == artifact.manifest.get("pruned_before", "").startswith(words)


def test_a_trusted_pt2_file_compiles_whatever_it_returns(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(3, 12),)), tmp_path / "m.pt2")

    done = run("compile", "m.pt2", "--trust", "--pattern", "2:5", "-o", "m.sparsec", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert set(sparsec.load(tmp_path / "m.sparsec")(torch.randn(3, 12))) == {"output"}


def test_a_function_of_the_current_folder_compiles(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n"
        "    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)), torch.zeros(2, 8)\n"
    )

    done = run("compile", "mine:make", "--pattern", "2:4", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine-make.sparsec" / "manifest.json").is_file()


def check_values(manifest: dict[str, Any], values: str, most_bytes: float) -> None:
    found, sparse = manifest["values"], [site for site in manifest["sites"] if site["pattern"]]
    assert values == found["type"] == manifest["recipe"]["values"]
    assert 0 < found["largest_difference"] < manifest["tolerance"] <= 0.1
    assert 0 < found["relative_error"] < 0.1
    assert {values} == {site["values"] for site in sparse}
    assert all(site["nbytes_sparse"] < most_bytes * site["nbytes_dense"] for site in sparse)


def test_an_int8_artifact_says_what_rounding_cost_and_holds_at_every_level(folder: Path, tmp_path: Path) -> None:
    options = ("--pattern", "16:2:8", "--layer", "re:attention.output=2:4", "--values", "int8")
    done = run("compile", str(folder), *options, "-o", "v.sparsec", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "Values stored as int8" in done.stdout
    manifest = json.loads((tmp_path / "v.sparsec/manifest.json").read_text())
    check_values(manifest, "int8", 0.25)
    verdicts = {site["pattern"]: site["verdicts"]["kernel"] for site in manifest["sites"] if site["pattern"]}
    assert verdicts["16:2:8"]["sparse"]
    assert "int8" in verdicts["16:2:8"]["kernel"]
    assert "need the 4 shared columns" in verdicts["2:4"]["reason"]
    assert run("verify", "v.sparsec", cwd=tmp_path, env={"SPARSEC_ISA": "reference"}).returncode == 0


@pytest.mark.parametrize(("values", "most_bytes"), [("bf16", 0.3), ("int8", 0.2)])
def test_rounded_values_are_measured_and_verified(tmp_path: Path, values: Values, most_bytes: float) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(40, 66), torch.nn.GELU(), torch.nn.Linear(66, 40), torch.nn.GELU(), torch.nn.Linear(40, 3)
    )
    made = sparsec.compile(model, [torch.randn(4, 40)], pattern="16:2:8", values=values, out=tmp_path / "v.sparsec")

    check_values(made.manifest, values, most_bytes)
    assert all(check.ok for check in made.verify())
    assert {"kernel: pack", "kernel: kernel", "kernel: outputs"} <= {check.name for check in made.verify()}
    x = torch.randn(7, 40)
    with torch.no_grad():
        found, dense = made.load()(x)["output"], made.load_dense()(x)["output"]
    assert float((found - dense).abs().max()) <= made.manifest["tolerance"] * float(dense.abs().max())


def test_a_backend_refuses_values_it_cannot_store(folder: Path, tmp_path: Path) -> None:
    done = run("compile", str(folder), "--pattern", "2:4", "--values", "int8", "--backend", "kernel,onnx", cwd=tmp_path)

    assert done.returncode == 2
    assert "backend onnx stores fp32 or bf16 weights, found --values int8" in done.stderr
    assert os.listdir(tmp_path) == []
