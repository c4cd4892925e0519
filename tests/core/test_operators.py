"""The allow-list: whatever a graph may hold computes from its arguments alone, and changes none of them."""

from __future__ import annotations

import pytest
import torch

from sparsec import operators
from sparsec.errors import GraphError

RANDOM = {  # switched off in eval mode
    "dropout.default", "feature_dropout.default", "scaled_dot_product_attention.default",
}  # fmt: skip
NAMES = [f"aten.{name}" for name in sorted(operators.ATEN)] + [f"sparsec.{name}" for name in sorted(operators.SPARSEC)]


def test_every_allowed_operator_exists_and_is_functional() -> None:
    for name in NAMES:
        found = operators.resolve(name)
        assert name == operators.name_of(found)
        assert not found._schema.is_mutable, name
        assert name.removeprefix("aten.") in RANDOM or torch.Tag.nondeterministic_seeded not in found.tags, name
        assert "empty" not in name, name  # memory that holds anything


@pytest.mark.parametrize("name", ["py.add", "py.max", "py.not", "py.float"])
def test_arithmetic_on_sizes_works_on_plain_numbers(name: str) -> None:
    found = operators.resolve(name)

    assert name == operators.name_of(found)
    assert {"py.add": 5, "py.max": 3, "py.not": False, "py.float": 2.0}[name] == (
        found(2, 3) if name in ("py.add", "py.max") else found(2 if name == "py.float" else True)
    )


@pytest.mark.parametrize("name", ["aten.relu_.default", "aten.rand.default", "aten.empty.memory_format", "os.system"])
def test_what_writes_draws_or_reaches_outside_is_refused(name: str) -> None:
    with pytest.raises(GraphError, match="allow-list"):
        operators.resolve(name)
