"""From what the store and the disk hold to models in memory: the loading itself, whoever asked for it by whatever name."""

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
    """A student, or its base itself, with LoRAs or without, as the store has them now."""

    key: Key
    base: Key
    """Whose components it shares; its own where it is a base."""
    folder: StudentFolder | None
    """The student's; None for a base."""
    adapters: tuple[StudentFolder, ...]
    """Of the key's LoRAs."""
    routed: StudentManifest | None = None
    """Of the routed student that draws with this one."""

    @property
    def version(self) -> object:
        """What tells it from others that were published under its name."""
        folders = self.adapters if self.folder is None else (self.folder, *self.adapters)
        return tuple(map(version_of, folders))


class Maker:
    """Loads models.

    Args:
        device: where everything is loaded to.
        dtype: what its weights are kept in.
        prepare: turns what was loaded into what draws, given the prepared base of a student.
        gate: closed while a base is loaded.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, prepare: Prepare | None, gate: Gate) -> None:
        self._device, self._dtype, self._prepare, self._gate = device, dtype, prepare, gate

    def base(self, key: Key) -> Resident:
        """The base of that name and family."""
        assert key.family is not None, "a base has one"
        log.info("loading base %r (%s) to %s as %s", key.name, key.family, self._device, self._dtype)
        # diffusers' and transformers' from_pretrained change torch's default dtype and the way modules make their parameters
        # in all threads. It is rare that one comes while pictures are drawn, for a student of a base that no setting lists;
        # and to do without them would be to know every text encoder's and autoencoder's classes and names.
        with self._gate.closed():
            raw = load(key.family, key.name, self._device, self._dtype)
        model = self._prepared(raw, None)
        return Resident(model=model, base=model, raw_base=raw, manifest=None)

    def derived(self, wanted: Wanted, base: Resident) -> Resident:
        """What is wanted beside its base, with the LoRAs merged into a copy. Threads that draw need not wait.

        Raises:
            BadRequest: the LoRAs do not fit the student.
        """
        log.info("loading %r", wanted.key.label)
        raw = base.raw_base if wanted.folder is None else load_student(wanted.folder, base.raw_base)
        if wanted.adapters:
            if not has_parameters_of(raw, base.raw_base):
                message = (
                    f"loras: {wanted.key.name!r} has a network of its own shape, which no adapters of its base fit"
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
