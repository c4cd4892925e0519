"""What `sparsec explain` predicts against what is then measured: python tests/bench/bench_explain.py [--json]

Three models x three patterns x three token counts, one thread: MiniLM, and a GPT-2 and a Llama of random weights. The
prediction knows the dense graph and the cost table of this machine; the measurement runs the loaded artifacts and the
dense graph interleaved, in thread CPU time. Ratios are whole model, dense over sparse. Exit status 1 when the mean or
the worst error of the predicted ratio is beyond its bound.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparsec import benchmark, machine, registry
from sparsec.description import rows_per_item
from sparsec.explain import explain
from sparsec.models import load_model
from sparsec.pipeline import PassManager
from sparsec.program import Program

PATTERNS = ("2:4", "64:2:5", "64:2:8")
TOKENS = (1, 32, 512)
MEAN, WORST = 0.15, 0.35
SECONDS, PASSES = 3.0, 2  # for one model at one token count; how often, for neighbours on the memory bus come and go


def models(folder: Path) -> dict[str, str]:
    """Name -> MODEL; the random ones are written to `folder`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    gpt2 = transformers.GPT2Config(n_layer=6, n_embd=768, n_head=12, vocab_size=8000, bos_token_id=0, eos_token_id=0)
    llama = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_hidden_layers=6, num_attention_heads=16, vocab_size=8000
    )
    transformers.GPT2Model(gpt2).save_pretrained(folder / "gpt2")
    transformers.LlamaModel(llama).save_pretrained(folder / "llama")
    return {"MiniLM": "demo:minilm", "GPT-2, 6 x 768": str(folder / "gpt2"), "Llama, 6 x 1024": str(folder / "llama")}


def sparse(program: Program, pattern: str, folder: Path) -> Any:
    """The program with a pattern, as an artifact's kernels run it."""
    targets = program.sites.with_targets({"*": pattern})
    frozen = PassManager.parse("mask{columns=l1} | freeze").run(program.replace(sites=targets))
    kernel = registry.backend("kernel")
    folder.mkdir(parents=True)
    kernel.emit(frozen, folder)
    return kernel.load(folder, {})


def compared(name: str, program: Program, folder: Path) -> list[dict[str, Any]]:
    """Predicted and measured ratios of one model."""
    predicted = explain(program, registry.backend("kernel"), {p: {"*": p} for p in PATTERNS}, TOKENS)
    runs = {"dense": program} | {p: sparse(program, p, folder / p.replace(":", "-")) for p in PATTERNS}
    graph = program.module.graph
    types = [{"name": n.target, "type": n.meta["type"]} for n in graph.nodes if n.op == "placeholder"]
    shapes = {"inputs": types, "dims": program.dims, "rows_per_item": rows_per_item(program)}
    best: dict[tuple[int, str], float] = {}
    with torch.inference_mode():
        for case in PASSES * benchmark.cases_of_tokens(program.inputs, shapes, TOKENS):
            for run, seconds in benchmark.measure(runs, case, SECONDS)["seconds"].items():
                best[case.tokens, run] = min(seconds, best.get((case.tokens, run), seconds))
    return [
        {
            "model": name,
            "tokens": row["tokens"],
            "pattern": row["variant"],
            "predicted": row["speed"],
            "measured": best[row["tokens"], "dense"] / best[row["tokens"], row["variant"]],
        }
        for row in predicted["whole"]
    ]


def main() -> int:
    """Compare, print, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, model) in enumerate(models(Path(scratch)).items()):
            rows += compared(name, load_model(model).program, Path(scratch) / f"artifacts-{i}")
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    mean, worst = sum(errors) / len(errors), max(errors)
    ok = mean <= MEAN and worst <= WORST
    if as_json:
        print(
            json.dumps({"machine": machine.facts(), "rows": rows, "mean_error": mean, "worst_error": worst, "ok": ok})
        )
        return not ok
    print(machine.line(machine.facts(), [1]) + "\n")
    print("| model | tokens | " + " | ".join(f"{p}: predicted / measured" for p in PATTERNS) + " |")
    print("|---" * (2 + len(PATTERNS)) + "|")
    for name, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in rows):
        cells = [r for r in rows if (r["model"], r["tokens"]) == (name, tokens)]
        text = " | ".join(
            f"{r['predicted']:.2f} / {r['measured']:.2f} ({100 * (r['predicted'] / r['measured'] - 1):+.0f} %)"
            for r in cells
        )
        print(f"| {name} | {tokens} | {text} |")
    print(
        f"\nmean error {100 * mean:.1f} % (bound {100 * MEAN:.0f}), worst {100 * worst:.1f} % (bound {100 * WORST:.0f})"
    )
    return not ok


if __name__ == "__main__":
    raise SystemExit(main())
