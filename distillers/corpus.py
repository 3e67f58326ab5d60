"""Where training data comes from: the bundled emoji, a folder of pictures with captions, a file of prompts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from distillers.folder import BadData, load_picture, read_folder
from weights.contracts import DataSpec

SHEET = 8
"""Prompts on a sample sheet."""
LOADED = "upright on white\n"
"""How `load_picture` makes pixels of a file; part of the identity, since latents are kept."""


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
    """The training split of a folder with metadata.jsonl."""
    found = read_folder(folder)
    train = [row for row in found if not row.held_out]
    for row in train:
        row.check(folder)
    if not train:
        raise BadData(f"{folder / 'metadata.jsonl'} names no pictures to train on")
    captions, rows = _numbered([row.texts for row in train])
    stats = [row.path.stat() for row in train]
    files = "".join(f"{r.path.name}:{s.st_size}:{s.st_mtime_ns}\n" for r, s in zip(train, stats, strict=True))

    def pictures(numbers: list[int]) -> Tensor:
        return torch.stack([load_picture(train[number].path, size) for number in numbers])

    return Corpus(
        captions=captions,
        rows=rows,
        weights=torch.full((len(train),), 1 / len(train), dtype=torch.float64),
        odds=None,
        pictures=pictures,
        prompts=None,
        sheet=captions[:SHEET],
        identity=hashlib.sha256((LOADED + files).encode()).hexdigest(),
        groups=[row.group for row in train],
        held_out=_unseen(captions, [(row.texts, row.group) for row in found if row.held_out]),
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


def _prompt_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"prompts file {str(path)!r} cannot be read ({error})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise BadData(f"prompts file {str(path)!r} is empty: want one prompt a line")
    return lines
