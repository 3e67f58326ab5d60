"""What names stand for: bases, students and aliases, as the settings and the store define them now."""

from collections.abc import Callable, Mapping

from service.engine.base import BadRequest, EngineError, UnknownModel
from service.engine.making import Wanted
from service.engine.names import broken, shown
from service.engine.recent import Unseen
from service.engine.resident import Key, Loras, Resident
from weights.contracts import BaseReference, check_name
from weights.store import NotFound, Store, StoreError, StudentFolder
from weights.students import (
    NotALora,
    WrongBase,
    base_reference,
    check_lora,
    check_member,
    route_prompts,
)

Open = Callable[[str], StudentFolder]
"""Opens a student by name: `Store.open` (verified), `Store.find`, or `Recent.last`, which may also raise `Unseen`."""
BaseOf = Callable[[StudentFolder], Resident | None]
"""Gives a student's base, to embed prompts with; None if it is not in memory and must not be loaded."""


class Catalog:
    """Looks up models by name. Thread-safe.

    Args:
        store: the students; it is read on every call.
        listed: the bases of the settings, each with its family.
        aliases: the base or student that each alias stands for.
    """

    def __init__(self, store: Store, listed: Mapping[str, str], aliases: Mapping[str, str]) -> None:
        self._store, self._listed, self._aliases = store, listed, aliases
        self._references: dict[str, BaseReference] = {}

    def identify(self, base: str) -> None:
        """Record which weights a listed base has, before its first student is asked for.

        Raises:
            FileNotFoundError: there is no such base.
        """
        self._references[base] = base_reference(base)

    def base_key(self, base: BaseReference, family: str) -> Key:
        """The key of a student's base in memory: a listed base with these weights, whatever its name at training."""
        for name, known in self._references.items():
            if known.sha256 == base.sha256 and self._listed[name] == family:
                return Key(name, family)
        return Key(base.id, family)

    def reference(self, base: str) -> BaseReference:
        """How manifests refer to this base.

        Raises:
            FileNotFoundError: there is no such base.
        """
        known = self._references.get(base)
        return base_reference(base) if known is None else known

    def own_name(self, name: str) -> str:
        """The name that an alias stands for; any other name as it is."""
        return self._aliases.get(name, name)

    def wanted(
        self,
        name: str,
        prompt: str,
        loras: Loras,
        open_student: Open,
        base_of: BaseOf,
    ) -> Wanted | None:
        """The model that generates images of this prompt under that name.

        None if this depends on the base, and ``base_of`` returns none.

        Raises:
            UnknownModel: no model has that name.
            ModelBroken: it has no base, or its files are not those that were published, as far as ``open_student``
                checks.
            BadRequest: one of the LoRAs does not exist, is not a LoRA, or belongs to another base.
        """
        name = self.own_name(name)
        loras = tuple(sorted((self.own_name(lora), scale) for lora, scale in loras))
        if name in self._listed:
            base = Key(name, self._listed[name])
            if not loras:
                return Wanted(key=base, base=base, folder=None, adapters=())
            adapters = self._adapters(self._of_listed(name), loras, open_student)
            return Wanted(key=Key(name, None, loras), base=base, folder=None, adapters=adapters)
        folder, routed = self.folder(name, open_student), None
        if folder.manifest.router is not None:
            routed = folder.manifest
            member = self._member(folder, prompt, open_student, base_of)
            if member is None:
                return None
            folder = member
        manifest = folder.manifest
        return Wanted(
            key=Key(manifest.name, None, loras),
            base=self.base_key(manifest.base, manifest.family),
            folder=folder,
            adapters=self._adapters(manifest.base, loras, open_student),
            routed=routed,
        )

    def check_loras(self, name: str, loras: Loras, open_student: Open) -> None:
        """Refuse LoRAs that cannot be merged into this model, without loading anything.

        Raises:
            UnknownModel: no model has that name.
            ModelBroken: the model's or a LoRA's files have changed since publishing, as far as ``open_student`` checks.
            BadRequest: see `wanted`.
        """
        if not loras:
            return
        name = self.own_name(name)
        base = self._of_listed(name) if name in self._listed else self.folder(name, open_student).manifest.base
        self._adapters(base, loras, open_student)

    def folder(self, name: str, open_student: Open) -> StudentFolder:
        """The student of that name.

        Raises:
            UnknownModel, ModelBroken: see `wanted`.
        """
        try:
            check_name(name)
        except ValueError as error:
            raise self._unknown(name) from error
        try:
            return open_student(name)
        except NotFound as error:
            raise self._unknown(name) from error
        except StoreError as error:
            raise broken(name) from error

    def _of_listed(self, name: str) -> BaseReference:
        """A listed base's reference. Raises ModelBroken if the base is missing."""
        try:
            return self.reference(name)
        except FileNotFoundError as error:
            raise broken(name) from error

    def _unknown(self, name: str) -> UnknownModel:
        known = ", ".join([*self._listed, *self._store.names(), *self._aliases])
        return UnknownModel(f"no model is named {shown(name)}; available: {known}")

    def _member(self, folder: StudentFolder, prompt: str, open_student: Open, base_of: BaseOf) -> StudentFolder | None:
        """The member of a routed student that handles this prompt; None if its base is not in memory."""
        manifest = folder.manifest
        assert manifest.router is not None, "callers ask for it"
        try:
            base = base_of(folder)
            if base is None:
                return None
            member = open_student(manifest.router.students[route_prompts(manifest.router, base.raw_base, [prompt])[0]])
            check_member(manifest, member.manifest)
        except (EngineError, Unseen):
            raise
        except Exception as error:  # foreign files can make a loader raise anything
            raise broken(manifest.name) from error
        return member

    def _adapters(self, base: BaseReference, loras: Loras, open_student: Open) -> tuple[StudentFolder, ...]:
        """The folders of these LoRAs, after checking that they are LoRAs of this base."""
        adapters = []
        for given, _ in loras:
            name = self.own_name(given)
            try:
                check_name(name)
                folder = open_student(name)
                check_lora(folder, base)
            except (NotALora, WrongBase) as error:
                raise BadRequest(f"loras: {error}", "loras") from error
            except (ValueError, NotFound) as error:
                raise BadRequest(f"loras: no student is named {shown(name)}", "loras") from error
            except StoreError as error:
                raise broken(name) from error
            adapters.append(folder)
        return tuple(adapters)
