"""The protocol: fixed lists of captions, seeds and real images, committed to the repository.

`build` makes ``protocol.json`` beside this file from the metadata of the bundled emoji. It is a pure function, which
orders images by the sha256 of their names, so that the lists are not random and change little when emoji are added:

    python -m distillers.evaluation.protocol

All images here are of (emoji, style) pairs without skin tone. ``held_out`` are pairs that are never trained on.
``reference``, the real set, are as many training images as are generated. ``floor`` are equally many others, disjoint
from these, whose distance to the reference is the score of a perfect model.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distillers.emoji.data import captions, load_records
from distillers.emoji.prepare import Record

PATH = Path(__file__).with_name("protocol.json")
CAPTIONS, SEEDS = 512, (0, 1)
COARSE, COARSE_SEEDS = 64, tuple(range(8))
CHOICES = 100
LEAST_ANSWERS = 8
"""Minimum number of right answers to a coarse prompt among the training images."""
SHEET = {
    "animals & nature": 12,
    "food & drink": 12,
    "smileys & emotion": 10,
    "objects": 8,
    "travel & places": 7,
    "people & body": 6,
    "activities": 4,
    "symbols": 3,
    "flags": 2,
}
SHEET_FIRST = {"smileys & emotion": ("face", "cat face"), "travel & places": ("transport",)}
"""Sub-categories (by prefix) that fill a category's share of the sheet first."""


@dataclass(frozen=True)
class Prompt:
    """A held-out image and its most specific caption, ``"{name}, {style}"``."""

    file_name: str
    caption: str


@dataclass(frozen=True)
class Protocol:
    """The lists of a protocol. `load` returns the committed one, `quick` a small part of it."""

    held_out: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    coarse: tuple[str, ...]
    coarse_seeds: tuple[int, ...]
    reference: tuple[str, ...]
    floor: tuple[str, ...]
    sheet: tuple[str, ...]
    """Captions of the 64 held-out prompts on the contact sheet, generated with the first of ``seeds``."""
    fit: int | None = None
    """Number of training images for the alignment regression; all when None."""

    @cached_property
    def digest(self) -> str:
        """sha256 over all lists; results under different digests are not comparable."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def choices(self) -> int:
        """Number of captions among which R-precision looks for an image's own."""
        return min(CHOICES, len(self.held_out))

    @property
    def drawings(self) -> list[tuple[str, int]]:
        """Caption and seed of every specific image, a caption's seeds adjacent."""
        return [(prompt.caption, seed) for prompt in self.held_out for seed in self.seeds]

    @property
    def coarse_drawings(self) -> list[tuple[str, int]]:
        """Prompt and seed of every image for diversity, a prompt's seeds adjacent."""
        return [(prompt, seed) for prompt in self.coarse for seed in self.coarse_seeds]

    def quick(self) -> "Protocol":
        """A small part, for a quick look or a demo: too noisy to judge any target."""
        held_out = self.held_out[:128]
        drawn = {prompt.caption for prompt in held_out}
        return replace(
            self,
            held_out=held_out,
            sheet=tuple(caption for caption in self.sheet if caption in drawn),
            seeds=self.seeds[:1],
            coarse=self.coarse[:16],
            coarse_seeds=self.coarse_seeds[:4],
            reference=self.reference[:256],
            floor=self.floor[:256],
            fit=1024,
        )


def by_digest(records: list[Record]) -> list[Record]:
    """The records in an order that depends only on their names."""
    return sorted(records, key=lambda record: hashlib.sha256(record.file_name.encode()).digest())


def pairs(records: list[Record], split: str) -> list[Record]:
    """The split's records without skin tone: one of each (emoji, style) pair."""
    return [record for record in records if record.split == split and not record.skin_tone]


def build(records: list[Record]) -> Protocol:
    """Builds the protocol from these records.

    Raises:
        ValueError: there are too few of them.
    """
    held_out, train = by_digest(pairs(records, "held_out")), by_digest(pairs(records, "train"))
    drawn = CAPTIONS * len(SEEDS)
    if len(held_out) < CAPTIONS or len(train) < 2 * drawn:
        raise ValueError(
            f"the protocol needs {CAPTIONS} held-out and {2 * drawn} training images without skin tone, but there are "
            f"{len(held_out)} and {len(train)}"
        )
    sheet = sheet_records(held_out)
    others = [record for record in held_out if record not in sheet][: CAPTIONS - len(sheet)]
    chosen = by_digest(sheet + others)  # mixes the sheet's prompts with the others
    return Protocol(
        held_out=tuple(Prompt(record.file_name, captions(record)[0]) for record in chosen),
        seeds=SEEDS,
        coarse=tuple(coarse_prompts(train)),
        coarse_seeds=COARSE_SEEDS,
        reference=tuple(record.file_name for record in train[:drawn]),
        floor=tuple(record.file_name for record in train[drawn : 2 * drawn]),
        sheet=tuple(captions(record)[0] for record in sheet),
    )


def sheet_records(held_out: list[Record]) -> list[Record]:
    """64 records, distributed over categories as in `SHEET` and evenly over styles within a category."""
    chosen = []
    for category, count in SHEET.items():
        first = SHEET_FIRST.get(category, ("",))
        of_style: dict[str, list[Record]] = defaultdict(list)
        members = [record for record in held_out if record.category == category]
        for record in sorted(members, key=lambda record: not record.subcategory.startswith(first)):  # stable
            of_style[record.style].append(record)
        rounds = [record for turn in _transposed(list(of_style.values())) for record in turn]
        chosen += rounds[:count]
    return chosen


def coarse_prompts(train: list[Record]) -> list[str]:
    """64 prompts that name only a category or sub-category in a style, with enough right answers.

    They include every category (except flags and single components, which hardly vary); sub-categories fill the rest.
    """
    answers: dict[tuple[bool, str], int] = defaultdict(int)
    for record in train:
        if record.category not in ("component", "flags"):
            answers[False, captions(record)[5]] += 1
            answers[True, captions(record)[3]] += 1
    enough = [key for key, count in answers.items() if count >= LEAST_ANSWERS]
    ordered = sorted(enough, key=lambda key: (key[0], hashlib.sha256(key[1].encode()).digest()))
    prompts = list(dict.fromkeys(prompt for _, prompt in ordered))[:COARSE]
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())


def load(path: Path = PATH) -> Protocol:
    """The committed protocol."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    held_out = tuple(Prompt(**prompt) for prompt in fields.pop("held_out"))
    lists: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
    return Protocol(held_out=held_out, **lists)


def dump(protocol: Protocol) -> str:
    """The protocol as the text of ``protocol.json``."""
    return json.dumps(asdict(protocol), indent=1, ensure_ascii=False) + "\n"


def _transposed(columns: list[list[Record]]) -> list[list[Record]]:
    longest = max((len(column) for column in columns), default=0)
    return [[column[row] for column in columns if row < len(column)] for row in range(longest)]


if __name__ == "__main__":
    protocol = build(load_records())
    PATH.write_text(dump(protocol), encoding="utf-8")
    print(f"{PATH}: {len(protocol.held_out)} captions, {len(protocol.coarse)} coarse prompts, digest {protocol.digest}")
