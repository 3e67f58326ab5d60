"""Captions of emoji that do not exist: made of two names of one kind, and of nobody's caption."""

import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillers.corpus import load_corpus
from distillers.emoji.data import captions, load_records
from distillers.emoji.prepare import STYLES
from distillers.emoji.recombined import CROSSED, JOINED, KNOWN, _crossed, recombined_prompts
from distillers.spec import BadSpec, check_spec
from weights.contracts import RECOMBINED, DataSpec

NAMES = st.lists(st.sampled_from("cat dog red face with of".split()), min_size=1, max_size=5).map(" ".join)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return recombined_prompts(load_records())


def test_there_are_as_many_as_it_says_and_the_same_each_time(prompts: list[str]) -> None:
    new = prompts[: CROSSED + JOINED]
    assert len(set(new)) == len(new)
    assert len(prompts) == CROSSED + JOINED + KNOWN
    assert recombined_prompts(load_records()) == prompts


def test_new_ones_name_no_picture_and_no_held_out_caption_is_among_the_known(prompts: list[str]) -> None:
    records = load_records()
    train = {caption for record in records if record.split != "held_out" for caption in captions(record)}
    held_out = {caption for record in records if record.split == "held_out" for caption in captions(record)}
    new, known = prompts[: CROSSED + JOINED], prompts[CROSSED + JOINED :]
    assert not set(new) & (train | held_out)
    assert set(known) <= train


def test_both_names_are_of_one_kind(prompts: list[str]) -> None:
    kinds: dict[str, set[str]] = defaultdict(set)
    for record in load_records():
        for name in (record.name, record.keywords[0]):
            kinds[name].add(record.subcategory)
    joined = prompts[CROSSED : CROSSED + JOINED]
    for prompt in joined:
        *what, style = prompt.split(", ")
        assert style in STYLES.values()
        named = ", ".join(part for part in what if not part.endswith("skin tone"))
        pairs = [(named[:at], named[at + 5 :]) for at in range(len(named)) if named[at:].startswith(" and ")]
        assert any(kinds[one] & kinds[other] for one, other in pairs if one in kinds and other in kinds), prompt


@given(NAMES, NAMES, st.integers(0, 999))
def test_crossing_takes_the_first_words_and_the_last(one: str, other: str, seed: int) -> None:
    words, first, last = _crossed(one, other, random.Random(seed)).split(), one.split(), other.split()
    cuts = [
        head
        for head in range(1, max(2, len(first)))
        if words[:head] == first[:head] and len(words) > head and words[head:] == last[-(len(words) - head) :]
    ]
    assert cuts, words


def test_a_job_asks_for_them_by_a_word() -> None:
    corpus = load_corpus(DataSpec(prompts=RECOMBINED), 64)
    plain = load_corpus(DataSpec(), 64)
    assert corpus.prompts is not None
    assert len(corpus.prompts) == CROSSED + JOINED + KNOWN
    assert (corpus.sheet, corpus.rows) == (plain.sheet, plain.rows), "sheets and pictures are what they were"
    assert corpus.captions[: len(plain.captions)] == plain.captions
    job = {"student": "a", "method": "sim", "base": "emoji-base", "data": {"prompts": RECOMBINED}}
    assert check_spec(job)[0].data.recombines
    with pytest.raises(
        BadSpec, match=r"data\.prompts: there is no file 'recombined' \('recombined' needs source 'emoji'\)"
    ):
        check_spec({**job, "data": {"source": "/tmp", "prompts": RECOMBINED}})
