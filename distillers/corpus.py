"""Where training data comes from: the bundled emoji, a folder of pictures with captions, a file of prompts."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from weights.contracts import DataSpec

SHEET = 8
"""Prompts on a sample sheet."""


class BadData(ValueError):
    """The data cannot be trained on; the message says what is wrong with which file."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The training split of a data source. Captions are unique; pictures refer to them by number."""

    captions: list[str]
    rows: list[list[int]]
    """Each picture's captions, one drawn at a time."""
    weights: Tensor
    """How often each picture is drawn, ``(N,)`` float64, summing to 1."""
    odds: list[list[float]] | None
    """How often each of a picture's captions is drawn, in proportion; equally often when left out."""
    pictures: Callable[[list[int]], Tensor] | None
    """Those pictures, ``(B, 3, H, W)`` uint8; None where there are prompts alone."""
    prompts: list[int] | None
    """Captions to draw the student's conditions from, where they are not the pictures' own."""
    sheet: list[str]
    """Prompts of the sample sheets."""
    identity: str
    """Says which pictures these are: part of the latents' cache key."""
    drawn: list[int] | None = None
    """Of the prompts, the captions that batches draw; all when left out."""
    groups: list[str | None] | None = None
    """Each picture's group, where the data has such."""
    held_out: list[tuple[str, str | None]] = field(default_factory=list)
    """Captions of the held-out split that training never sees, each with its picture's group."""


def load_corpus(spec: DataSpec, size: int) -> Corpus:
    """The corpus of a data source.

    Args:
        spec: the job's.
        size: height and width that the pictures are brought to.

    Raises:
        BadData: a file is missing or malformed.
    """
    corpus = _emoji() if spec.source == "emoji" else _folder(Path(spec.source), size)
    if spec.prompts is None:
        return corpus
    if spec.recombines:
        from distillers.emoji.data import load_records
        from distillers.emoji.recombined import recombined_prompts

        lines, sheet = recombined_prompts(load_records()), corpus.sheet
    else:
        lines = _prompt_lines(Path(spec.prompts))
        sheet = lines[:SHEET]
    captions, prompts = _numbered([corpus.captions, lines])
    return replace(corpus, captions=captions, prompts=prompts[1], sheet=sheet)


def _emoji() -> Corpus:
    from distillers.emoji.data import CAPTION_ODDS, load_pictures, load_records, sampling_weights
    from distillers.emoji.data import captions as captions_of

    records = load_records()
    train = [record for record in records if record.split != "held_out"]
    held_out = [record for record in records if record.split == "held_out"]
    captions, rows = _numbered([captions_of(record) for record in train])
    sheet = [captions_of(held_out[i * len(held_out) // SHEET])[0] for i in range(SHEET)]
    identity = hashlib.sha256("".join(record.file_name for record in train).encode()).hexdigest()

    def pictures(numbers: list[int]) -> Tensor:
        return load_pictures([train[number] for number in numbers])

    return Corpus(
        captions=captions,
        rows=rows,
        weights=sampling_weights(train).double(),
        odds=[list(CAPTION_ODDS)] * len(rows),
        pictures=pictures,
        prompts=None,
        sheet=sheet,
        identity=identity,
        groups=[record.category for record in train],
        held_out=_unseen(captions, [(captions_of(record), record.category) for record in held_out]),
    )


def _folder(folder: Path, size: int) -> Corpus:
    """A folder with metadata.jsonl: ``{"file_name", "text": caption or list of captions}``, optionally "split", "group"."""
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise BadData(f"data source {str(folder)!r} is neither 'emoji' nor a folder with a metadata.jsonl")
    texts, files, groups, held_out = [], [], [], []
    for number, line in enumerate(metadata.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            path = folder / record["file_name"]
            text = [record["text"]] if isinstance(record["text"], str) else [str(each) for each in record["text"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(f'{metadata}:{number}: want {{"file_name": ..., "text": ...}}, got {line[:80]!r}') from error
        group = record.get("group")
        if group is not None and not isinstance(group, str):
            raise BadData(f"{metadata}:{number}: group {group!r} must be a string")
        if record.get("split") == "held_out":
            held_out.append((text, group))
            continue
        if not text:
            raise BadData(f"{metadata}:{number}: {record['file_name']} has no text")
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise BadData(f"{metadata}:{number}: no picture {record['file_name']!r} inside {folder}")
        texts.append(text)
        files.append(path)
        groups.append(group)
    if not files:
        raise BadData(f"{metadata} names no pictures to train on")
    captions, rows = _numbered(texts)
    stats = "".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}\n" for path in files)

    def pictures(numbers: list[int]) -> Tensor:
        return torch.stack([_load_picture(files[number], size) for number in numbers])

    return Corpus(
        captions=captions,
        rows=rows,
        weights=torch.full((len(files),), 1 / len(files), dtype=torch.float64),
        odds=None,
        pictures=pictures,
        prompts=None,
        sheet=captions[:SHEET],
        identity=hashlib.sha256(stats.encode()).hexdigest(),
        groups=groups,
        held_out=_unseen(captions, held_out),
    )


def _unseen(captions: list[str], held_out: Sequence[tuple[list[str], str | None]]) -> list[tuple[str, str | None]]:
    """The held-out captions that are none of ``captions``, once each, with the group of the first that has it."""
    known, found = set(captions), dict[str, str | None]()
    for texts, group in held_out:
        for text in texts:
            if text not in known:
                found.setdefault(text, group)
    return list(found.items())


def _numbered(texts: list[list[str]]) -> tuple[list[str], list[list[int]]]:
    """The distinct captions in order of appearance, and each picture's as numbers."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(caption, len(number)) for caption in captions] for captions in texts]
    return list(number), rows


def _load_picture(path: Path, size: int) -> Tensor:
    """The central square at ``size``, ``(3, size, size)`` uint8."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError as error:
        raise BadData(f"{path} is no readable picture ({error})") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _prompt_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"prompts file {str(path)!r} cannot be read ({error})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise BadData(f"prompts file {str(path)!r} is empty: want one prompt a line")
    return lines
