"""Prompts as the networks take them: encoded once, and kept as long as there is room.

A deterministic request's prompts are encoded alone, and kept apart from those that shared a call: the last bits of an
embedding can depend on its company, and a deterministic picture's must not.
"""

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.engine.scheduler import Group
from weights.denoiser import Cond
from weights.families import TextToImage


@dataclass(frozen=True)
class Prompt:
    """A prompt that somebody waits for: a `service.engine.scheduler.Work`. Equal ones are encoded once."""

    base: TextToImage
    group: Group
    text: str

    @property
    def rows(self) -> int:
        """See `Work.rows`."""
        return 1


def encode(prompts: Sequence[Prompt], batch: int) -> list[Cond]:
    """The prompts' conditions of one row each, all by one call.

    Args:
        prompts: of one group.
        batch: at least as many; the call is padded to it.
    """
    texts = [prompt.text for prompt in prompts]
    cond = prompts[0].base.encode_prompts(texts + texts[-1:] * (batch - len(texts)))
    # Copies, so that one that is kept does not keep the others' memory.
    return [{name: rows[place : place + 1].clone() for name, rows in cond.items()} for place in range(len(texts))]


class PromptCache:
    """The conditions of the prompts used last; used on the engine's thread alone.

    Args:
        capacity: bytes; with 0 nothing is kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[tuple[Any, ...], Cond] = OrderedDict()
        self._bytes = 0

    def get(self, prompt: Prompt) -> Cond | None:
        """The prompt's condition, if it is here."""
        key = _key(prompt)
        cond = self._kept.get(key)
        if cond is not None:
            self._kept.move_to_end(key)
        return cond

    def put(self, prompt: Prompt, cond: Cond) -> None:
        """Keep a condition; those that were used longest ago make room for it."""
        key = _key(prompt)
        self._bytes += _size(cond) - _size(self._kept.pop(key, {}))
        self._kept[key] = cond
        while self._bytes > self._capacity:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._bytes = 0


def _key(prompt: Prompt) -> tuple[Any, ...]:
    """Weak, so that a base can leave memory; equal for no other base, not even one at the same address later."""
    return weakref.ref(prompt.base), prompt.text, prompt.group.alone


def _size(cond: Cond) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in cond.values())
