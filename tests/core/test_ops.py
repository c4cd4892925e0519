"""Every operator of sparsec's own keeps torch's contract: schema, fake tensors, autograd, dynamic sizes."""

from __future__ import annotations

import pytest
import torch
from models import random

from sparsec.layout import Values, compress, stored_as
from sparsec.ops import expert_linear, nm_linear, nm_weight
from sparsec.pattern import Pattern, Strip

PATTERNS = ["2:4", "3:2:5", "3:2:5@strip", "unstructured:0.7"]
CASES = [(pattern, values) for pattern in PATTERNS for values in ("fp32", "bf16", "int8")]


@pytest.mark.parametrize(("pattern", "values"), CASES)
def test_linear_and_weight_of_packed_tables(pattern: str, values: Values) -> None:
    weight, parsed = random(1, 6, 10), Pattern.parse(pattern)
    layout = stored_as(compress(weight, parsed, parsed.project(weight.abs(), "l1")), values)
    tables = (layout.values, layout.positions, layout.columns)

    torch.library.opcheck(nm_linear, (random(2, 3, 10), *tables, random(6), pattern, 10, layout.scales))
    torch.library.opcheck(nm_weight, (*tables, pattern, 10, [0, 2, 1], [1, 10, 6], layout.scales, torch.float32))


def test_linear_and_weight_of_strips_whose_rows_moved() -> None:
    weight, pattern, rows = random(1, 6, 10), Strip(3, 2, 5), torch.tensor([[4, 0, 3, 1, 5, 2]])
    selection = pattern.select(weight.abs(), pattern.project(weight.abs()).columns, rows)
    layout, x = compress(weight, pattern, selection), random(2, 3, 10)
    tables, dense = (
        (layout.values, layout.positions, layout.columns),
        torch.where(pattern.mask(selection, 10), weight, 0.0),
    )
    linear_args = (x, *tables, None, "3:2:5@strip", 10, None, layout.rows)
    weight_args = (*tables, "3:2:5@strip", 10, [0, 2, 1], [1, 10, 6], None, None, layout.rows)

    assert torch.equal(x @ dense[0].T, nm_linear(*linear_args))
    assert torch.equal(dense.mT, nm_weight(*weight_args))
    torch.library.opcheck(nm_linear, linear_args)
    torch.library.opcheck(nm_weight, weight_args)


@pytest.mark.parametrize("grad", [False, True])
def test_expert_linear(grad: bool) -> None:
    x, weight = random(7, 4).requires_grad_(grad), random(3, 4, 5).requires_grad_(grad)

    torch.library.opcheck(expert_linear, (x, torch.tensor([2, 2, 7]), weight))
