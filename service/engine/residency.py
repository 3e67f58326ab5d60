"""What can be drawn with, by name, and what of it is in memory. A student shares its base's text encoder and autoencoder.

Any thread may ask and load, and two that ask for the same model load it once. A model that was handed out stays valid for
whoever holds it, also when it leaves memory or another one is published under its name.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from service.engine.base import BadRequest, EngineError, ModelInfo, UnknownModel
from service.engine.memory import Held, Shelf, TooLarge
from service.engine.names import base_info, broken, shown, student_info
from service.engine.resident import Key, Loras, Prepare, Resident, has_parameters_of, version_of
from weights.contracts import BaseReference, Router, StudentManifest, check_name
from weights.families import TextToImage, load
from weights.store import NotFound, Store, StoreError, StudentFolder
from weights.students import (
    NotALora,
    WrongBase,
    base_reference,
    check_base,
    check_lora,
    check_member,
    load_student,
    network_bytes,
    route_prompts,
)

__all__ = ["Residency", "Resident"]

log = logging.getLogger(__name__)


class Residency:
    """Bases and students by name, loaded when they are first asked for.

    Args:
        store: the students; it is asked again each time, so that a new student needs no restart.
        bases: bases that always stay in memory.
        family: their family.
        device: where everything is loaded to.
        dtype: what its weights are kept in.
        budget: bytes for all models; the least recently used one goes, but for the bases and what is pinned.
        pinned: students that are loaded with the bases, and stay as they do.
        aliases: other names, each for a base or a student.
        prepare: turns what was loaded into what draws, given the prepared base of a student.
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
    ) -> None:
        self._store = store
        self._listed = dict.fromkeys(bases, family)
        self._device = device
        self._dtype = dtype
        self._aliases = dict(aliases or {})
        self._pinned = {self._aliases.get(name, name) for name in pinned}
        self._prepare = prepare
        self._shelf: Shelf[Resident] = Shelf(budget, self._stays)

    def load_bases(self) -> None:
        """Load what always stays: the bases, and the pinned students; one of these that is broken is logged.

        Raises:
            TooLarge: they are more than the budget.
        """
        for name, family in self._listed.items():
            self._base(name, family)
        for name in sorted(self._pinned - self._listed.keys()):
            try:
                for member in self._members(name):
                    self._student(self._store.open(member))
            except TooLarge:
                raise
            except (EngineError, StoreError):
                log.exception("pinned model %r cannot be loaded; the others can be asked for", name)

    def pin(self, name: str) -> None:
        """Let this student stay from now on, once it is loaded."""
        self._pinned.add(self._aliases.get(name, name))

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
        name = self._aliases.get(name, name)
        loras = tuple(sorted((self._aliases.get(lora, lora), scale) for lora, scale in loras))
        if name in self._listed:
            family = self._listed[name]
            return self._merged_base(name, family, loras) if loras else self._base(name, family)
        folder = self._open(name)
        if folder.manifest.router is not None:
            return self._member(folder, folder.manifest.router, prompt, loras)
        return self._student(folder, loras)

    def check_loras(self, name: str, loras: Loras) -> None:
        """Refuse LoRAs that `get` would refuse, without loading anything.

        Raises:
            UnknownModel: nothing has that name.
            ModelBroken: the model's or a LoRA's files are not what was published.
            BadRequest: as in `get`.
        """
        if not loras:
            return
        name = self._aliases.get(name, name)
        try:
            base = base_reference(name) if name in self._listed else self._open(name).manifest.base
        except FileNotFoundError as error:
            raise broken(name) from error
        self._adapters(base, loras)

    def info(self, name: str) -> ModelInfo | StudentManifest:
        """What is known of a model without loading it: a base's facts, or a student's manifest.

        Raises:
            UnknownModel: nothing has that name.
            ModelBroken: the student's manifest cannot be read.
        """
        name = self._aliases.get(name, name)
        if name in self._listed:
            return self._base_info(name)
        self._check_name(name)
        try:
            return self._store.manifest(name)
        except NotFound as error:
            raise self._unknown(name) from error
        except StoreError as error:
            raise broken(name) from error

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
        held = self._shelf.get(Key(base.id, family))
        return held.value.base.size if held else None

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
        return not key.loras and any(key.name in self._members(name) for name in self._pinned)

    def _members(self, name: str) -> list[str]:
        """The students that draw under this name: itself, or a routed one's."""
        try:
            router = self._store.manifest(name).router
        except StoreError:
            return [name]
        return [name] if router is None else list(router.students)

    def _base(self, name: str, family: str) -> Resident:
        def make() -> Held[Resident]:
            log.info("loading base %r (%s) to %s as %s", name, family, self._device, self._dtype)
            raw = load(family, name, self._device, self._dtype)
            model = self._prepared(raw, None)
            return _held(key, Resident(model=model, base=model, raw_base=raw, manifest=None))

        key = Key(name, family)
        return self._shelf.once(key, None, make).value

    def _student(self, folder: StudentFolder, loras: Loras = ()) -> Resident:
        manifest = folder.manifest
        adapters = self._adapters(manifest.base, loras)

        def make() -> Held[Resident]:
            log.info("loading student %r (%s)", manifest.name, manifest.method)
            check_base(folder, base_reference(manifest.base.id).sha256)
            base = self._base(manifest.base.id, manifest.family)
            needs = Key(manifest.base.id, manifest.family)
            self._shelf.make_room(key, network_bytes(folder, base.raw_base), key.label, [needs])
            raw = load_student(folder, base.raw_base)
            return _held(key, self._derived(raw, base, manifest, key, adapters), needs)

        key = Key(manifest.name, None, loras)
        return self._load(key, (version_of(folder), *map(version_of, adapters)), make)

    def _merged_base(self, name: str, family: str, loras: Loras) -> Resident:
        try:
            adapters = self._adapters(base_reference(name), loras)
        except FileNotFoundError as error:
            raise broken(name) from error

        def make() -> Held[Resident]:
            log.info("merging %s", key.label)
            base = self._base(name, family)
            return _held(key, self._derived(base.raw_base, base, None, key, adapters), Key(name, family))

        key = Key(name, None, loras)
        return self._load(key, tuple(map(version_of, adapters)), make)

    def _load(self, key: Key, version: object, make: Callable[[], Held[Resident]]) -> Resident:
        try:
            return self._shelf.once(key, version, make).value
        except EngineError:
            raise
        except Exception as error:  # whatever foreign files can make a loader raise
            raise broken(key.name) from error

    def _derived(
        self,
        raw: TextToImage,
        base: Resident,
        manifest: StudentManifest | None,
        key: Key,
        adapters: Sequence[StudentFolder],
    ) -> Resident:
        """A student, or its base itself, with the key's LoRAs merged into a copy, and prepared."""
        if adapters:
            if not has_parameters_of(raw, base.raw_base):
                message = f"loras: {key.name!r} has a network of its own shape, which no adapters of its base fit"
                raise BadRequest(message, "loras")
            scales = [scale for _, scale in key.loras]
            raw = raw.with_loras([(each.path, scale) for each, scale in zip(adapters, scales, strict=True)])
        model = self._prepared(raw, base.model)
        return Resident(model=model, base=base.model, raw_base=base.raw_base, manifest=manifest, loras=key.loras)

    def _prepared(self, raw: TextToImage, base: TextToImage | None) -> TextToImage:
        return raw if self._prepare is None else self._prepare(raw, base)

    def _member(self, folder: StudentFolder, router: Router, prompt: str, loras: Loras) -> Resident:
        """The student that a routed one draws this prompt with: loaded and kept like any other, since it is one."""
        manifest = folder.manifest
        try:
            check_base(folder, base_reference(manifest.base.id).sha256)
            base = self._base(manifest.base.id, manifest.family)
            name = router.students[route_prompts(router, base.raw_base, [prompt])[0]]
            member = self._store.open(name)
            check_member(manifest, member.manifest)
        except EngineError:
            raise
        except Exception as error:  # whatever foreign files can make a loader raise
            raise broken(manifest.name) from error
        return replace(self._student(member, loras), manifest=manifest, member=name)

    def _adapters(self, base: BaseReference, loras: Loras) -> list[StudentFolder]:
        """The folders of these LoRAs, if they are such and for this base."""
        adapters = []
        for given, _ in loras:
            name = self._aliases.get(given, given)
            try:
                check_name(name)
                folder = self._store.open(name)
                check_lora(folder, base)
            except (NotALora, WrongBase) as error:
                raise BadRequest(f"loras: {error}", "loras") from error
            except (ValueError, NotFound) as error:
                raise BadRequest(f"loras: no student is named {shown(name)}", "loras") from error
            except StoreError as error:
                raise broken(name) from error
            adapters.append(folder)
        return adapters

    def _base_info(self, name: str) -> ModelInfo:
        return base_info(name, self._base(name, self._listed[name]).raw_base)

    def _open(self, name: str) -> StudentFolder:
        self._check_name(name)
        try:
            return self._store.open(name)
        except NotFound as error:
            raise self._unknown(name) from error
        except StoreError as error:
            raise broken(name) from error

    def _check_name(self, name: str) -> None:
        try:
            check_name(name)
        except ValueError as error:
            raise self._unknown(name) from error

    def _unknown(self, name: str) -> UnknownModel:
        known = ", ".join([*self._listed, *self._store.names(), *self._aliases])
        return UnknownModel(f"no model is named {shown(name)}; there are: {known}")


def _held(key: Key, resident: Resident, needs: Key | None = None) -> Held[Resident]:
    models = tuple(dict.fromkeys((resident.model, resident.base, resident.raw_base)))
    return Held(label=key.label, value=resident, models=models, needs=needs)
