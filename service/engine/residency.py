"""Which models are available by name, and which of them are in memory.

A student shares its base's text encoder and autoencoder. Thread-safe; two threads that ask for the same model load it
once. A returned model stays valid for its holder, even if it is evicted or another one is published under its name.
"""

import contextlib
import logging
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace

import torch

from service.engine.base import EngineError, ModelInfo
from service.engine.catalog import Catalog
from service.engine.gate import Gate
from service.engine.making import Maker, Wanted
from service.engine.memory import Held, Shelf, TooLarge
from service.engine.names import base_info, broken, student_info
from service.engine.recent import Recent, Unseen
from service.engine.resident import Key, Loras, Prepare, Resident
from weights.contracts import BaseReference, StudentManifest
from weights.store import Store, StoreError, StudentFolder
from weights.students import check_base, network_bytes

__all__ = ["Found", "Residency", "Resident"]

log = logging.getLogger(__name__)

PLANNED = ("base", "family", "schedules", "guidance", "diversity")
"""The fields of a manifest that a request's plan depends on."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of `Residency.find`."""

    wants: Hashable
    """Equal for requests that wait for the same model."""
    resident: Resident | None
    """None if the model has to be loaded first."""
    newer: Hashable = None
    """The version in the store, if the one in memory is older; None if it is not."""


