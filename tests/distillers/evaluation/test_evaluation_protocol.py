"""The committed protocol is the one that its records make, and keeps its promises."""

import dataclasses
from collections import Counter

import pytest

from distillers.emoji.data import captions, load_records
from distillers.evaluation import protocol as protocol_
from weights.bundled import STUDENTS
from weights.contracts import StudentManifest
from weights.store import Store

RECORDS = load_records()
BY_FILE = {record.file_name: record for record in RECORDS}
PROTOCOL = protocol_.load()


def test_the_committed_file_is_what_the_records_make() -> None:
    assert protocol_.dump(protocol_.build(RECORDS)) == protocol_.PATH.read_text(encoding="utf-8")
    assert protocol_.build(RECORDS[::-1]).digest == PROTOCOL.digest  # the order they come in is nothing


def test_held_out_prompts_are_of_pictures_that_training_never_sees() -> None:
    assert len(PROTOCOL.held_out) == 512
    assert len(PROTOCOL.drawings) == len(set(PROTOCOL.drawings)) == 1024
    for prompt in PROTOCOL.held_out:
        record = BY_FILE[prompt.file_name]
        assert record.split == "held_out"
        assert not record.skin_tone
        assert captions(record)[0] == prompt.caption
    trained = {caption for record in RECORDS if record.split == "train" for caption in captions(record)[:1]}
    assert not trained & {prompt.caption for prompt in PROTOCOL.held_out}


@pytest.mark.parametrize("manifest", Store(STUDENTS).list(), ids=lambda manifest: manifest.name)
def test_bundled_students_were_measured_by_it(manifest: StudentManifest) -> None:
    assert manifest.metrics["evaluation/protocol"] == PROTOCOL.digest
    missing = [n for n in manifest.schedules if not any(f"/{n}_step" in key for key in manifest.metrics)]
    assert not missing


def test_real_sets_are_training_pictures_one_a_pair_and_disjoint() -> None:
    assert len(PROTOCOL.reference) == len(PROTOCOL.floor) == len(PROTOCOL.drawings)
    names = [*PROTOCOL.reference, *PROTOCOL.floor]
    assert len(set(names)) == len(names)
    assert len({(BY_FILE[name].concept, BY_FILE[name].style) for name in names}) == len(names)
    assert {BY_FILE[name].split for name in names} == {"train"}


def test_coarse_prompts_have_many_right_answers_that_training_saw() -> None:
    assert len(set(PROTOCOL.coarse)) == 64
    assert len(PROTOCOL.coarse_seeds) == 8
    train = protocol_.pairs(RECORDS, "train")
    answers = Counter(caption for record in train for caption in {captions(record)[3], captions(record)[5]})
    assert min(answers[prompt] for prompt in PROTOCOL.coarse) >= 8


def test_the_sheet_is_balanced_and_drawn() -> None:
    assert len(set(PROTOCOL.sheet)) == 64
    by_caption = {prompt.caption: BY_FILE[prompt.file_name] for prompt in PROTOCOL.held_out}
    assert Counter(by_caption[caption].category for caption in PROTOCOL.sheet) == protocol_.SHEET
    assert min(Counter(by_caption[caption].style for caption in PROTOCOL.sheet).values()) >= 20


def test_the_quick_protocol_is_part_of_the_whole_under_another_digest() -> None:
    quick = PROTOCOL.quick()
    assert set(quick.drawings) < set(PROTOCOL.drawings)
    assert set(quick.coarse_drawings) < set(PROTOCOL.coarse_drawings)
    assert quick.sheet
    assert set(quick.sheet) <= {prompt.caption for prompt in quick.held_out}
    assert quick.digest != PROTOCOL.digest
    assert dataclasses.replace(PROTOCOL, seeds=(0,)).digest != PROTOCOL.digest


def test_too_few_records_are_refused() -> None:
    with pytest.raises(ValueError, match="there are"):
        protocol_.build(RECORDS[:100])
