"""A compile that is killed in the middle is resumed, solves only what was left, and ends bit-identical."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KILLED_AFTER, SITES = 5, 12

COUNTING = """
import os, signal, sys
from sparsec.oneshot.journal import Journal

killed_after, write, written = {killed_after}, Journal.write, []

def counted(self, site, entry):
    write(self, site, entry)
    written.append(site.name)
    if len(written) == killed_after:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.write = counted
sys.argv = ["sparsec", "compile", *{arguments!r}]
from sparsec.cli import main
try:
    main()
finally:
    print("solved", len(written), file=sys.stderr)
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A small BERT in bf16 and its calibration tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 70}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=40, **sizes))
    model.bfloat16().save_pretrained(tmp_path / "model")
    rows = torch.randint(0, 50, (8, 16)).tolist()
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    data = ["--calib", str(tmp_path / "tokens.jsonl"), "--num-calibration-samples", "8", "--max-seq-length", "16"]
    passes = ["--passes", "oneshot{solver=sparsegpt}", "--dtype", "bf16", "--backend", "hf"]
    return [str(tmp_path / "model"), "--pattern", "16:2:5", *passes, *data]


def compiled(arguments: list[str], cwd: Path, killed_after: int = 0) -> subprocess.CompletedProcess[str]:
    code = COUNTING.format(killed_after=killed_after, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_killed_compile_is_resumed_with_its_own_options_only_and_ends_bit_identical(
    arguments: list[str], tmp_path: Path
) -> None:
    whole = compiled([*arguments, "-o", "whole"], tmp_path)
    killed = compiled([*arguments, "-o", "again"], tmp_path, KILLED_AFTER)
    left = sorted(os.listdir(tmp_path))
    other = compiled([*arguments, "--seed", "1", "-o", "again", "--resume"], tmp_path)
    resumed = compiled([*arguments, "-o", "again", "--resume"], tmp_path)

    assert (0, -signal.SIGKILL, 0) == (whole.returncode, killed.returncode, resumed.returncode), resumed.stderr
    assert [".again.work", "model", "tokens.jsonl", "whole"] == left
    assert 2 == other.returncode
    assert "recipe.seed was 0, is now 1" in other.stderr
    assert f"solved {SITES}" in whole.stderr
    assert f"solved {SITES - KILLED_AFTER}" in resumed.stderr
    assert contents(tmp_path / "whole") == contents(tmp_path / "again")
    assert ["again", "model", "tokens.jsonl", "whole"] == sorted(os.listdir(tmp_path))
