"""Prompts as input of the networks: encoded once, and cached as long as there is room.

A deterministic request's prompts are encoded alone, and cached separately from those that shared a call: the last bits
of an embedding can depend on the rest of its batch, and a deterministic image's must not.
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
    """A prompt that requests wait for: a `service.engine.scheduler.Work`. Equal prompts are encoded once."""

    base: TextToImage
    group: Group
    text: str

    @property
    def rows(self) -> int:
        """See `Work.rows`."""
        return 1


def encode(prompts: Sequence[Prompt], batch: int) -> list[Cond]:
    """Encode the prompts in one call, and return a condition of one row for each.

    Args:
        prompts: prompts of one group.
        batch: at least as many; the call is padded to this size.
    """
    texts = [prompt.text for prompt in prompts]
    cond = prompts[0].base.encode_prompts(texts + texts[-1:] * (batch - len(texts)))
    # Copies, so that keeping one does not keep the memory of all.
    return [{name: rows[place : place + 1].clone() for name, rows in cond.items()} for place in range(len(texts))]


class PromptCache:
    """The most recently used prompts' conditions. Used only on the engine's thread.

    Args:
        capacity: bytes; 0 caches nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[tuple[Any, ...], Cond] = OrderedDict()
        self._bytes = 0

    def get(self, prompt: Prompt) -> Cond | None:
        """The prompt's condition, if it is cached."""
        key = _key(prompt)
        cond = self._kept.get(key)
        if cond is not None:
            self._kept.move_to_end(key)
        return cond

    def put(self, prompt: Prompt, cond: Cond) -> None:
        """Cache a condition; the least recently used ones make room for it."""
        key = _key(prompt)
        self._bytes += _size(cond) - _size(self._kept.pop(key, {}))
        self._kept[key] = cond
        while self._bytes > self._capacity:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)

    def clear(self) -> None:
        """Forget all conditions."""
        self._kept.clear()
        self._bytes = 0


def _key(prompt: Prompt) -> tuple[Any, ...]:
    """The cache key of a prompt.

    The reference is weak, so that a base can leave memory; it never equals that of a later base at the same address.
    """
    return weakref.ref(prompt.base), prompt.text, prompt.group.alone


def _size(cond: Cond) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in cond.values())
