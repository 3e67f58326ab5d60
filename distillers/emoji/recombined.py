"""Captions of emoji that do not exist, made of the names of those that do: what to ask a student for beside its pictures.

A teacher that knows its pictures by heart answers their captions in one step nearly as well as in fifty, and a student that
trains on these has little to learn from it. What such a teacher draws in few steps for a caption that it has never seen is
blurred: there a student learns. Names are put together from two emoji of one sub-category, so that the outcome is something
to be drawn: "rabbit face and mouse, twemoji", "fallen mushroom, noto emoji". None is a caption of any picture, trained on or
held out.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from distillers.emoji.data import CAPTION_ODDS, captions, sampling_weights
from distillers.emoji.prepare import Record

CROSSED, JOINED, KNOWN = 9_000, 6_000, 9_000
"""How many prompts have the first words of one name and the last of another; both names with "and" between; a picture."""


def recombined_prompts(records: Sequence[Record]) -> list[str]:
    """The prompts, `CROSSED` and `JOINED` different ones that name no picture, and `KNOWN` drawn from training's captions.

    The same for the same records. Skin tone and style are the first emoji's.

    Args:
        records: all of them; held-out ones only tell which captions not to make.
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
    """The first words of one name, not all of them where there are several, and the last of the other."""
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
    """That many different captions of names that are combined, none of which is taken."""
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
