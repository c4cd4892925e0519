"""Pictures of weights: every pixel of a small one, and sizes that stay bounded."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from sparsec.pattern import Pattern
from sparsec.report import pictures
from sparsec.report.pictures import Picture, Sizes

BLUE, ORANGE = (47, 129, 224), (226, 138, 36)


def pixels(picture: Picture) -> Tensor:
    """(height, width, 4) uint8."""
    data = base64.b64decode(picture.png.removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    assert (picture.width, picture.height) == image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 4)


def test_a_close_up_shows_kept_weights_shared_columns_and_where_blocks_end() -> None:
    weight = torch.tensor(
        [[4.0, 2.0, 0, 0, 0, 0], [0, 2.0, 1.0, 0, 0, 3.0], [0, 0, 0, 1.0, 0, 0]]
    )  # two blocks of 2:2:3 rows
    *_, close = pictures.of(weight, Pattern.parse("2:2:5"), Sizes(100, 100))
    drawn = pixels(close)

    down, across = [0, 4, 12], [0, 4, 8, 12, 16, 22]  # 4 a weight, 4 more after a block, 2 more after a group of 5
    shown = drawn[down][:, across]
    assert torch.equal(weight != 0, (shown[..., :3] == torch.tensor(BLUE)).all(-1) & (shown[..., 3] > 0))
    shared = (shown[..., :3] == torch.tensor(ORANGE)).all(-1) & (shown[..., 3] > 0)
    assert [(0, 2), (0, 5), (1, 0)] == [tuple(place) for place in shared.nonzero().tolist()]
    assert int(shown[0, 0, 3]) == 255 > int(shown[0, 1, 3]) > int(shown[1, 2, 3]) > 0
    gap = drawn[8:12]
    assert 0 == int(gap[..., 3].max())
    assert "Rows 0 to 2, columns 0 to 5." in close.words


def test_maps_are_means_of_squares_from_the_lowest_to_the_highest() -> None:
    weight = torch.zeros(4, 4)
    weight[:2, :2], weight[2, 2] = 3.0, 1.0
    density, magnitude, _ = pictures.of(weight, Pattern.parse("2:4"), Sizes(4, 100))

    assert (2, 2) == (density.width, density.height) == (magnitude.width, magnitude.height)
    assert "0 to 100 %; a point is 2 x 2 weights" in density.words
    opacity = pixels(density)[..., 3].int()
    assert opacity[0, 0] == 255 > opacity[1, 1] > opacity[0, 1] == opacity[1, 0] > 0


@pytest.mark.parametrize("pattern", ["2:4", "64:2:8", "64:2:8@strip", "unstructured:0.5"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (700, 3), (400, 300)])
def test_any_shape_and_pattern_gives_three_small_pictures(pattern: str, shape: tuple[int, int]) -> None:
    parsed, weight = Pattern.parse(pattern), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = weight * parsed.choose(weight.abs())[1][0]

    found = pictures.of(weight, parsed, Sizes.shared(600_000, 250_000, 200))

    assert ["Mask density", "Magnitude", "Close up"] == [one.title for one in found]
    assert all(max(pixels(one).shape[:2]) <= 900 and len(one.png) < 9000 for one in found)


def test_a_weight_of_zeros_can_be_drawn() -> None:
    for one in pictures.of(torch.zeros(8, 8), Pattern.parse("2:4"), Sizes(16, 16)):
        assert pixels(one).numel() > 0
