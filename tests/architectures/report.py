"""docs/architectures.md and the table of expected site counts, from the rows that the tests of a run leave behind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS, EXPECTED = ROOT / "docs" / "architectures.md", Path(__file__).with_name("expected.json")
Rows = dict[str, dict[str, Any]]

INTRODUCTION = """# Architectures

Written by `tests/architectures` when it runs over all of them (`make test-all`). The models are tiny and random: hidden
size 32, two layers, of the classes of transformers {version}; torch {torch}. For each architecture of the table:

- the model is traced as it is, with the sizes named in *varies*, and the graph equals the model's eval output bit for
  bit, twice in a row, at two sizes; in train mode backward reaches every parameter that the model's own reaches, and in
  eval mode the gradients are the model's;
- every matrix is a site (something that may be sparse) or listed with its reason (*dense*);
- after `mask | freeze`, with 2:4 and with 16:2:8, outputs equal those of the model with the same weights written in;
- after `lower`, saved and loaded by a process without transformers, outputs differ by what the columns of the
  patterns say, relative to the largest. Those with a figure for bf16 were cast to bfloat16 before they were traced;
- written as model.onnx with 16:2:8, packed and dense, and run by onnxruntime {onnxruntime} at two sizes, outputs differ
  by what the two columns say;
- permuted in graph mode for 2:4 and for 16:2:8 (`permute{{rounds=1}}`), it gives the same outputs in float64 to 1e-9;
  *variables* counts the orders that may be chosen: free, inside each head (within), of whole heads or groups (order);
  *kept more* is what the patterns gain by it, as a share of the magnitude they keep, on random weights.

Exactness is against the model without a key-value cache: a cache is a copy of the keys, and some models then sum in
another order. Caches and other outputs that are no tensors are not part of a graph.
"""


def load(folder: Path) -> Rows:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def write_expected(rows: Rows) -> None:
    """Renew the checked-in counts; what other tests keep there stays."""
    known = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for name, row in rows.items():
        known[name] = {**known.get(name, {}), "sites": row["sites"], "dense": row["dense"]}
    lines = [f"  {json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def tracing_ratio(rows: Rows) -> float:
    """Processor seconds of `trace` over those of torch.export alone, summed over the architectures."""
    total = Counter[str]()
    for row in rows.values():
        total.update(row["seconds"])
    return total["trace"] / total["bare"]


def write_docs(rows: Rows, refused: dict[str, str]) -> None:
    import onnxruntime
    import torch
    import transformers

    versions = {"version": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    lines = [INTRODUCTION.format(**versions, onnxruntime=onnxruntime.__version__)]
    lines.append(f"Tracing took {tracing_ratio(rows):.1f} times as long as torch.export alone, over all of them.\n")
    lines.append(
        "| architecture | class | parameters | sites | dense, by role | varies | set to 0 | 2:4 | 16:2:8 | bf16 "
        "| ONNX packed | ONNX dense | variables | kept more, 2:4 | kept more, 16:2:8 |"
    )
    lines.append("|---" * 15 + "|")
    expected = json.loads(EXPECTED.read_text())
    for name, row in rows.items():
        cells = [
            name, f"`{row['class']}`", f"{row['parameters']:,}", _counts(row["sites"]), _counts(row["dense"]),
            ", ".join(row["sizes"]) or "nothing", ", ".join(sorted({s.split('.')[-1] for s in row["set_to_zero"]})),
            *(_error(row[column]) if column in row else "" for column in ("2:4", "16:2:8", "bf16")),
            *(_error(row["onnx"][weights]) for weights in ("packed", "dense")),
            *_permutation(expected[name]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("\n## Refused\n")
    lines += [f"- {name}: {reason}" for name, reason in refused.items()]
    used = Counter(operator for row in rows.values() for operator in row["operators"])
    lines.append(
        f"\n## Operators\n\nThe {len(used)} operators these graphs hold, each with the number of architectures.\n"
    )
    lines.append(", ".join(f"`{operator}` {count}" for operator, count in sorted(used.items())))
    text = "\n".join(lines) + "\n"
    if not DOCS.exists() or DOCS.read_text() != text:
        DOCS.write_text(text)


def _permutation(known: dict[str, Any]) -> list[str]:
    """Cells that the tests of axes and of permutations have left in the checked-in table."""
    gains = known.get("kept more", {})
    return [known.get("variables", ""), *(f"{gains[text]:.1%}" if text in gains else "" for text in ("2:4", "16:2:8"))]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "0"
