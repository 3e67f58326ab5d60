"""Contact sheets: every picture lands in its cell, every label below it."""

import numpy as np
import pytest
import torch

from distillers.evaluation import sheets


def flat(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()


def test_pictures_lie_in_their_cells() -> None:
    image = sheets.sheet(flat(10, 20, 30), ["a", "b", "c"], 2, cell=32, lines=1)
    pixels, step_x, step_y = np.asarray(image), 32 + sheets.GAP, 32 + 15 + sheets.GAP
    centre = sheets.GAP + 16
    assert [pixels[centre, centre, 0], pixels[centre, centre + step_x, 0], pixels[centre + step_y, centre, 0]] == [
        10,
        20,
        30,
    ]
    assert image.size == (sheets.GAP + 2 * step_x, sheets.GAP + 2 * step_y)


def test_labels_are_written_below_their_picture_and_stay_inside_its_column() -> None:
    long = "a very long caption that cannot fit, not in two lines and not in three either, noto emoji"
    blank = np.asarray(sheets.sheet(flat(255, 255), ["", ""], 2, cell=64))
    labelled = np.asarray(sheets.sheet(flat(255, 255), [long, ""], 2, cell=64))
    changed = np.argwhere((blank != labelled).any(axis=2))
    assert len(changed) > 50
    assert changed[:, 0].min() >= sheets.GAP + 64
    assert changed[:, 1].max() < 2 * sheets.GAP + 64


def test_a_title_and_images_of_any_kind() -> None:
    images = [*sheets.to_images(flat(1)), sheets.to_images(flat(2))[0].resize((40, 20)).convert("RGBA")]
    image = sheets.sheet(images, ["one", "two"], 1, cell=16, title="Title <b>", lines=0)
    assert image.size == (16 + 2 * sheets.GAP, 34 + sheets.GAP + 2 * (16 + sheets.GAP))


def test_a_table_names_rows_and_columns() -> None:
    image = sheets.table([flat(10, 20), flat(30, 40)], ["red apple", "dog"], ["1 step", "4 steps"], cell=32)
    pixels = np.asarray(image)
    found = {int(pixels[y, x, 0]) for y in (52 + 16, 52 + 40 + 16) for x in (150 + 16, 150 + 40 + 16)}
    assert found == {10, 20, 30, 40}


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        sheets.sheet(flat(1, 2), ["a"], 2)
    with pytest.raises(ValueError, match="at least 1 column"):
        sheets.sheet(flat(1), ["a"], 0)
    with pytest.raises(ValueError, match="uint8"):
        sheets.to_images(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="give 2 rows of 1"):
        sheets.table([flat(1)], ["a", "b"], ["c"])
