"""Loads models from the store and the disk into memory, whatever name they were asked for by."""

import logging
from dataclasses import dataclass

import torch

from service.engine.base import BadRequest
from service.engine.gate import Gate
from service.engine.resident import Key, Prepare, Resident, has_parameters_of, version_of
from weights.contracts import StudentManifest
from weights.families import TextToImage, load
from weights.store import StudentFolder
from weights.students import load_student

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A model to load: a base or a student, with or without LoRAs, as the store has them now."""

    key: Key
    base: Key
    """The base whose components it shares; its own key if it is a base."""
    folder: StudentFolder | None
    """The student's folder; None for a base."""
    adapters: tuple[StudentFolder, ...]
    """Folders of the LoRAs in the key."""
    routed: StudentManifest | None = None
    """Manifest of the routed student that selected this one."""

    @property
    def version(self) -> object:
        """Distinguishes it from other models published under the same name."""
        folders = self.adapters if self.folder is None else (self.folder, *self.adapters)
        return tuple(map(version_of, folders))


class Maker:
    """Loads models.

    Args:
        device: where models are loaded.
        dtype: precision of their weights.
        prepare: prepares a loaded model for use, given the prepared base if it is a student.
        gate: closed while a base is being loaded.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, prepare: Prepare | None, gate: Gate) -> None:
        self._device, self._dtype, self._prepare, self._gate = device, dtype, prepare, gate

    def base(self, key: Key) -> Resident:
        """Load the base of that name and family."""
        assert key.family is not None, "a base has one"
        log.info("loading base %r (%s) to %s as %s", key.name, key.family, self._device, self._dtype)
        # diffusers' and transformers' from_pretrained change torch's default dtype and the way modules create their
        # parameters, for all threads. This rarely happens while images are being generated, only for a student of a
        # base that no setting lists; and doing without from_pretrained would require knowing the classes and names of
        # all text encoders and autoencoders.
        with self._gate.closed():
            raw = load(key.family, key.name, self._device, self._dtype)
        model = self._prepared(raw, None)
        return Resident(model=model, base=model, raw_base=raw, manifest=None)

    def derived(self, wanted: Wanted, base: Resident) -> Resident:
        """Load a model that shares its base's components, with any LoRAs merged into a copy.

        Other threads can use models meanwhile.

        Raises:
            BadRequest: the LoRAs do not fit the student.
        """
        log.info("loading %r", wanted.key.label)
        raw = base.raw_base if wanted.folder is None else load_student(wanted.folder, base.raw_base)
        if wanted.adapters:
            if not has_parameters_of(raw, base.raw_base):
                message = (
                    f"loras: {wanted.key.name!r} has a network of its own shape, which its base's LoRAs do not fit"
                )
                raise BadRequest(message, "loras")
            scales = [scale for _, scale in wanted.key.loras]
            raw = raw.with_loras([(each.path, scale) for each, scale in zip(wanted.adapters, scales, strict=True)])
        return Resident(
            model=self._prepared(raw, base.model),
            base=base.model,
            raw_base=base.raw_base,
            manifest=None if wanted.folder is None else wanted.folder.manifest,
            loras=wanted.key.loras,
        )

    def _prepared(self, raw: TextToImage, base: TextToImage | None) -> TextToImage:
        return raw if self._prepare is None else self._prepare(raw, base)
