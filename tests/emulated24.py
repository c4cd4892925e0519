"""torch's 2:4 CUTLASS kernels on the CPU: all of torch's own code around them runs, only the product is emulated."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)


@contextmanager
def kernels() -> Iterator[list[tuple[int, ...]]]:
    """While it is open, the two operators exist on the CPU; gives the shapes of the products they made."""
    calls: list[tuple[int, ...]] = []

    def product(values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        assert not any(size % 8 for size in x.shape), "the kernels take multiples of 8 only"
        calls.append(tuple(x.shape))
        return sparse_semi_structured_to_dense_cutlass(values, metadata) @ x

    def mm(values: Tensor, metadata: Tensor, x: Tensor, **_: Any) -> Tensor:
        return product(values, metadata, x)

    def addmm(bias: Tensor, values: Tensor, metadata: Tensor, x: Tensor, **_: Any) -> Tensor:
        return product(values, metadata, x) + bias[:, None]

    library = torch.library.Library("aten", "IMPL")
    library.impl("_sparse_semi_structured_mm", mm, "CPU")
    library.impl("_sparse_semi_structured_addmm", addmm, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def compressed(weight: Tensor) -> Tensor:
    """What `SparseSemiStructuredTensorCUTLASS.from_dense` does on a GPU."""
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its class a prototype
        return SparseSemiStructuredTensorCUTLASS(weight.shape, values, metadata, None, None, None)
