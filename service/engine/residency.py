"""What can be drawn with, by name, and what of it is in memory. A student shares its base's text encoder and autoencoder.

Any thread may ask and load, and two that ask for the same model load it once. A model that was handed out stays valid for
whoever holds it, also when it leaves memory or another one is published under its name.
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


@dataclass(frozen=True, kw_only=True)
class Found:
    """What `Residency.find` has found."""

    wants: Hashable
    """Equal for requests that wait for the same model."""
    resident: Resident | None
    """None: the model is to be loaded first."""


class Residency:
    """Bases and students by name, loaded when they are first asked for.

    Args:
        store: the students; it is asked again and again, so that a new student needs no restart.
        bases: bases that always stay in memory.
        family: their family.
        device: where everything is loaded to.
        dtype: what its weights are kept in.
        budget: bytes for all models; the least recently used one goes, but for the bases and what is pinned.
        pinned: students that are loaded with the bases, and stay as they do.
        aliases: other names, each for a base or a student.
        prepare: turns what was loaded into what draws, given the prepared base of a student.
        gate: closed while a base is loaded.
        recent: what is known of the store without asking it; None asks it each time.
    """

    def __init__(
        self,
        store: Store,
        bases: list[str],
        family: str,
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
        self._listed = dict.fromkeys(bases, family)
        self._maker = Maker(device, dtype, prepare, gate if gate is not None else Gate())
        self._aliases = dict(aliases or {})
        self._catalog = Catalog(store, self._listed, self._aliases)
        self._pinned = set(map(self._catalog.own_name, pinned))
        self._kept = frozenset[str]()
        """The students that these draw with, as the store last had them."""
        self._shelf: Shelf[Resident] = Shelf(budget, self._stays)

    def load_bases(self) -> None:
        """Load what always stays: the bases, and the pinned students; one of these that is broken is logged.

        Raises:
            TooLarge: they are more than the budget.
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
                log.exception("pinned model %r cannot be loaded; the others can be asked for", name)

    def pin(self, name: str) -> None:
        """Let this student stay from now on, once it is loaded."""
        self._pinned.add(self._catalog.own_name(name))
        self._look_at_pinned()

    def get(self, name: str, prompt: str, loras: Loras = ()) -> Resident:
        """The model that draws this prompt under that name, loaded if need be.

        Args:
            name: a base, a student, or an alias.
            prompt: what a routed student picks one of its students by.
            loras: LoRA students of the same base to merge into a copy of the model.

        Raises:
            UnknownModel: nothing has that name.
            ModelBroken: its files, or its base's, cannot be loaded; or (`TooLarge`) it does not fit into memory.
            BadRequest: one of the LoRAs does not exist, is none, or is of another base.
        """
        wanted = self._catalog.wanted(name, prompt, loras, self._open_student, self._base_of)
        assert wanted is not None, "its base is loaded now"
        if wanted.key == wanted.base:
            return self._base(wanted.key)
        try:
            held = self._shelf.once(wanted.key, wanted.version, lambda: self._make(wanted))
        except EngineError:
            raise
        except Exception as error:  # whatever foreign files can make a loader raise
            raise broken(wanted.key.name) from error
        return _told(held.value, wanted)

    def find(self, name: str, prompt: str, loras: Loras = ()) -> Found:
        """The model that `get` would give if it is in memory; nothing is read from the disk. What is found stays valid.

        Raises:
            UnknownModel, ModelBroken, BadRequest: as `get`, as far as manifests tell.
        """
        known = self._find_student if self._recent is None else self._recent.last
        try:
            wanted = self._catalog.wanted(name, prompt, loras, known, self._base_in_memory)
        except Unseen:
            wanted = None
        # What has not been seen may be in memory all the same: then it takes no time to load. And which student a routed one
        # draws this prompt with cannot be told before its base is there.
        if wanted is None:
            return Found(wants=(name, loras, prompt), resident=None)
        held = self._shelf.get(wanted.key, wanted.version)
        return Found(wants=(name, wanted.key), resident=_told(held.value, wanted) if held is not None else None)

    def check_loras(self, name: str, loras: Loras) -> None:
        """Refuse LoRAs that `get` would refuse, as far as manifests tell: see `Catalog.check_loras`."""
        self._catalog.check_loras(name, loras, self._find_student)

    def info(self, name: str) -> ModelInfo | StudentManifest:
        """What is known of a model without loading it: a base's facts, or a student's manifest.

        Raises:
            UnknownModel: nothing has that name.
            ModelBroken: the student's manifest cannot be read.
        """
        name = self._catalog.own_name(name)
        if name in self._listed:
            return self._base_info(name)
        manifest = self._catalog.folder(name, self._find_student).manifest
        for member in manifest.router.students if manifest.router is not None else []:
            with contextlib.suppress(StoreError):  # only whoever draws with it needs it; now `find` knows it
                self._find_student(member)
        return manifest

    def at_hand(self, name: str) -> bool:
        """Whether `info` would tell of this model without asking the disk, nor loading anything."""
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
        """Everything that can be drawn with: the bases, then the students, then the aliases of either."""
        taken = self._listed.keys() | self._aliases.keys()
        students = [manifest for manifest in self._store.list() if manifest.name not in taken]
        infos = [self._base_info(name) for name in self._listed] + [
            student_info(each, self.size_of(each.base, each.family)) for each in students
        ]
        by_name = {info.id: info for info in infos}
        aliases = [(alias, by_name[name]) for alias, name in self._aliases.items() if name in by_name]
        return infos + [replace(info, id=alias, alias_of=info.id) for alias, info in aliases]

    def size_of(self, base: BaseReference, family: str) -> int | None:
        """Pixels of a side that this base draws; None while it is not in memory."""
        held = self._shelf.get(self._catalog.base_key(base, family), ())
        return held.value.base.size if held else None

    def base_name(self, student: StudentManifest) -> str:
        """What its base is listed as here, or was called at training."""
        return self._catalog.base_key(student.base, student.family).name

    def bytes_by_model(self) -> dict[str, int]:
        """Memory of every model: the bases, then the others, the least recently used first.

        What a student shares with its base is counted with the base alone. A model with LoRAs is named
        ``MODEL+LORA:SCALE``.
        """
        return self._shelf.bytes_by_label()

    def clear(self) -> None:
        """Forget everything."""
        self._shelf.clear()

    def _stays(self, key: Key) -> bool:
        if key.family is not None:
            return key.family == self._listed.get(key.name)
        return not key.loras and key.name in self._kept

    def _look_at_pinned(self) -> None:
        """Not when it is asked what stays: others wait for the shelf then, and the store may take its time."""
        self._kept = frozenset(member for name in self._pinned for member in self._members(name))

    def _members(self, name: str) -> list[str]:
        """The students that draw under this name: itself, or a routed one's."""
        try:
            router = self._store.manifest(name).router
        except StoreError:
            return [name]
        return [name] if router is None else list(router.students)

    def _base(self, key: Key) -> Resident:
        return self._shelf.once(key, (), lambda: _held(key, self._maker.base(key))).value

    def _base_of(self, folder: StudentFolder) -> Resident:
        """A student's base, loaded if need be, once it is known to be the right one."""
        key = self._catalog.base_key(folder.manifest.base, folder.manifest.family)
        check_base(folder, self._catalog.reference(key.name).sha256)
        return self._base(key)

    def _base_in_memory(self, folder: StudentFolder) -> Resident | None:
        held = self._shelf.get(self._catalog.base_key(folder.manifest.base, folder.manifest.family), ())
        return held.value if held is not None else None

    def _make(self, wanted: Wanted) -> Held[Resident]:
        self._look_at_pinned()
        if wanted.folder is None:
            base = self._base(wanted.base)
        else:
            base = self._base_of(wanted.folder)
            needed = network_bytes(wanted.folder, base.raw_base)
            self._shelf.make_room(wanted.key, needed, wanted.key.label, [wanted.base])
        return _held(wanted.key, self._maker.derived(wanted, base), wanted.base)

    def _base_info(self, name: str) -> ModelInfo:
        return base_info(name, self._base(Key(name, self._listed[name])).raw_base)


def _told(resident: Resident, wanted: Wanted) -> Resident:
    """As it was asked for: under its own name, or a routed student's."""
    return resident if wanted.routed is None else replace(resident, manifest=wanted.routed, member=wanted.key.name)


def _held(key: Key, resident: Resident, needs: Key | None = None) -> Held[Resident]:
    models = tuple(dict.fromkeys((resident.model, resident.base, resident.raw_base)))
    return Held(label=key.label, value=resident, models=models, needs=needs)
