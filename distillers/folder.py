"""A folder of images with captions: ``metadata.jsonl``, one image per line, and the files that it names."""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

HELD_OUT = "held_out"
SPLITS = ("train", HELD_OUT)
WANTED = '{"file_name": ..., "text": a caption or a list of them}, optionally "group" and "split"'


class BadData(ValueError):
    """The data is unusable; the message says what is wrong with which file."""


@dataclass(frozen=True)
class Row:
    """One line of ``metadata.jsonl``."""

    file_name: str
    path: Path
    texts: list[str]
    """The captions, at least one."""
    group: str | None
    held_out: bool
    """Whether the image is excluded from training."""
    place: str
    """File and line, for error messages."""

    def check(self, folder: Path) -> None:
        """Checks that the image exists inside the folder.

        Raises:
            BadData: it does not.
        """
        # Compared by name, without resolving links: data sets often consist of links to files elsewhere.
        if not Path(os.path.abspath(self.path)).is_relative_to(os.path.abspath(folder)) or not self.path.is_file():
            raise BadData(f"{self.place}: there is no image {self.file_name!r} inside {folder}")


def read_folder(folder: Path) -> list[Row]:
    """Reads ``metadata.jsonl``, one row per image; blank lines are ignored.

    Raises:
        BadData: there is no such file, or a line is malformed.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise BadData(f"data source {str(folder)!r} is neither 'emoji' nor a folder with a metadata.jsonl")
    try:
        text = metadata.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"{metadata} is not UTF-8 ({error}): save it as UTF-8") from error
    # Not splitlines, since JSON allows unescaped line separators in a caption.
    lines = enumerate(text.split("\n"), 1)
    rows = [_row(folder, line, f"{metadata}:{number}") for number, line in lines if line.strip()]
    splits: dict[str, bool] = {}
    for row in rows:
        if splits.setdefault(row.file_name, row.held_out) != row.held_out:
            raise BadData(f"{row.place}: {row.file_name!r} is both trained on and held out: choose one")
    return rows


def _row(folder: Path, line: str, place: str) -> Row:
    try:
        record = json.loads(line)
        name, text = str(record["file_name"]), record["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(f"{place}: give {WANTED}, got {line[:80]!r}") from error
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise BadData(f"{place}: text {text!r} must be a caption or a list of them")
    if not texts:
        raise BadData(f"{place}: {name} has no text")
    group, split = record.get("group"), record.get("split") or SPLITS[0]
    if group is not None and not isinstance(group, str):
        raise BadData(f"{place}: group {group!r} must be a string")
    if split not in SPLITS:  # treating a "test" split as training data would make it worthless
        raise BadData(f"{place}: split {split!r} must be {' or '.join(map(repr, SPLITS))}")
    return Row(name, folder / name, texts, group, split == HELD_OUT, place)


def load_picture(path: Path, size: int) -> Tensor:
    """The central square resized to ``(3, size, size)`` uint8, rotated upright, on white where it is transparent.

    Raises:
        BadData: the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            picture = _on_white(_upright(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadData(f"{path} is not a readable image ({error})") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; images whose orientation cannot be read are returned unchanged."""
    try:
        return ImageOps.exif_transpose(image)
    except (struct.error, ValueError, SyntaxError, KeyError, TypeError):
        return image


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":  # Pillow would clip it at 0 and 255, which makes 0 to 1 black
        raise ValueError("its pixels are floating-point numbers of an unknown range: save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        high = (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
