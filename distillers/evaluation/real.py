"""Real images to compare with: the bundled emoji, or a folder of one's own.

The folder is the one that training reads (``metadata.jsonl`` and images). The captions of its ``"split": "held_out"``
are the prompts. Its other images are the real set, its floor, and the data of the alignment regression.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distillers.emoji.data import captions, load_pictures, load_records
from distillers.evaluation import protocol as protocol_
from distillers.evaluation.metrics import GROUPS
from distillers.evaluation.protocol import CAPTIONS, COARSE, COARSE_SEEDS, SEEDS, Prompt, Protocol, pairs
from distillers.folder import HELD_OUT, BadData, Row, load_picture, read_folder

FEWEST_CAPTIONS = FEWEST_PICTURES = GROUPS
"""With fewer, the numerator and denominator of a ratio would have different groups."""
SHEET, FIT = 64, 8192


class RealPictures(ABC):
    """Real images by file name, as listed in a protocol."""

    @abstractmethod
    def load(self, names: Sequence[str]) -> Tensor:
        """The named images, ``(N, 3, H, W)`` uint8."""

    @abstractmethod
    def training(self) -> list[Prompt]:
        """Every training image, with its most specific caption."""


class EmojiPictures(RealPictures):
    """The bundled emoji."""

    def __init__(self) -> None:
        self.records = {record.file_name: record for record in load_records()}

    def load(self, names: Sequence[str]) -> Tensor:
        return load_pictures([self.records[name] for name in names])

    def training(self) -> list[Prompt]:
        return [Prompt(r.file_name, captions(r)[0]) for r in pairs(list(self.records.values()), "train")]


class FolderPictures(RealPictures):
    """A folder's images. Of an image with several captions, only the first is used."""

    def __init__(self, folder: Path, size: int) -> None:
        """
        Args:
            folder: with metadata.jsonl.
            size: height and width that images are resized to, as in training.

        Raises:
            BadData: a file is missing or malformed.
        """
        self.size = size
        self.metadata = folder / "metadata.jsonl"
        self.rows = {row.file_name: row for row in read_folder(folder)}
        for row in self.rows.values():
            row.check(folder)

    def load(self, names: Sequence[str]) -> Tensor:
        return torch.stack([load_picture(self.rows[name].path, self.size) for name in names])

    def training(self) -> list[Prompt]:
        return [Prompt(row.file_name, row.texts[0]) for row in self.rows.values() if not row.held_out]

    def protocol(self) -> Protocol:
        """A protocol up to the size of the bundled one, in an order that depends only on file names.

        Half of the training images, up to as many as are generated, are the real set, and equally many others the
        floor. Diversity is measured on the first of the captions, since a folder does not say which captions have many
        right answers.

        Raises:
            BadData: there are too few images or captions.
        """
        ordered = sorted(self.rows.values(), key=lambda row: hashlib.sha256(row.file_name.encode()).digest())
        asked: dict[str, Row] = {}
        for row in ordered:
            if row.held_out:
                asked.setdefault(row.texts[0], row)
        held_out = [Prompt(row.file_name, caption) for caption, row in asked.items()][:CAPTIONS]
        train = [row.file_name for row in ordered if not row.held_out]
        self._check_enough(len(held_out), len(train))
        half = min(len(train) // 2, CAPTIONS * len(SEEDS))
        drawn = tuple(prompt.caption for prompt in held_out)
        return Protocol(
            held_out=tuple(held_out),
            seeds=SEEDS,
            coarse=drawn[:COARSE],
            coarse_seeds=COARSE_SEEDS,
            reference=tuple(train[:half]),
            floor=tuple(train[half : 2 * half]),
            sheet=drawn[:SHEET],
            fit=FIT,
        )

    def _check_enough(self, captions: int, pictures: int) -> None:
        if captions < FEWEST_CAPTIONS:
            raise BadData(
                f"{self.metadata} has {captions} different captions of held-out images (of each, the first counts), and "
                f'evaluation needs at least {FEWEST_CAPTIONS}: mark {FEWEST_CAPTIONS - captions} more with "split": '
                f'"{HELD_OUT}" and train again, since a student has seen the images that were not marked'
            )
        if pictures < FEWEST_PICTURES:
            raise BadData(
                f"{self.metadata} has {pictures} images that are not held out, and evaluation needs at least "
                f"{FEWEST_PICTURES} to compare with: add {FEWEST_PICTURES - pictures} more"
            )


def yardstick(data: Path | None, size: int, quick: bool) -> tuple[Protocol, RealPictures]:
    """The protocol, and the real images to compare with.

    Args:
        data: a folder of one's own; None for the committed protocol and the bundled images.
        size: of the base's images.
        quick: whether a small part is enough.

    Raises:
        BadData: the folder's data are malformed or too few.
    """
    pictures: RealPictures
    if data is None:
        protocol, pictures = protocol_.load(), EmojiPictures()
    else:
        pictures = FolderPictures(data, size)
        protocol = pictures.protocol()
    return protocol.quick() if quick else protocol, pictures
