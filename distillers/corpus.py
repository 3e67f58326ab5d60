"""Sources of training data: the bundled emoji, a folder of images with captions, a file of prompts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from distillers.folder import BadData, load_picture, read_folder
from weights.contracts import DataSpec

SHEET = 8
"""Number of prompts on a sample sheet."""
LOADED = "upright on white\n"
"""How `load_picture` processes images; part of the identity, since latents are cached."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The training split of a data source. Captions are unique; images refer to them by index."""

    captions: list[str]
    rows: list[list[int]]
    """Each image's captions, of which one is drawn at a time."""
    weights: Tensor
    """Sampling probability of each image, ``(N,)`` float64, summing to 1."""
    odds: list[list[float]] | None
    """Relative sampling weight of each image's captions; uniform if None."""
    pictures: Callable[[list[int]], Tensor] | None
    """Returns the images at these indices, ``(B, 3, H, W)`` uint8; None if there are only prompts."""
    prompts: list[int] | None
    """Captions that the student's conditions are drawn from; None if these are the images' own."""
    sheet: list[str]
    """Prompts of the sample sheets."""
    identity: str
    """Identifies the images: part of the cache key of the latents."""
    drawn: list[int] | None = None
    """The subset of ``prompts`` that batches draw from; None for all."""
    groups: list[str | None] | None = None
    """Each image's group, if the data has groups."""
    held_out: list[tuple[str, str | None]] = field(default_factory=list)
    """Captions of the held-out split that do not occur in training, each with its image's group."""


def load_corpus(spec: DataSpec, size: int) -> Corpus:
    """Loads the corpus of a data source.

    Args:
        spec: the job's data settings.
        size: height and width that images are resized to.

    Raises:
        BadData: a file is missing or malformed.
    """
    corpus = _emoji() if spec.source == "emoji" else _folder(Path(spec.source), size)
    if spec.prompts is None:
        return corpus
    lines = prompts_of(None if spec.recombines else Path(spec.prompts))
    sheet = corpus.sheet if spec.recombines else lines[:SHEET]
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
        raise BadData(f"{folder / 'metadata.jsonl'} names no images to train on")
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
    """The distinct held-out captions that are not in ``captions``, with the group of the first image that has each."""
    known, found = set(captions), dict[str, str | None]()
    for texts, group in held_out:
        for text in texts:
            if text not in known:
                found.setdefault(text, group)
    return list(found.items())


def _numbered(texts: list[list[str]]) -> tuple[list[str], list[list[int]]]:
    """The distinct captions in order of appearance, and each image's captions as indices into them."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(caption, len(number)) for caption in captions] for captions in texts]
    return list(number), rows


def prompts_of(path: Path | None) -> list[str]:
    """The prompts of a file, one per line; without one, those for emoji that do not exist.

    Raises:
        BadData: the file cannot be read, or is empty.
    """
    if path is None:
        from distillers.emoji.data import load_records
        from distillers.emoji.recombined import recombined_prompts

        return recombined_prompts(load_records())
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"prompts file {str(path)!r} cannot be read ({error})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise BadData(f"prompts file {str(path)!r} is empty: give one prompt per line")
    return lines
