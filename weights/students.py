"""Loads students from their folders in the store."""

from dataclasses import dataclass
from pathlib import Path

import torch

from weights.bundled import bundled_bases, resolve_base
from weights.contracts import BaseReference, Router, StudentManifest
from weights.families.base import TextToImage
from weights.modules import storages, stored_numbers
from weights.router import route
from weights.store import Store, StudentFolder, digest_base


class WrongBase(ValueError):
    """The given base is not the one that the student was made from."""


class WrongMember(ValueError):
    """A member of a routed student does not match it."""


class NotALora(ValueError):
    """A student without LoRA adapters was to be merged into another model."""


class Routed(ValueError):
    """The weights of a student that has none of its own were requested."""


def base_reference(source: str) -> BaseReference:
    """How a manifest refers to a base: its id, and a digest over its weight files.

    The id of a folder is its absolute path, since students are used from other working directories.

    Raises:
        FileNotFoundError: there is no such base.
    """
    folder = resolve_base(source)
    here = source not in bundled_bases() and Path(source).is_dir()
    return BaseReference(id=str(folder) if here else source, sha256=digest_base(folder))


def check_base(folder: StudentFolder, digest: str) -> None:
    """Check that the base at hand is the student's own.

    Raises:
        WrongBase: ``digest`` is not that of the student's base, whose other components the student needs.
    """
    expected = folder.manifest.base
    if digest != expected.sha256:
        raise WrongBase(
            f"student {folder.manifest.name!r} was made from base {expected.id!r} with digest {expected.sha256[:12]}, but "
            f"this base has {digest[:12]}: use the base that it was made from, or distil the student again"
        )


def load_student(folder: StudentFolder, base: TextToImage) -> TextToImage:
    """The student, which shares with ``base`` every component that training did not change.

    LoRA adapters are merged in. Expects a folder verified by `Store.open`, and a base checked by `check_base`.

    Raises:
        WrongBase: the base is of another family.
        Routed: the student only routes to others: see `load_routed`.
    """
    router = folder.manifest.router
    if router is not None:
        raise Routed(
            f"student {folder.manifest.name!r} is a router, without weights of its own: name one of its students, "
            f"{', '.join(router.students)}"
        )
    if base.family != folder.manifest.family:
        raise WrongBase(
            f"student {folder.manifest.name!r} is of family {folder.manifest.family}, its base of {base.family}"
        )
    return base.load_network(folder.path)


def check_lora(folder: StudentFolder, base: BaseReference) -> None:
    """Check that a student's adapters can be merged into another model of that base.

    Raises:
        NotALora: the student is fully fine-tuned, or routed.
        WrongBase: it was made from another base.
    """
    manifest = folder.manifest
    if manifest.adapter != "lora" or manifest.router is not None:
        raise NotALora(f"student {manifest.name!r} is not a LoRA: full weights cannot be merged into another model")
    if manifest.base.sha256 != base.sha256:
        raise WrongBase(
            f"student {manifest.name!r} has adapters for base {manifest.base.id!r} with digest "
            f"{manifest.base.sha256[:12]}, not for {base.id!r} with {base.sha256[:12]}"
        )


def network_bytes(folder: StudentFolder | None, base: TextToImage) -> int:
    """Memory that a student will need in addition to its base, known before it is loaded.

    None stands for the base with adapters, which are merged into a copy of its network.
    """
    if folder is None or folder.manifest.adapter == "lora":
        return sum(storages([base.network]).values())
    files = [folder.path / path for path in folder.manifest.files if path.endswith(".safetensors")]
    return stored_numbers(files) * base.dtype.itemsize


def route_prompts(router: Router, base: TextToImage, prompts: list[str]) -> list[int]:
    """For each prompt, the index of the student that it is routed to."""
    offsets = None if router.offsets is None else torch.tensor(router.offsets)
    return route(base.embed_prompts(prompts).cpu(), torch.tensor(router.centroids), offsets).tolist()


def check_member(routed: StudentManifest, member: StudentManifest) -> None:
    """Check that a routed student can use this member, which may have been republished in the meantime.

    Raises:
        WrongMember: the member is routed itself, or differs in base, family, schedules or guidance.
    """
    if member.router is not None:
        raise WrongMember(
            f"{routed.name!r} routes to {member.name!r}, which is a router itself: name its students instead"
        )
    for field in ("family", "schedules", "guidance"):
        ours, theirs = getattr(routed, field), getattr(member, field)
        if ours != theirs:
            raise WrongMember(f"{routed.name!r} routes to {member.name!r}, whose {field} is {theirs}, not {ours}")
    if routed.base.sha256 != member.base.sha256:
        raise WrongMember(
            f"{routed.name!r} routes to {member.name!r}, which was made from base {member.base.id!r} with digest "
            f"{member.base.sha256[:12]} and not {routed.base.sha256[:12]}"
        )


@dataclass(frozen=True)
class RoutedStudent:
    """A router with all its students loaded, for generating from many prompts at a time."""

    router: Router
    base: TextToImage
    members: list[TextToImage]

    def split(self, prompts: list[str]) -> list[tuple[TextToImage, list[int]]]:
        """Pairs of a student and the indices of the prompts routed to it, without students that have none."""
        chosen = route_prompts(self.router, self.base, prompts)
        places = [[place for place, each in enumerate(chosen) if each == part] for part in range(len(self.members))]
        return [(member, own) for member, own in zip(self.members, places, strict=True) if own]


def load_routed(store: Store, folder: StudentFolder, base: TextToImage) -> RoutedStudent:
    """Load a routed student with all its members. Expects a base checked by `check_base`.

    Raises:
        StoreError: a member is missing, or its files are not as published.
        WrongMember: a member does not match the routed student.
    """
    router = folder.manifest.router
    assert router is not None, "callers ask for it"
    opened = [store.open(name) for name in router.students]
    for member in opened:
        check_member(folder.manifest, member.manifest)
    return RoutedStudent(router, base, [load_student(member, base) for member in opened])
