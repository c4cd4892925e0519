"""Proofs about the torch24 part of an artifact, most of which need no GPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsec.backend import Check, CheckData, compare
from sparsec.backends.torch24.runtime import CudaModule, runs_sparse
from sparsec.layout import decompress
from sparsec.lowered import packed_calls
from sparsec.pattern import Pattern
from sparsec.semi_structured import TWO_OF_FOUR

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

_ROWS, _COLS = 32, 32  # torch's conversion routine takes multiples of these (it says 16 columns, and fails on 48)


def verify(module: GraphModule, manifest: dict[str, Any], check: CheckData) -> list[Check]:
    """Patterns and tables bit for bit, what torch's conversion makes of them, and the outputs run dense on the CPU.

    `module`: as it is stored, on packed tables.
    """
    declared = {site["name"]: site["pattern"] for site in manifest["sites"] if site["pattern"]}
    found = {call.site: call for call in packed_calls(module)}
    if different := sorted(declared.keys() ^ found.keys()):
        return [Check("torch24: sites", False, f"{different[0]} is sparse in the manifest or the graph, not in both")]
    patterns, conversions, converted = [], [], 0
    for name, call in found.items():
        pattern, weight = Pattern.parse(declared[name]), decompress(call.layout)
        if call.layout.pattern != pattern.executable:
            patterns.append(f"{name}: declared {pattern}, stored {call.layout.pattern}")
        broken = [(one, one.violations(weight).first) for one in (pattern, TWO_OF_FOUR)]
        patterns += [f"{name}: breaks {one}: {first[0]}" for one, first in broken if first]
        if runs_sparse(call, "cuSPARSELt"):  # what CUTLASS takes, it takes too
            converted += 1
            if fault := conversion_fault(weight[0]):
                conversions.append(f"{name}: {fault}")
    with torch.no_grad():
        inputs = [node.target for node in module.graph.nodes if node.op == "placeholder"]
        outputs = module(*(check.inputs[str(name)] for name in inputs))
    dense = compare("torch24: outputs, dense on the CPU", outputs, check.outputs, manifest["tolerance"])
    unproven = "" if torch.cuda.is_available() else "; no CUDA GPU here, so torch's 2:4 kernels were not run"
    return [
        _all("torch24: pattern", patterns, f"{len(found)} sites satisfy their pattern and 2:4, bit for bit"),
        _all(
            "torch24: metadata",
            conversions,
            f"torch's conversion keeps all bits of {converted} sites, its metadata 2 of every 4 columns",
        ),
        dataclasses.replace(dense, detail=dense.detail + unproven),
    ]


def verify_cuda(loaded: CudaModule, manifest: dict[str, Any], check: CheckData) -> Check:
    """The outputs of torch's 2:4 kernels on this machine's GPU."""
    outputs = {name: value.cpu() for name, value in loaded(**check.inputs).items()}
    return compare("torch24: outputs on the GPU", outputs, check.outputs, manifest["tolerance"])


def conversion_fault(weight: Tensor) -> str | None:
    """What torch's conversion for CUTLASS (its metadata is the hardware's) does wrong to a 2:4 weight, or None.

    weight: (rows, cols), fp16 or bf16. Rows and columns of zeros are added where the routine takes no such shape.
    """
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % _COLS, 0, -rows % _ROWS))
    values, metadata = sparse_semi_structured_from_dense_cutlass(padded)
    again = sparse_semi_structured_to_dense_cutlass(values, metadata)
    selected = sparse_semi_structured_to_dense_cutlass(torch.ones_like(values), metadata)
    if bool((selected.unflatten(1, (-1, 4)).sum(2) != 2).any()):
        return "torch's metadata does not select 2 of every 4 columns"
    if bool(((selected == 0) & (padded != 0)).any()):
        return "torch's metadata leaves out a weight that is kept"
    if not torch.equal(again.view(torch.int16), padded.view(torch.int16)):
        return "torch's conversion and back gives other bits"
    return None


def _all(name: str, faults: list[str], words: str) -> Check:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Check(name, not faults, f"{faults[0]}{more}" if faults else words)
