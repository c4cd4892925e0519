"""Values of many batches in few blocks: they stay what they are, and what they leave is used again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.oneshot import shelf
from sparsec.oneshot.shelf import Shelf

LARGE = shelf._SMALL // 4  # float32 elements that are moved


def value(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_batches_lie_side_by_side_in_one_block() -> None:
    given = Shelf([3, 3, 3])
    kept = [given.keep(i, {"x": value(i, 2, LARGE)})["x"] for i in range(3)]

    assert all(torch.equal(value(i, 2, LARGE), one) for i, one in enumerate(kept))
    assert 1 == len({one.untyped_storage().data_ptr() for one in kept})
    assert [0, 8 * LARGE, 16 * LARGE] == [one.data_ptr() - kept[0].data_ptr() for one in kept]


def test_new_values_take_the_place_of_those_of_the_same_batch() -> None:
    given = Shelf([1])
    first = given.keep(0, {"x": value(0, LARGE), "y": value(1, LARGE)})
    places = {one.data_ptr() for one in first.values()}
    second = given.keep(0, {"z": value(2, LARGE), "y": first["y"]})

    assert second["y"] is first["y"]
    assert torch.equal(value(1, LARGE), second["y"])
    assert torch.equal(value(2, LARGE), second["z"])
    assert places == {one.data_ptr() for one in second.values()}


PARTS: dict[str, Callable[[Tensor], object]] = {
    "a part": lambda x: x[:, 1:3],
    "a small part": lambda x: x[0, :2],
    "a view": lambda x: x.t(),
    "in a tuple": lambda x: (x.split(2, dim=1), None),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_a_place_of_which_a_part_is_still_read_is_not_written_over(part: Callable[[Tensor], object]) -> None:
    given, x = Shelf([1]), value(0, LARGE // 4, 4)
    expected = part(x)
    held = part(given.keep(0, {"x": x})["x"])
    found = given.keep(0, {"part": held, "new": value(1, LARGE // 4, 4)})

    torch.testing.assert_close(found["part"], expected, rtol=0, atol=0)
    assert torch.equal(value(1, LARGE // 4, 4), found["new"])


@given(st.permutations(range(4)), st.lists(st.booleans(), min_size=4, max_size=4), st.sampled_from(["f4", "f8", "i1"]))
def test_any_order_of_dimensions_repeated_ones_too_is_kept(order: list[int], repeated: list[bool], kind: str) -> None:
    dtype = {"f4": torch.float32, "f8": torch.float64, "i1": torch.int8}[kind]
    whole = (value(0, *(1 if one else 13 for one in repeated)) * 100).to(dtype).permute(order)
    x = whole.expand(*(13 if size == 1 else size for size in whole.shape))
    found = Shelf([1, 1]).keep(1, {"x": x})["x"]

    assert torch.equal(x, found)
    assert x.stride() == found.stride()
    assert (whole.nbytes >= shelf._SMALL) == (found is not x)


def test_what_is_small_or_has_gaps_stays_where_it_is() -> None:
    gaps, small = value(0, LARGE, 4)[:, :3], value(1, 5)
    found = Shelf([1]).keep(0, {"gaps": gaps, "small": small, "none": None, "number": 3})

    assert found["gaps"] is gaps and found["small"] is small
    assert found["none"] is None
    assert 3 == found["number"]


def test_two_views_of_one_memory_share_a_place() -> None:
    x = value(0, 2, LARGE)
    found = Shelf([1]).keep(0, {"x": x, "turned": x.t()})

    assert torch.equal(x.t(), found["turned"])
    assert found["x"].data_ptr() == found["turned"].data_ptr() != x.data_ptr()


def test_a_block_goes_with_the_last_value_in_it() -> None:
    given = Shelf([2, 2])
    wide = [given.keep(i, {"x": value(i, 3, LARGE)}) for i in range(2)]
    block = weakref.ref(given._slots[0][0]._base)
    del wide
    given.begin()
    given.keep(0, {})
    gc.collect()
    assert block() is not None  # the other batch's
    given.keep(1, {})
    gc.collect()

    assert block() is None


def test_batches_of_other_sizes_have_other_blocks() -> None:
    given = Shelf([2, 1, 2])
    found = [given.keep(i, {"x": value(i, size, LARGE)})["x"] for i, size in enumerate((2, 5, 2))]

    assert [16 * LARGE, 20 * LARGE, 16 * LARGE] == [one.untyped_storage().nbytes() for one in found]
    assert all(torch.equal(value(i, size, LARGE), found[i]) for i, size in enumerate((2, 5, 2)))
