"""The merge-adapter pass adds a LoRA to the weights and keeps their zeros. Reading one: test_three_stage_lora.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_files import pair, saved
from models import random
from safetensors.torch import load_file, save_file
from training_models import wide

from sparsec import PassManager
from sparsec.errors import RecipeError, UsageError
from sparsec.passes.merge_adapter import MergeAdapter
from sparsec.program import Program
from sparsec.training.adapters import TENSORS

FLOAT32 = 1e-6  # one product of rank 2 and one sum


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of `up` alone: scale 1.5."""
    return saved(tmp_path, pair("up", 20, 12))


def weights(program: Program, name: str = "up.weight") -> torch.Tensor:
    return program.sites[name].read(program.module)[0]


def delta() -> torch.Tensor:
    parts = pair("up", 20, 12)
    return 1.5 * parts["up.lora_B"] @ parts["up.lora_A"]


@pytest.mark.parametrize("pattern", ["2:4", "16:2:8", "16:2:6@strip", "4:2:5+2:4", "unstructured:0.75"])
@pytest.mark.parametrize(
    "passes", ["mask | freeze | merge-adapter{adapter=A}", "mask | merge-adapter{adapter=A} | freeze"]
)
def test_zeros_stay_and_all_else_is_the_sum(pattern: str, passes: str, adapter: Path) -> None:
    before = PassManager.parse("mask | freeze").run(wide({"*": pattern}))
    text = passes.replace("adapter=A", f"adapter={adapter}")
    done, reports = PassManager.parse(text).run_reported(wide({"*": pattern}), check="outputs")
    kept = weights(before) != 0

    assert {"merged": 1, "sites": ["up.weight"]} == next(one.data for one in reports if "merged" in one.data)
    assert torch.allclose(torch.where(kept, weights(before) + delta(), 0.0), weights(done), atol=FLOAT32)
    assert torch.equal(weights(before, "down.weight"), weights(done, "down.weight"))
    for site in done.sites.sparse:
        assert site.pattern is not None and site.selection is not None
        assert 0 == site.pattern.violations_of(site.read(done.module), site.selection).count
    assert "frozen" in done.facts


def test_a_dense_model_stays_dense_and_may_be_pruned_afterwards(adapter: Path) -> None:
    text = f"merge-adapter{{adapter={adapter}}}"
    done, (report,) = PassManager.parse(text).run_reported(wide(), check="outputs")
    pruned = PassManager.parse(f"{text} | mask{{pattern=2:4}} | freeze").run(wide())

    assert torch.allclose(weights(wide()) + delta(), weights(done), atol=FLOAT32)
    assert ["up.weight"] == [note.site for note in report.notes]
    assert torch.equal(weights(pruned), torch.where(weights(pruned) != 0, weights(done), 0.0))


def test_the_given_program_keeps_its_weights(adapter: Path) -> None:
    before = weights(wide()).clone()
    PassManager.parse(f"merge-adapter{{adapter={adapter}}}").run(wide())

    assert torch.equal(before, weights(wide()))


def test_an_adapter_is_merged_once(adapter: Path) -> None:
    text = f"merge-adapter{{adapter={adapter}}}"
    with pytest.raises(RecipeError, match=r"is merged already; leave out the second merge-adapter"):
        PassManager.parse(f"{text} | {text}").run(wide())


def test_modules_that_were_trained_whole_take_the_place_of_the_models(tmp_path: Path) -> None:
    head, bias = random(3, 12, seed=8), random(3, seed=9)
    parts = {**pair("up", 20, 12), "head": head}
    folder = saved(tmp_path, parts, modules_to_save=["head"])
    save_file({**load_file(folder / TENSORS), "base_model.model.head.bias": bias}, folder / TENSORS)
    before = wide()
    done, (_, report, _) = PassManager.parse(
        f"mask{{pattern=2:4}} | merge-adapter{{adapter={folder}}} | freeze"
    ).run_reported(before)

    assert ["head.bias", "head.weight"] == report.data["replaced"]
    assert torch.equal(head, done.module.get_parameter("head.weight"))
    assert torch.equal(bias, done.module.get_parameter("head.bias"))
    assert not torch.equal(head, before.module.get_parameter("head.weight"))
    assert 0.5 == float((weights(done) == 0).float().mean())


def test_a_pruned_site_that_is_replaced_keeps_its_zeros(tmp_path: Path) -> None:
    folder = saved(tmp_path, {**pair("up", 20, 12), "down": random(12, 20, seed=8)}, modules_to_save=["down"])
    done = PassManager.parse(f"mask{{pattern=2:4}} | freeze | merge-adapter{{adapter={folder}}}").run(wide())
    kept = weights(PassManager.parse("mask{pattern=2:4} | freeze").run(wide()), "down.weight") != 0

    assert torch.equal(torch.where(kept, random(12, 20, seed=8), 0.0), weights(done, "down.weight"))


def test_a_head_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    for name, rows, said in (("classifier", 3, "has none of this name"), ("head", 4, r"has it as \[3, 12\]")):
        saved(tmp_path, {**pair("up", 20, 12), name: random(rows, 12)}, modules_to_save=[name])
        with pytest.raises(UsageError, match=rf"replaces {name}.weight, .* this model {said}; name the model"):
            PassManager.parse(f"merge-adapter{{adapter={tmp_path}}}").run(wide())


def test_what_cannot_be_merged_is_refused(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(RecipeError, match=r"no adapter was named; write merge-adapter\{adapter=FOLDER\}"):
        PassManager.parse("merge-adapter").run(wide())
    permuted = wide().replace(facts=wide().facts | {"permuted"})
    with pytest.raises(UsageError, match=r"channels are permuted, .*: merge it before permute"):
        PassManager.parse(f"merge-adapter{{adapter={adapter}}}").run(permuted)
    for module, rank, said in (("up", 13, "rank is 13; expected at most 12"), ("sideways", 2, "changes sideways, no")):
        saved(tmp_path, pair(module, 20, 12, rank))
        with pytest.raises(UsageError, match=said):
            PassManager.parse(f"merge-adapter{{adapter={tmp_path}}}").run(wide())
    assert "lossy" == MergeAdapter.equivalence