class Residency:
    """Bases and students by name, loaded when they are first asked for.

    Args:
        store: the students; it is read again and again, so that a new student needs no restart.
        listed: bases that always stay in memory, each with its family.
        device: where models are loaded.
        dtype: precision of their weights.
        budget: bytes for all models; the least recently used one is evicted, except for bases and pinned students.
        pinned: students that are loaded with the bases, and stay in memory like them.
        aliases: the base or student that each alias stands for.
        prepare: prepares a loaded model for use, given the prepared base if it is a student.
        gate: closed while a base is being loaded.
        recent: a cache of the store; None to read the store every time.
    """

    def __init__(
        self,
        store: Store,
        listed: Mapping[str, str],
        device: torch.device,
        dtype: torch.dtype,
        budget: int,
        *,
        pinned: Collection[str] = (),
        aliases: Mapping[str, str] | None = None,
        prepare: Prepare | None = None,
        gate: Gate | None = None,
        recent: Recent | None = None,
    ) -> None:
        self._store, self._recent = store, recent
        asked = store if recent is None else recent
        self._find_student, self._open_student = asked.find, asked.open
        self._listed = dict(listed)
        self._maker = Maker(device, dtype, prepare, gate if gate is not None else Gate())
        self._aliases = dict(aliases or {})
        self._catalog = Catalog(store, self._listed, self._aliases)
        self._pinned = set(map(self._catalog.own_name, pinned))
        self._kept = frozenset[str]()
        """The students that the pinned models stand for, as the store last reported them."""
        self._shelf: Shelf[Resident] = Shelf(budget, self._stays)

    def load_bases(self) -> None:
        """Load what always stays: the bases, and the pinned students. A pinned student that is broken is logged.

        Raises:
            TooLarge: they exceed the budget.
        """
        for name, family in self._listed.items():
            self._base(Key(name, family))
            self._catalog.identify(name)
        self._look_at_pinned()
        for name in sorted(self._pinned - self._listed.keys()):
            try:
                for member in self._members(name):
                    self.get(member, "")
            except TooLarge:
                raise
            except (EngineError, StoreError):
                log.exception("pinned model %r cannot be loaded; other models are still available", name)

    def pin(self, name: str) -> None:
        """Keep this student in memory from now on, once it is loaded."""
        self._pinned.add(self._catalog.own_name(name))
        self._look_at_pinned()

    def get(self, name: str, prompt: str, loras: Loras = ()) -> Resident:
        """The model that generates images of this prompt under that name, loaded if necessary.

        Args:
            name: a base, a student, or an alias.
            prompt: by which a routed student selects one of its members.
            loras: LoRA students of the same base to merge into a copy of the model.

        Raises:
            UnknownModel: no model has that name.
            ModelBroken: its files, or its base's, cannot be loaded; or (`TooLarge`) it does not fit into memory.
            BadRequest: one of the LoRAs does not exist, is not a LoRA, or belongs to another base.
        """
        wanted = self._catalog.wanted(name, prompt, loras, self._open_student, self._base_of)
        assert wanted is not None, "its base is loaded now"
        if wanted.key == wanted.base:
            return self._base(wanted.key)
        try:
            held = self._shelf.once(wanted.key, wanted.version, lambda: self._make(wanted))
        except EngineError:
            raise
        except Exception as error:  # foreign files can make a loader raise anything
            raise broken(wanted.key.label) from error  # with its LoRAs, which may be to blame
        return _told(held.value, wanted)

    def find(self, name: str, prompt: str, loras: Loras = ()) -> Found:
        """The model that `get` would return, or an older version of it, if either is in memory.

        If there is a cache of the store, no disk is read.

        Raises:
            UnknownModel, ModelBroken, BadRequest: see `get`, as far as manifests tell.
        """
        known = self._find_student if self._recent is None else self._recent.last
        try:
            wanted = self._catalog.wanted(name, prompt, loras, known, self._base_in_memory)
        except Unseen:
            wanted = None
        # A model that the cache does not know may still be in memory; loading it then takes no time. And which member
        # of a routed student serves this prompt is unknown until its base is in memory.
        if wanted is None:
            return Found(wants=(name, loras, prompt), resident=None)
        wants, held, newer = (name, wanted.key), self._shelf.get(wanted.key, wanted.version), None
        if held is None:
            held, newer = self._shelf.any_version(wanted.key), wanted.version
            if held is None or not _replaceable(held.value, wanted):
                return Found(wants=wants, resident=None)
        return Found(wants=wants, resident=_told(held.value, wanted), newer=newer)

    def check_loras(self, name: str, loras: Loras) -> None:
        """Refuse LoRAs that `get` would refuse, as far as manifests tell: see `Catalog.check_loras`."""
        self._catalog.check_loras(name, loras, self._find_student)

    def info(self, name: str) -> ModelInfo | StudentManifest:
        """What is known about a model without loading it: a base's facts, or a student's manifest.

        Raises:
            UnknownModel: no model has that name.
            ModelBroken: the student's manifest cannot be read.
        """
        name = self._catalog.own_name(name)
        if name in self._listed:
            return self._base_info(name)
        manifest = self._catalog.folder(name, self._find_student).manifest
        for member in manifest.router.students if manifest.router is not None else []:
            with contextlib.suppress(StoreError):  # only generating needs it; from now on the cache knows it
                self._find_student(member)
        return manifest

    def at_hand(self, name: str) -> bool:
        """Whether `info` would answer for this model without reading the disk or loading anything."""
        name = self._catalog.own_name(name)
        if name in self._listed:
            return self._shelf.get(Key(name, self._listed[name]), ()) is not None
        if self._recent is None:
            return False
        try:
            router = self._recent.last(name).manifest.router
        except Unseen:
            return False
        return router is None or all(map(self._recent.knows, router.students))

    def infos(self) -> list[ModelInfo]:
        """All available models: the bases, then the students, then the aliases of either."""
        taken = self._listed.keys() | self._aliases.keys()
        students = [manifest for manifest in self._store.list() if manifest.name not in taken]
        infos = [self._base_info(name) for name in self._listed] + [
            student_info(each, self.size_of(each.base, each.family)) for each in students
        ]
        by_name = {info.id: info for info in infos}
        aliases = [(alias, by_name[name]) for alias, name in self._aliases.items() if name in by_name]
        return infos + [replace(info, id=alias, alias_of=info.id) for alias, info in aliases]

    def size_of(self, base: BaseReference, family: str) -> int | None:
        """Side length in pixels of this base's images; None while it is not in memory."""
        held = self._shelf.get(self._catalog.base_key(base, family), ())
        return held.value.base.size if held else None

    def base_name(self, student: StudentManifest) -> str:
        """The name under which its base is listed here, or else the base's name at training."""
        return self._catalog.base_key(student.base, student.family).name

    def bytes_by_model(self) -> dict[str, int]:
        """Memory of every model: the bases, then the others, least recently used first.

        What a student shares with its base counts for the base only. A model with LoRAs is named ``MODEL+LORA:SCALE``.
        """
        return self._shelf.bytes_by_label()

    def clear(self) -> None:
        """Forget all models."""
        self._shelf.clear()

    def _stays(self, key: Key) -> bool:
        if key.family is not None:
            return key.family == self._listed.get(key.name)
        return not key.loras and key.name in self._kept

    def _look_at_pinned(self) -> None:
        """Update the students to keep.

        Not done in `_stays`, which is called while the shelf is locked: the store may be slow.
        """
        self._kept = frozenset(member for name in self._pinned for member in self._members(name))

    def _members(self, name: str) -> list[str]:
        """The students that a name stands for: itself, or the members of a routed student."""
        try:
            router = self._store.manifest(name).router
        except StoreError:
            return [name]
        return [name] if router is None else list(router.students)

    def _base(self, key: Key) -> Resident:
        return self._shelf.once(key, (), lambda: _held(key, self._maker.base(key))).value

    def _base_of(self, folder: StudentFolder) -> Resident:
        """A student's base, loaded if necessary after checking that it is the right one."""
        key = self._catalog.base_key(folder.manifest.base, folder.manifest.family)
        check_base(folder, self._catalog.reference(key.name).sha256)
        return self._base(key)

    def _base_in_memory(self, folder: StudentFolder) -> Resident | None:
        held = self._shelf.get(self._catalog.base_key(folder.manifest.base, folder.manifest.family), ())
        return held.value if held is not None else None

    def _make(self, wanted: Wanted) -> Held[Resident]:
        self._look_at_pinned()
        base = self._base(wanted.base) if wanted.folder is None else self._base_of(wanted.folder)
        needed = network_bytes(wanted.folder, base.raw_base)
        self._shelf.make_room(wanted.key, needed, wanted.key.label, [wanted.base])
        return _held(wanted.key, self._maker.derived(wanted, base), wanted.base)

    def _base_info(self, name: str) -> ModelInfo:
        return base_info(name, self._base(Key(name, self._listed[name])).raw_base)


def _replaceable(resident: Resident, wanted: Wanted) -> bool:
    """Whether an older version of a student does what was planned by the newer one's manifest."""
    old, new = resident.manifest, None if wanted.folder is None else wanted.folder.manifest
    if old is None or new is None:
        return old is new
    return all(getattr(old, name) == getattr(new, name) for name in PLANNED)


def _told(resident: Resident, wanted: Wanted) -> Resident:
    """The model as it was asked for: under its own name, or as a member of a routed student."""
    return resident if wanted.routed is None else replace(resident, manifest=wanted.routed, member=wanted.key.name)


def _held(key: Key, resident: Resident, needs: Key | None = None) -> Held[Resident]:
    models = tuple(dict.fromkeys((resident.model, resident.base, resident.raw_base)))
    return Held(label=key.label, value=resident, models=models, needs=needs)
