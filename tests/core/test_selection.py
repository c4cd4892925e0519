"""What `kept_only` leaves of a weight."""

import pytest
import torch

from sparsec.selection import kept_only


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
