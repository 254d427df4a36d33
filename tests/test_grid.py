"""Sheets: where the pictures lie, and what cannot be laid out."""

import numpy as np
import pytest

from sdjax.images import grid

RED, BLUE = (np.full((8, 12, 3), color, np.uint8) for color in ((255, 0, 0), (0, 0, 255)))


def test_pictures_lie_in_rows_with_margins():
    page = grid.sheet([[RED, BLUE], [BLUE, None]])
    assert page.shape == (grid.EDGE + 2 * (8 + grid.EDGE), grid.EDGE + 2 * (12 + grid.EDGE), 3)
    top = slice(grid.EDGE, grid.EDGE + 8)
    np.testing.assert_array_equal(page[top, grid.EDGE : grid.EDGE + 12], RED)
    np.testing.assert_array_equal(page[top, 2 * grid.EDGE + 12 : 2 * grid.EDGE + 24], BLUE)
    assert (page[-grid.EDGE - 8 :, -grid.EDGE - 12 :] == 255).all()


def test_words_take_room_and_leave_ink():
    bare, labelled = grid.sheet([[RED]]), grid.sheet([[RED]], rows=["a row"], columns=["a rather long column"], scale=4)
    assert labelled.shape[0] > bare.shape[0] + 24 and labelled.shape[1] > bare.shape[1] + 36
    assert (labelled[: grid.SIZE * 2, :] < 100).any()


def test_pictures_of_two_sizes():
    with pytest.raises(ValueError, match="expected one size"):
        grid.sheet([[RED, BLUE[:4]]])
