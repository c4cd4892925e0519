"""The error and the pattern of pruned weights, whoever pruned them: one code for all, apart from sparsec's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.loading import load_model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """Relative error of the last hidden state on held-out tokens, and what is found in the layers."""

    error: float
    layers: int
    """Linear layers that were to be pruned."""
    violated: int
    """Those that break the pattern."""
    violations: int
    """Groups, and blocks of rows, that break it in all layers."""
    zeros: float
    """Share of zeros in these layers."""


def evaluate(folder: Path, weights: Path, held_out: Path, pattern: str) -> Evaluation:
    """Compare the model of `folder` with the same model under other weights (a safetensors file)."""
    from safetensors.torch import load_file

    found = load_file(weights)
    columns = {name.removesuffix(":columns"): found.pop(name) for name in list(found) if name.endswith(":columns")}
    model = load_model(str(folder))
    strange = set(found) ^ set(dict(model.named_parameters()))
    if strange:
        raise ValueError(f"{weights}: other parameters than the model's: {', '.join(sorted(strange)[:3])}")
    model.load_state_dict(found, strict=False)
    layers = {name: found[name] for name in _pruned_names(model)}
    counts = [violations(weight, pattern, columns.get(name)) for name, weight in layers.items()]
    return Evaluation(
        error=_difference(_last_hidden(model, held_out), _dense(folder, held_out)),
        layers=len(layers),
        violated=sum(count > 0 for count in counts),
        violations=sum(counts),
        zeros=sum(int((w == 0).sum()) for w in layers.values()) / sum(w.numel() for w in layers.values()),
    )


def _pruned_names(model: Any) -> list[str]:
    """The linear layers without head and pooler, which no tool is asked to prune."""
    from torch import nn

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name in linear if "lm_head" not in name and "pooler" not in name]


def _last_hidden(model: Any, held_out: Path) -> Tensor:
    import torch

    ids = torch.tensor(json.loads(held_out.read_text()))
    with torch.no_grad():
        result: Tensor = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return result.double()


@cache
def _dense(folder: Path, held_out: Path) -> Tensor:
    return _last_hidden(load_model(str(folder)), held_out)


def _difference(y: Tensor, y0: Tensor) -> float:
    return float((y - y0).norm() / y0.norm())


def violations(weight: Tensor, pattern: str, columns: Tensor | None = None) -> int:
    """How often a weight (rows, cols) breaks N:M, V:N:M or V:N:M@strip; the last needs its table of columns."""
    text, _, strip = pattern.partition("@")
    *v, n, m = map(int, text.split(":"))
    nonzero = weight != 0
    if strip:
        if columns is None:
            raise ValueError(f"{pattern}: no table of columns is stored, so nothing can be proven")
        if columns.shape[2] != -(-weight.shape[1] // m):
            raise ValueError(f"{pattern}: a table of {columns.shape[2]} groups for {weight.shape[1]} columns")
        return _strip_violations(nonzero, v[0], n, columns[0].long())
    groups = _padded(nonzero, 1, m).unflatten(1, (-1, m))
    count = int((groups.sum(2) > n).sum())
    if v:
        blocks = _padded(groups, 0, v[0]).unflatten(0, (-1, v[0])).any(1)
        count += int((blocks.sum(2) > 4).sum())
    return count


def _strip_violations(nonzero: Tensor, v: int, n: int, columns: Tensor) -> int:
    """columns: (strips, groups, 4). Nonzeros in no group or in crowded ones, and columns that two groups hold."""
    import torch

    strips = _padded(nonzero, 0, v).unflatten(0, (-1, v))
    if len(strips) != len(columns):
        raise ValueError(f"{len(strips)} strips of rows, and a table of {len(columns)}")
    member = torch.zeros(len(columns), columns.shape[1], nonzero.shape[1])
    member.scatter_(2, columns, 1.0)  # a padding slot repeats a column of its own group
    held = member.sum(1)
    outside = (strips & (held == 0)[:, None]).sum()
    crowded = (torch.einsum("svc,sgc->svg", strips.float(), member) > n).sum()
    return int(outside + crowded + (held > 1).sum())


def _padded(x: Tensor, axis: int, multiple: int) -> Tensor:
    import torch

    missing = -x.shape[axis] % multiple
    shape = [missing if i == axis else size for i, size in enumerate(x.shape)]
    return torch.cat([x, x.new_zeros(shape)], axis)
