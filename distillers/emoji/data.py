"""The bundled emoji images and their captions, as tensors."""

import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distillers.emoji.prepare import STYLES, Record

FOLDER = Path(__file__).resolve().parents[2] / "weights" / "bundled" / "emoji-data"


@lru_cache(maxsize=1)
def load_records(folder: Path = FOLDER) -> list[Record]:
    """The records of all images, in the archive's order."""
    with (folder / "metadata.jsonl").open() as lines:
        return [Record(**json.loads(line)) for line in lines]


def load_pictures(records: list[Record], folder: Path = FOLDER) -> Tensor:
    """The images as ``(N, 3, 64, 64)`` uint8; about 5 s and 127 MB for all of them."""
    pictures = np.empty((len(records), 64, 64, 3), np.uint8)
    with zipfile.ZipFile(folder / "pictures.zip") as archive:
        for index, record in enumerate(records):
            pictures[index] = np.asarray(Image.open(io.BytesIO(archive.read(record.file_name))))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_range(pictures: Tensor) -> Tensor:
    """Converts uint8 in [0, 255] to float32 in [-1, 1]."""
    return pictures.float().div_(127.5).sub_(1)


def sampling_weights(records: list[Record]) -> Tensor:
    """Sampling probability of each image, ``(N,)``, summing to 1.

    Each (emoji, style) pair has weight 1; if it has skin tones, they share a weight of 1.5. Flags have a quarter of
    that, since they are a fifth of the set and the easiest to generate; animals and food, the hardest, have one and a
    half times as much.
    """
    pairs: dict[tuple[str, str], int] = {}
    for record in records:
        pairs[record.concept, record.style] = pairs.get((record.concept, record.style), 0) + 1
    by_category = {"flags": 0.25, "animals & nature": 1.5, "food & drink": 1.5}
    weights = []
    for record in records:
        tones = pairs[record.concept, record.style]
        weight = by_category.get(record.category, 1.0) / tones * (1.0 if tones == 1 else 1.5)
        weights.append(weight)
    tensor = torch.tensor(weights, dtype=torch.float64)
    return tensor / tensor.sum()


CAPTION_ODDS = (0.35, 0.10, 0.20, 0.12, 0.06, 0.10)
"""Sampling probability of each of `captions`. The remainder is the probability that the teacher gets no caption."""


def captions(record: Record) -> list[str]:
    """An image's captions, from the most specific to the coarsest.

    The first names the very emoji in its style. The last three name only a sub-category or category, for which many
    images are right answers: these are where diversity can be lost, and measured.
    """
    style = STYLES[record.style]
    tone = f", {record.skin_tone}" if record.skin_tone else ""
    keyword = record.keywords[0]
    return [
        f"{record.name}{tone}, {style}",
        f"{keyword}{tone}",
        f"{keyword}{tone}, {style}",
        f"{record.subcategory}{tone}, {style}",
        f"{record.subcategory}{tone}",
        f"{record.category}, {style}",
    ]
