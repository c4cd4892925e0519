"""The proof that a permuted program computes what it did: both run in float64, where rounding cannot hide a mistake.

1. Parameters, buffers, inputs and the types that the graph names become float64; nothing else is changed.
2. Inputs: the program's examples, and the same with their values dealt anew, so that no special case stands alone.
3. Where outputs differ, the first operator is named whose values are not the same numbers in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.errors import VerificationError
from sparsec.pipeline import relative_difference

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program

AGREES = 1e-9  # relative: float64 has 1e-16, and no output sums more than some thousand terms in a row
_SAME_NUMBERS = 1e-7  # relative, of sums over a whole tensor: terms that cancel cost digits


def prove(before: Program, after: Program, seed: int = 0) -> float:
    """The largest relative difference of the outputs; raises VerificationError where it is above `AGREES`."""
    import torch

    worst = 0.0
    with torch.no_grad():
        wide = in_double(before)
        expected = [wide(**inputs) for inputs in _cases(wide.inputs, seed)]
        moved = in_double(after)
        for inputs, outputs in zip(_cases(moved.inputs, seed), expected, strict=True):
            found = moved(**inputs)
            for key, value in outputs.items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise VerificationError(f"output {key} is NaN or Inf on example inputs, so nothing can be proven")
                difference = relative_difference(found[key], value)
                worst = max(worst, difference)
                if difference > AGREES:
                    raise VerificationError(_changed(key, difference, _first(wide, moved, inputs)))
    return worst


def _changed(output: str, difference: float, operator: str) -> str:
    return (
        f"the permuted program changes output {output} by {difference:.1e}, at most {AGREES:.0e} is allowed; the first "
        f"operator that gives other numbers is {operator}; nothing was changed. This is a fault of sparsec's rules for "
        "that operator: tell its authors, and leave the permute pass out meanwhile"
    )


def in_double(program: Program) -> Program:
    """A copy that computes in float64 (rule 1)."""
    import torch
    from torch import nn

    program = program.clone()
    module = program.module
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            wide = value.detach().double()
            _fx.set_tensor(module, name, nn.Parameter(wide, False) if isinstance(value, nn.Parameter) else wide)
    for node in module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, _widened)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _widened)
    module.recompile()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in program.inputs.items()}
    return program.replace(inputs=inputs)


def _widened(value: Any) -> Any:
    import torch

    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _cases(inputs: dict[str, Tensor], seed: int) -> list[dict[str, Tensor]]:
    """Rule 2."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    dealt = {}
    for name, value in inputs.items():
        order = torch.randperm(value.numel(), generator=generator)
        dealt[name] = value.flatten()[order].view(value.shape)
    return [inputs, dealt]


def _first(before: Program, after: Program, inputs: dict[str, Tensor]) -> str:
    """Rule 3."""
    expected, found = (_fingerprints(program, inputs) for program in (before, after))
    for name, numbers in expected.items():
        for mine, theirs in zip(found.get(name, numbers), numbers, strict=False):
            if abs(mine - theirs) > _SAME_NUMBERS * max(1.0, abs(theirs)):
                return name
    return "not to be found"


def _fingerprints(program: Program, inputs: dict[str, Tensor]) -> dict[str, list[float]]:
    """By operator: figures of its values that no permutation changes."""
    import torch

    found: dict[str, list[float]] = {}

    class Reader(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, torch.Tensor) and result.is_floating_point():
                clean = torch.nan_to_num(result, 0.0, 0.0, 0.0)
                found[f"{n.name} ({n.target})"] = [
                    float(f) for f in (clean.sum(), clean.abs().sum(), clean.pow(4).sum())
                ]
            return result

    Reader(program.module).run(*(inputs[name] for name in program.inputs))
    return found
