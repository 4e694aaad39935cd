"""Boxes as text, between their frames, and as masks."""

import pytest
import torch
from spacetime_edit.core.boxes import box_at, mask_of_boxes, parse_boxes

TEXT = "0: 10, 20, 30, 40\n4: 18 20 30 40\n\n\n1, 2, 3.5, 4\n"


def test_lines_are_frames_and_empty_lines_separate():
    assert parse_boxes(TEXT) == [{0: (10, 20, 30, 40), 4: (18, 20, 30, 40)}, {0: (1, 2, 3.5, 4)}]
    assert parse_boxes("\n \n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 1, 2, 3", "line 1 is '0: 1, 2, 3'; expected frame: x, y, width, height"),
        ("0: 1,2,3,4\nfoo", "line 2 is 'foo'"),
        ("0: 1,2,0,4", "width and height must be above 0"),
        ("0: 1,2,3,4\n0: 1,2,3,4", "line 2 gives frame 0 again; put an empty line"),
    ],
)
def test_what_is_no_box_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_boxes(text)


def test_boxes_move_between_their_frames_and_rest_outside():
    keys = {2: (0.0, 0.0, 4.0, 4.0), 6: (8.0, 4.0, 4.0, 8.0)}
    assert [box_at(keys, f)[0] for f in range(9)] == [0, 0, 0, 2, 4, 6, 8, 8, 8]
    assert box_at(keys, 4) == (4.0, 2.0, 4.0, 6.0)


def test_a_mask_is_the_union_of_its_boxes():
    mask = mask_of_boxes([[(1, 0, 2, 1)], [(0, 0, 1, 2), (2, 1, 9, 9)], []], 3, 4)
    assert mask[0].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert mask[1].tolist() == [[1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]]
    assert mask[2].sum() == 0
    assert mask_of_boxes([[(0.6, 0.4, 1.0, 1.0)]], 2, 3)[0].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert torch.equal(mask_of_boxes([[(-5, -5, 99, 99)]], 2, 2), torch.ones(1, 2, 2))
