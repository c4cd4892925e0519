"""The snippets of README.md and docs/*.md, and what a reader has at hand when he runs them: models, data, names.

A block that cannot run stands behind `<!-- not run: REASON -->`. All others run in the order of their page, in one
folder and, those in Python, in one namespace. A tiny BERT stands for `demo:minilm` everywhere but in the tutorial.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import legacy_files
import lora_files
import onnx_files
import task_models
import torch
import trainer_models
from typer.testing import CliRunner

from sparsec.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REAL = "tutorial.md"  # the page whose demo:minilm is MiniLM
RUN, SHOWN = {"python", "pycon", "sh", "console"}, {"text", "toml", "yaml", "json"}
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```[{.]*(?P<kind>\w*)}?\n(?P<text>.*?)^```$", re.M | re.S
)
_INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.M)


@dataclass(frozen=True)
class Snippet:
    """One block of code of a page."""

    line: int
    kind: str
    text: str
    reason: str | None
    """Why it is not run, or None."""

    @property
    def runs(self) -> bool:
        return self.kind in RUN and self.reason is None

    def commands(self) -> str:
        """The shell's part of it: of a console only what follows the prompts."""
        if self.kind == "sh":
            return self.text
        return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith("$ "))


def snippets(page: Path) -> list[Snippet]:
    """All blocks of a page, files that they include put in."""
    text, found = page.read_text(), []
    for one in _FENCE.finditer(text):
        body = _INCLUDED.sub(lambda name: (ROOT / name[1]).read_text(), one["text"])
        found.append(Snippet(text.count("\n", 0, one.start("text")), one["kind"], body, one["reason"]))
    return found


def run(page: Path, folder: Path) -> None:
    """Run a page in `folder`, the working folder. AssertionError, or what a snippet raises, says where."""
    blocks = [one for one in snippets(page) if one.runs]
    code = "\n".join(one.text for one in blocks)
    for name, make in FILES.items():
        if re.search(rf"(?<![\w.]){re.escape(name)}\b", code) and f"-o {name}" not in code:
            make(folder / name)
    names = {"__name__": "__main__", **(NAMES[page.name]() if page.name in NAMES else {})}
    for one in blocks:
        if one.kind == "python":
            exec(compile("\n" * one.line + one.text, str(page), "exec"), names)
        elif one.kind == "pycon":
            _doctest(page, one, names)
        else:
            _shell(page, one, folder)


def _doctest(page: Path, one: Snippet, names: dict[str, Any]) -> None:
    parsed = doctest.DocTestParser().get_doctest(one.text, names, page.name, str(page), one.line)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(parsed, out=said.append, clear_globs=False)
    names.update(parsed.globs)
    assert not said, "".join(said)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        split = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        split.whitespace_split, words = True, []
        for word in [*split, ";"]:
            if not set(word) <= set("&;|"):
                words.append(word)
            elif words:
                yield words
                words = []


def _shell(page: Path, one: Snippet, folder: Path) -> None:
    """Commands run in this process, which has imported torch; on the page that is REAL as a shell runs them."""
    if page.name == REAL:
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        command = ["bash", "-euo", "pipefail", "-c", one.commands()]
        done = subprocess.run(command, env={**os.environ, "PATH": paths}, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{page}:{one.line}\n{done.stdout}\n{done.stderr}"
        return
    for program, *words in commands(one.commands()):
        if program != "sparsec":
            subprocess.run([{"python": sys.executable}.get(program, program), *words], check=True, timeout=300)
            continue
        words = ["MODEL" if word == "demo:minilm" else word for word in words]
        if "MODEL" in words and not (folder / "MODEL").exists():
            FILES["MODEL"](folder / "MODEL")
        # Alternatives on one page write to the same folder.
        result = CliRunner().invoke(app, [*words, *(["--force"] if words[0] == "compile" else [])])
        assert result.exit_code == 0, f"{page}:{one.line} {words}\n{result.output}\n{result.exception!r}"


def _bert(kind: str = "BertModel", **options: Any) -> Callable[[Path], Any]:
    """Large enough for its linear layers to count."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 128, **options}
    return lambda path: task_models.bert(path, kind, **sizes)


def _pairs(path: Path, count: int = 160) -> None:
    """Premises and hypotheses; half of these follow."""
    rows = ["premise\thypothesis\tlabel"]
    for i in range(count):
        word, other = task_models.FILLERS[i % 12], task_models.FILLERS[(i + 5) % 12]
        rows.append(f"the {word} was very good\tthe {word if i % 2 else other} was good\t{i % 2}")
    path.write_text("\n".join(rows) + "\n")


def _table(path: Path) -> None:
    task_models.sentences(str(path), 640 if path.stem == "train" else 40)  # three-stage-lora asks for 120 steps
    path.write_text(path.read_text().replace(",", "\t"))


def _artifact(path: Path) -> None:
    import sparsec

    folder = path.with_name("MODEL")
    if not folder.exists():
        FILES["MODEL"](folder)
    options = sparsec.Options(measure_speed=False)
    sparsec.compile(str(folder), pattern="16:2:8", passes="mask | freeze", out=path, options=options)


def _generator(path: Path) -> None:
    import sparsec

    options = sparsec.Options(measure_speed=False)
    sparsec.compile(
        _llama()["model"], {"input_ids": torch.ones(2, 8).long()}, pattern="64:2:8", out=path, options=options
    )


def _lora(path: Path) -> None:
    path.mkdir()
    lora_files.saved(path, lora_files.pair("bert.encoder.layer.0.attention.self.query", 128, 128))


FILES: dict[str, Callable[[Path], Any]] = {
    "MODEL": _bert(),
    "SPARSE": _bert("BertForSequenceClassification"),
    "DENSE": _bert("BertForSequenceClassification"),
    "TUNED": _bert("BertForSequenceClassification", hidden_size=16, intermediate_size=32),
    "PRETRAINED": _bert(hidden_size=16, intermediate_size=32),
    "train.tsv": _table,
    "dev.tsv": _table,
    "sentences.tsv": _table,
    **dict.fromkeys(("mnli.tsv", "hans.tsv", "hans_train.tsv", "hans_dev.tsv"), _pairs),
    "minilm.sparsec": _artifact,
    "generator.sparsec": _generator,
    "model.onnx": onnx_files.two_layers,
    "lora": _lora,
    **legacy_files.FILES,
}


def _llama() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=256, **sizes)).eval()
    ids = torch.arange(3, 11)[None]
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    example = {"input_ids": ids.expand(2, -1).contiguous()}
    return {"model": model, "hf_model": model, "prompt": prompt, "example_inputs": example, "inputs": example}


def _words() -> dict[str, Any]:
    ids = torch.arange(3, 9)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _classifier() -> dict[str, Any]:
    import sparsec

    rows, model = trainer_models.rows(8), trainer_models.model()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    inputs = {name: batch[name][:2] for name in trainer_models.INPUTS}
    tuned, pretrained = (sparsec.trace(trainer_models.model(), inputs) for _ in range(2))
    return {
        "model": model, "example_inputs": inputs, "ids": batch["input_ids"], "mask": batch["attention_mask"],
        "labels": batch["labels"], "tuned": tuned, "pretrained": pretrained, "rows": rows, "other_rows": rows,
    }  # fmt: skip


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": _llama,
    "training.md": _classifier,
    "cpu.md": lambda: _llama() | {"inputs": _words() | {"token_type_ids": torch.zeros(1, 6).long()}},
    "onnx.md": lambda: {"inputs": _words() | {"token_type_ids": torch.zeros(1, 6).long()}},
}
