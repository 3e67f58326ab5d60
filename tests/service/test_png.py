"""Our PNG writer against Pillow's reader."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from service.png import encode_png

SIZES = st.integers(1, 70)


def read(file: bytes) -> PngImageFile:
    image = Image.open(io.BytesIO(file))
    assert isinstance(image, PngImageFile)
    image.load()  # which checks every chunk's checksum
    return image


@given(width=SIZES, height=SIZES, seed=st.integers(0, 2**32 - 1), flat=st.booleans())
def test_every_pixel_comes_back(width: int, height: int, seed: int, flat: bool) -> None:
    random = np.random.default_rng(seed)
    pixels = np.repeat(
        random.integers(0, 256, (height, 1 if flat else width, 3), np.uint8), width if flat else 1, axis=1
    )
    image = read(encode_png(Image.fromarray(pixels)))
    assert (image.mode, image.size, image.info) == ("RGB", (width, height), {})
    assert np.array_equal(np.asarray(image), pixels)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_comes_back(text: str) -> None:
    assert read(encode_png(Image.new("RGB", (3, 2)), "fewstep", text)).info == {"fewstep": text}


def test_a_picture_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="the image is RGBA: convert it to RGB"):
        encode_png(Image.new("RGBA", (4, 4)))


def test_what_is_flat_becomes_small() -> None:
    assert len(encode_png(Image.new("RGB", (512, 512), (7, 40, 200)))) < 5000
