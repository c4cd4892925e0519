"""The rule of "Beyond 2:4"."""

from __future__ import annotations

import pytest

from sparsec.choosing.diversity import diversity, most_diverse, smallest_m

FOUR_DIGITS = 5e-5  # the values are printed with four


@pytest.mark.parametrize(
    ("v", "m", "value"),
    [
        (64, 4, 0.4479),
        (64, 5, 0.3634),
        (128, 5, 0.3609),
        (16, 6, 0.3268),
        (32, 6, 0.3127),
        (64, 6, 0.3057),
        (64, 8, 0.2323),
    ],
)
def test_the_diversity_is_that_of_the_counted_masks(v: int, m: int, value: float) -> None:
    assert value == pytest.approx(diversity(v, m), abs=FOUR_DIGITS)


def test_masks_of_a_small_block_are_counted_right() -> None:
    import itertools
    import math

    v, m = 2, 5
    masks = set()
    for columns in itertools.combinations(range(m), 4):
        for rows in itertools.product(itertools.combinations(columns, 2), repeat=v):
            masks.add((columns, rows))  # the columns are stored: the same mask under other columns is another one

    assert math.log(len(masks)) / (v * m) == pytest.approx(diversity(v, m))


def test_the_printed_formula_ranks_differently() -> None:
    found = [(16, 10), (64, 8)]

    assert (64, 8) == most_diverse(found, "counted")
    assert (16, 10) == most_diverse(found, "printed")


@pytest.mark.parametrize("least", range(4, 66))
def test_the_smallest_m_that_fits_is_found(least: int) -> None:
    asked: list[int] = []

    def fits(m: int) -> bool:
        asked.append(m)
        return m >= least

    assert (least if least <= 64 else None) == smallest_m(fits)
    assert len(asked) <= 10
    assert max(asked) <= min(2 * max(least, 4), 64)  # what is much sparser is not measured for nothing
