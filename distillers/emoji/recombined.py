"""Captions of emoji that do not exist, recombined from the names of those that do, as prompts to train a student on.

For captions that a teacher has memorised, its one-step images are nearly as good as its fifty-step images, so a student
trained on them has little to learn. For captions that it has never seen, its few-step images are blurred, and there a
student learns. Two names from one sub-category are combined, so that the result can be drawn: "rabbit face and mouse,
twemoji", "fallen mushroom, noto emoji". None of them is the caption of an image, in training or held out.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from distillers.emoji.data import CAPTION_ODDS, captions, sampling_weights
from distillers.emoji.prepare import Record

CROSSED, JOINED, KNOWN = 9_000, 6_000, 9_000
"""Number of prompts made of the first words of one name and the last of another; of two names joined by "and"; of
training captions."""


def recombined_prompts(records: Sequence[Record]) -> list[str]:
    """The prompts: `CROSSED` and `JOINED` distinct ones that caption no image, and `KNOWN` drawn from training
    captions.

    Deterministic. Skin tone and style are those of the first emoji.

    Args:
        records: all of them; held-out ones only exclude their captions.
    """
    train = [record for record in records if record.split != "held_out"]
    odds = sampling_weights(train).tolist()
    taken = {caption for record in records for caption in captions(record)}
    chance = random.Random(0)
    crossed = _made(train, odds, taken, chance, _crossed, CROSSED)
    joined = _made(train, odds, taken.union(crossed), chance, _joined, JOINED)
    drawn = chance.choices(train, odds, k=KNOWN)
    return [*crossed, *joined, *(chance.choices(captions(record), CAPTION_ODDS)[0] for record in drawn)]


def _crossed(one: str, other: str, chance: random.Random) -> str:
    """The first words of one name, not all of them if there are several, followed by the last words of the other."""
    first, last = one.split(), other.split()
    return " ".join(first[: chance.randint(1, max(1, len(first) - 1))] + last[chance.randrange(len(last)) :])


def _joined(one: str, other: str, chance: random.Random) -> str:
    return f"{one} and {other}"


def _made(
    train: Sequence[Record],
    odds: Sequence[float],
    taken: set[str],
    chance: random.Random,
    combine: Callable[[str, str, random.Random], str],
    count: int,
) -> list[str]:
    """Generates ``count`` distinct captions from combined names, none of which is taken."""
    whole = list(accumulate(odds))
    kin: dict[str, tuple[list[Record], list[float]]] = defaultdict(lambda: ([], []))
    for record, each in zip(train, odds, strict=True):
        kin[record.subcategory][0].append(record)
        kin[record.subcategory][1].append(each)
    found: dict[str, None] = {}
    while len(found) < count:
        first = chance.choices(train, cum_weights=whole)[0]
        second = chance.choices(*kin[first.subcategory])[0]
        one, other = (chance.choice([record.name, record.keywords[0]]) for record in (first, second))
        what = combine(one, other, chance)
        caption = captions(replace(first, name=what))[0]
        if first.concept != second.concept and what not in (one, other) and caption not in taken:
            found[caption] = None
    return list(found)
