"""What `kept_only` leaves of a weight, and how rows move to their strips and back."""

import pytest
import torch

from sparsec.selection import as_stored, in_place, kept_only


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_only_is_where_for_every_float_type_and_any_memory_order(dtype):
    mask = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype).mT

    found = kept_only(weight, mask)

    assert torch.equal(found, torch.where(mask, weight, 0.0))
    assert found.dtype == dtype


def test_kept_only_drops_nan_and_the_sign_of_zero_only_where_nothing_is_kept():
    weight = torch.tensor([float("nan"), float("inf"), -1.0, -0.0, float("nan"), -0.0])
    mask = torch.tensor([False, False, False, False, True, True])

    found = kept_only(weight, mask)

    assert found[:4].tolist() == [0.0] * 4 and not torch.signbit(found[:4]).any()
    assert found[4].isnan() and torch.signbit(found[5])


def test_rows_move_to_where_the_table_names_them_and_back():
    weight = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    rows = torch.tensor([[2, 0, 1], [0, 2, 1]], dtype=torch.int32)

    moved = as_stored(weight, rows)

    assert [3, 1, 2, 4, 6, 5] == moved.flatten().tolist()
    assert torch.equal(weight, in_place(moved, rows))
    assert as_stored(weight, None) is weight and in_place(weight, None) is weight
