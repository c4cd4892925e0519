"""The model card says what hubs read, what was pruned, what it cost, and how to make it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from sparsec.backends.hf.card import card, inherited

SITE = {"name": "a", "role": "ffn.up", "shape": [1, 8, 4], "pattern": "2:4", "words": "keep 2 of 4 (50 % zeros)"}
QUALITY = {"words": "cosine .98", "samples": "8 docstrings"}


def manifest(**changes: Any) -> dict[str, Any]:
    recipe = {"model": "someone/base", "targets": {"*": "2:4"}, "passes": "mask | freeze", "train": "", "include": []}
    made = {"sparsec": "0.1.0", "torch": torch.__version__, "source": {"model": "someone/base"}, "recipe": recipe}
    made |= {"backends": {"hf": {"class": "BertModel", "card": {"license": "mit"}}}, "quality": QUALITY}
    return {**made, "sites": [SITE, {**SITE, "name": "b"}, {**SITE, "name": "c", "pattern": None}], **changes}


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_front_matter_is_what_hubs_read() -> None:
    expected = {"library_name": "transformers", "license": "mit", "base_model": "someone/base"}

    assert {**expected, "tags": ["sparse", "sparsec", "2:4"]} == front(card(manifest()))


def test_a_folder_of_this_machine_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone/base").mkdir(parents=True)

    assert "base_model" not in front(card(manifest()))
    assert "someone" not in card(manifest())


def test_the_text_tells_sites_versions_and_the_recipe() -> None:
    text = card(manifest())

    assert "2 of 3 weight matrices of someone/base follow a sparsity pattern exactly; 50 % of their weights" in text
    assert "| ffn.up | 2 | 8 x 4 | 2:4 |" in text
    assert f"sparsec 0.1.0, torch {torch.__version__}, transformers {transformers.__version__}" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert {"targets": {"*": "2:4"}, "passes": "mask | freeze"} == recipe
    assert "\nsparsec compile someone/base --recipe recipe.yaml\n" in text


def test_figures_of_a_task_stand_beside_those_before() -> None:
    task = {
        "metric": "f1",
        "sparse": {"f1": 0.8, "accuracy": 0.9},
        "dense": {"f1": 0.85, "accuracy": 0.92},
        "data": "dev.tsv",
    }
    text = card(manifest(quality={**QUALITY, "task": task}))

    assert "| f1 | 0.8500 | 0.8000 |\n| accuracy | 0.9200 | 0.9000 |" in text
    headless = {key: value for key, value in task.items() if key != "dense"}
    assert "| f1 | untrained head | 0.8000 |" in card(manifest(quality={**QUALITY, "task": headless}))
    assert "No task was judged; compile with --eval" in card(manifest())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "---\nlicense: mit\nlanguage: [en]\nwidget: [x]\nbase_model: 3\n---\n# A",
            {"license": "mit", "language": ["en"]},
        ),
        ("# no front matter", {}),
        ("---\n- a\n---\n", {}),
        ("---\na: [\n---\n", {}),
        ("---\nlicense: !!python/object:os.system x\n---\n", {}),
        (None, {}),
    ],
)
def test_what_holds_for_the_sparse_model_too_is_inherited(text: str | None, expected: object, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)

    assert expected == inherited(tmp_path)
