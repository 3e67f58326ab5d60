"""Models in memory under a budget of bytes.

Memory that two models share counts once, and the least recently used model is evicted first.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil  # type: ignore[import-untyped]
import torch

from service.engine.base import ModelBroken
from weights.families import TextToImage
from weights.modules import storages

log = logging.getLogger(__name__)

GPU_SHARE = 0.8
"""Share of a GPU's memory for models; the rest is for computation."""
RAM_SHARE = 0.5
"""Share of the machine's memory for models, since other programs use it too."""
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")

V = TypeVar("V")
Key = Hashable


class TooLarge(ModelBroken):
    """A model does not fit into the budget, even alone with the models that must stay."""


def default_budget(device: torch.device) -> int:
    """The budget in bytes for models on this device if the settings give none."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    total = psutil.virtual_memory().total
    try:
        total = min(total, int(CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        pass
    return int(RAM_SHARE * total)


@dataclass(frozen=True, kw_only=True, eq=False)
class Held(Generic[V]):
    """One entry of a `Shelf`."""

    label: str
    """Name for messages."""
    value: V
    models: tuple[TextToImage, ...]
    """All models that it keeps in memory, each once."""
    needs: Key | None = None
    """Key of the entry whose components it shares, which must not be evicted before it."""
    storages: dict[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        modules = [module for model in self.models for module in model.components().values()]
        object.__setattr__(self, "storages", storages(modules))


class Shelf(Generic[V]):
    """Entries by key, in order of last use. Thread-safe.

    An evicted entry stays valid for whatever still uses it, and its memory is freed only then.

    Args:
        budget: bytes for all entries together.
        stays: whether the entry of a key must never be evicted for another.
    """

    def __init__(self, budget: int, stays: Callable[[Any], bool]) -> None:
        self.budget = budget
        self._stays = stays
        self._entries: OrderedDict[Key, Held[V]] = OrderedDict()
        self._versions: dict[Key, Any] = {}
        self._making: dict[tuple[Key, Any], Future[Held[V]]] = {}
        self._lock = threading.RLock()

    def get(self, key: Key, version: Any = None) -> Held[V] | None:
        """The entry of that version, now the most recently used, and what it needs; None if there is none."""
        with self._lock:
            return self.any_version(key) if key in self._entries and self._versions[key] == version else None

    def any_version(self, key: Key) -> Held[V] | None:
        """Like `get`, for the entry of whatever version."""
        with self._lock:
            held = self._entries.get(key)
            if held is not None:
                for used in (held.needs, key):
                    if used in self._entries:
                        self._entries.move_to_end(used)
            return held

    def once(self, key: Key, version: Any, make: Callable[[], Held[V]]) -> Held[V]:
        """The entry of that version, created and added if there is none.

        One thread creates it, while others that ask for it wait.

        Raises:
            TooLarge: see `put`.
        """
        with self._lock:
            held = self.get(key, version)
            if held is not None:
                return held
            others = self._making.get((key, version))
            if others is None:
                mine = self._making[key, version] = Future[Held[V]]()
        if others is not None:
            return others.result()
        try:
            held = make()
            self.put(key, held, version)
            mine.set_result(held)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._making[key, version]
        return held

    def put(self, key: Key, held: Held[V], version: Any = None) -> None:
        """Add an entry, replacing any other version of it, and evict others until all fit into the budget.

        Raises:
            TooLarge: it does not fit beside the entries that must stay; it is not added, and nothing is evicted, not even
                another version of it.
        """
        with self._lock:
            victims = self._victims({**self._entries, key: held}, 0, {key, held.needs}, held.label)
            self._drop(victims)
            self._entries[key], self._versions[key] = held, version
            self._entries.move_to_end(key)

    def make_room(self, key: Key, needed: int, label: str, keep: Collection[Key] = ()) -> None:
        """Evict entries until ``needed`` bytes fit in place of the entry of this key.

        Args:
            key: key of the entry that is about to be added.
            needed: its size in bytes.
            label: its name for messages.
            keep: keys that must not be evicted for it.

        Raises:
            TooLarge: it does not fit beside the entries that must stay; nothing is evicted then.
        """
        with self._lock:
            others = OrderedDict((k, held) for k, held in self._entries.items() if k != key)
            self._drop(self._victims(others, needed, set(keep), label))

    def bytes_by_label(self) -> dict[str, int]:
        """Memory of each entry; what it shares with the entry that it needs counts only there."""
        with self._lock:
            return {self._entries[key].label: size for key, size in _sizes(self._entries).items()}

    def clear(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()
            self._versions.clear()

    def _victims(
        self, entries: Mapping[Key, Held[V]], needed: int, keep: Collection[Key | None], label: str
    ) -> list[Key]:
        """Choose the entries to evict so that the others and ``needed`` more bytes fit into the budget."""
        left, victims = dict(entries), []
        while (used := sum(_sizes(left).values())) + needed > self.budget:
            bases = {held.needs for held in left.values()}
            victim = next((k for k in left if k not in keep and k not in bases and not self._stays(k)), None)
            if victim is None:
                raise TooLarge(
                    f"{label!r} does not fit into memory: with the models that must stay it needs {_text(used + needed)}, "
                    f"but FEWSTEP_MEMORY_BYTES allows {_text(self.budget)}"
                )
            del left[victim]
            victims.append(victim)
        return victims

    def _drop(self, victims: Iterable[Key]) -> None:
        for key in victims:
            log.info("dropping %r from memory", self._entries.pop(key).label)
            del self._versions[key]


def _sizes(entries: Mapping[Key, Held[Any]]) -> dict[Key, int]:
    """Bytes of each entry, in order but with bases first: what others share with a base is attributed to the base."""
    counted: set[int] = set()
    sizes = {}
    for key, held in sorted(entries.items(), key=lambda item: item[1].needs is not None):  # the sort is stable
        own = held.storages.keys() - counted
        new = [model for model in held.models if id(model) not in counted]
        counted |= own | {id(model) for model in new}
        sizes[key] = sum(held.storages[address] for address in own) + sum(model.extra_bytes for model in new)
    return sizes


def _text(size: int) -> str:
    """A size for messages, such as ``"1.2 GB"``."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.0f} kB"
