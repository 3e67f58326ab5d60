"""The cache of encoded prompts: bounded in bytes, and nobody's but the base's own."""

import gc
from typing import Any

import pytest
import torch

from service.engine.costs import Part
from service.engine.scheduler import Group
from service.engine.text import Prompt, PromptCache, encode
from tests.service.conftest import TinyBase
from weights.denoiser import Cond

ROW = 4 * 10


class Base:
    """As much of a base as a cache sees."""


def prompt(base: Any, text: str, alone: bool = False) -> Prompt:
    return Prompt(base, Group(Part("text", "", ()), base, alone, "base"), text)


def row(value: float) -> Cond:
    return {"states": torch.full((1, 10), float(value))}


def test_those_used_longest_ago_make_room() -> None:
    base, cache = Base(), PromptCache(3 * ROW)
    for number, text in enumerate("abc"):
        cache.put(prompt(base, text), row(number))
    assert cache.get(prompt(base, "a")) is not None
    cache.put(prompt(base, "d"), row(3))
    assert [cache.get(prompt(base, text)) is not None for text in "abcd"] == [True, False, True, True]
    cache.put(prompt(base, "a"), row(7))  # again: it takes the first one's place
    assert [cache.get(prompt(base, text)) is not None for text in "acd"] == [True, True, True]
    found = cache.get(prompt(base, "a"))
    assert found is not None and found["states"][0, 0] == 7
    cache.put(prompt(base, "wide"), {"states": torch.zeros(1, 31)})  # more than there is room for
    assert [cache.get(prompt(base, text)) for text in ("a", "c", "d", "wide")] == [None] * 4


def test_a_prompt_is_its_bases_and_its_kinds() -> None:
    one, two, cache = Base(), Base(), PromptCache(10 * ROW)
    cache.put(prompt(one, "a"), row(1))
    assert cache.get(prompt(two, "a")) is None
    assert cache.get(prompt(one, "a", alone=True)) is None, "what shared a call is not for deterministic pictures"


def test_a_base_can_leave_memory() -> None:
    base, cache = Base(), PromptCache(10 * ROW)
    gone = []

    class Watched(Base):
        def __del__(self) -> None:
            gone.append(True)

    base = Watched()
    cache.put(prompt(base, "a"), row(1))
    del base
    gc.collect()
    assert gone
    assert all(cache.get(prompt(Base(), "a")) is None for _ in range(50)), "not even for one at the same address"


@pytest.mark.parametrize("batch", [2, 4])
def test_encoding_pads_and_keeps_no_more_than_its_rows(tiny_base: TinyBase, batch: int) -> None:
    texts = ["red apple", "blue dog"]
    conds = encode([prompt(tiny_base.model, text) for text in texts], batch)
    for text, cond in zip(texts, conds, strict=True):
        for name, alone in tiny_base.model.encode_prompts([text]).items():
            torch.testing.assert_close(cond[name], alone)
            assert cond[name].untyped_storage().nbytes() == alone.numel() * alone.element_size()
