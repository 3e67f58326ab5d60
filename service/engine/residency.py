"""What is in memory: the bases, and the students used last. A student shares its base's text encoder and autoencoder.

Only the thread that draws loads; any thread may ask what there is.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

from service.engine.base import ModelBroken, ModelInfo, UnknownModel
from service.engine.plan import MAX_BASE_STEPS
from weights.contracts import BaseReference, Router, StudentManifest, check_name
from weights.families import TextToImage, load
from weights.store import NotFound, Store, StoreError, StudentFolder
from weights.students import WrongMember, base_reference, check_base, check_member, load_student, route_prompts

log = logging.getLogger(__name__)

Version = tuple[Path, datetime, tuple[tuple[str, str], ...]]
"""What tells a student from another that was published under the same name: folder, time, and the files' sha256."""


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A model in memory, ready to draw."""

    model: TextToImage
    base: TextToImage
    manifest: StudentManifest | None
    """None: the model is the base itself."""
    member: str | None = None
    """Which of a routed student's students this is; the manifest is then the routed one's."""


class Residency:
    """Bases and students by name, loaded when they are first asked for.

    Args:
        store: the students; it is asked again each time, so that a new student needs no restart.
        bases: bases that always stay in memory.
        family: their family.
        device: where everything is loaded to.
        dtype: what its weights are kept in.
        most: students to keep; the least recently used one goes, and with it a base that nobody uses any more.
    """

    def __init__(
        self, store: Store, bases: list[str], family: str, device: torch.device, dtype: torch.dtype, most: int
    ) -> None:
        self._store = store
        self._listed = dict.fromkeys(bases, family)
        self._device = device
        self._dtype = dtype
        self._most = most
        self._bases: dict[tuple[str, str], TextToImage] = {}
        self._students: OrderedDict[str, tuple[Version, Resident]] = OrderedDict()

    def load_bases(self) -> None:
        """Load the bases that always stay."""
        for name, family in self._listed.items():
            self._base(name, family)

    def get(self, name: str, prompt: str) -> Resident:
        """The model that draws this prompt under that name, loaded if need be.

        Raises:
            UnknownModel: nothing has that name.
            ModelBroken: its files, or its base's, cannot be loaded.
        """
        if name in self._listed:
            base = self._base(name, self._listed[name])
            return Resident(model=base, base=base, manifest=None)
        self._check_name(name)
        try:
            folder = self._store.open(name)
        except NotFound as error:
            raise self._unknown(name) from error
        except StoreError as error:
            raise broken(name) from error
        router = folder.manifest.router
        if router is not None:
            return self._member(folder, router, prompt)
        return self._student(folder)

    def _student(self, folder: StudentFolder) -> Resident:
        name, version = folder.manifest.name, _version(folder)
        known = self._students.get(name)
        if known is not None and known[0] == version:
            self._students.move_to_end(name)
            return known[1]
        resident = self._load(folder)
        self._students[name] = (version, resident)
        self._students.move_to_end(name)
        self._make_room()
        return resident

    def _member(self, folder: StudentFolder, router: Router, prompt: str) -> Resident:
        """The student that a routed one draws this prompt with: loaded and kept like any other, since it is one."""
        manifest = folder.manifest
        try:
            check_base(folder, base_reference(manifest.base.id).sha256)
            base = self._base(manifest.base.id, manifest.family)
        except Exception as error:  # whatever foreign files can make a loader raise
            raise broken(manifest.name) from error
        name = router.students[route_prompts(router, base, [prompt])[0]]
        try:
            member = self._store.open(name)
            check_member(manifest, member.manifest)
        except (StoreError, WrongMember) as error:
            raise broken(manifest.name) from error
        return replace(self._student(member), manifest=manifest, member=name)

    def info(self, name: str) -> ModelInfo | StudentManifest:
        """What is known of a model without loading it: a base's facts, or a student's manifest.

        Raises:
            UnknownModel: nothing has that name.
            ModelBroken: the student's manifest cannot be read.
        """
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
        """Everything that can be drawn with: the bases, then the students."""
        students = [manifest for manifest in self._store.list() if manifest.name not in self._listed]
        return [self._base_info(name) for name in self._listed] + [self._student_info(each) for each in students]

    def size_of(self, base: BaseReference, family: str) -> int | None:
        """Pixels of a side that this base draws; None while it is not in memory."""
        model = self._bases.get((family, base.id))
        return model.size if model else None

    def resident_students(self) -> list[str]:
        """Names of the students in memory, the least recently used first."""
        return list(self._students)

    def clear(self) -> None:
        """Forget everything."""
        self._students.clear()
        self._bases.clear()

    def _base(self, name: str, family: str) -> TextToImage:
        key = (family, name)
        if key not in self._bases:
            log.info("loading base %r (%s) to %s as %s", name, family, self._device, self._dtype)
            self._bases[key] = load(family, name, self._device, self._dtype)
        return self._bases[key]

    def _load(self, folder: StudentFolder) -> Resident:
        manifest = folder.manifest
        log.info("loading student %r (%s)", manifest.name, manifest.method)
        try:
            check_base(folder, base_reference(manifest.base.id).sha256)
            base = self._base(manifest.base.id, manifest.family)
            student = load_student(folder, base)
        except Exception as error:  # whatever foreign files can make a loader raise
            raise broken(manifest.name) from error
        return Resident(model=student, base=base, manifest=manifest)

    def _make_room(self) -> None:
        while len(self._students) > self._most:
            name, _ = self._students.popitem(last=False)
            log.info("student %r leaves memory", name)
        used = {(family, name) for name, family in self._listed.items()}
        for _, resident in self._students.values():
            if resident.manifest is not None:
                used.add((resident.manifest.family, resident.manifest.base.id))
        for key in self._bases.keys() - used:
            log.info("base %r leaves memory", key[1])
            del self._bases[key]

    def _base_info(self, name: str) -> ModelInfo:
        family = self._listed[name]
        base = self._bases[(family, name)]
        return ModelInfo(
            id=name,
            kind="base",
            family=family,
            created=0,
            steps=(),
            max_steps=MAX_BASE_STEPS,
            default_steps=base.default_steps,
            default_guidance=base.default_guidance,
            size=base.size,
            licence=base.licence,
        )

    def _student_info(self, manifest: StudentManifest) -> ModelInfo:
        return ModelInfo(
            id=manifest.name,
            kind="student",
            family=manifest.family,
            created=int(manifest.created_at.timestamp()),
            steps=tuple(sorted(manifest.schedules)),
            max_steps=max(manifest.schedules),
            default_steps=max(manifest.schedules),
            default_guidance=manifest.guidance.default_scale,
            size=self.size_of(manifest.base, manifest.family),
            base=manifest.base.id,
            method=manifest.method,
            diversity=manifest.diversity,
            students=tuple(manifest.router.students) if manifest.router is not None else (),
            licence=manifest.licence,
            metrics=manifest.metrics,
        )

    def _check_name(self, name: str) -> None:
        try:
            check_name(name)
        except ValueError as error:
            raise self._unknown(name) from error

    def _unknown(self, name: str) -> UnknownModel:
        known = ", ".join([*self._listed, *self._store.names()])
        shown = name if len(name) <= 80 else name[:77] + "..."
        return UnknownModel(f"no model is named {shown!r}; there are: {known}")


def broken(name: str) -> ModelBroken:
    """The error for a model whose files cannot be loaded; raise it from the cause, which is for the log alone."""
    return ModelBroken(f"model {name!r} cannot be loaded; the server's log says why")


def _version(folder: StudentFolder) -> Version:
    files = tuple(sorted((path, record.sha256) for path, record in folder.manifest.files.items()))
    return folder.path, folder.manifest.created_at, files
