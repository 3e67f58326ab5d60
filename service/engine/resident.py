"""A model in memory as the engine uses it, and what identifies it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from weights.contracts import StudentManifest
from weights.families import TextToImage
from weights.store import StudentFolder

Loras = tuple[tuple[str, float], ...]
"""LoRA students by name, each with the scale at which it is merged."""
Prepare = Callable[[TextToImage, TextToImage | None], TextToImage]
"""Prepares a model for use: see `service.engine.backends.base.Backend.prepare`."""
Version = tuple[Path, datetime, tuple[tuple[str, str], ...]]
"""Distinguishes students published under the same name: the folder, the time, and the sha256 of the files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Resident:
    """A model in memory, ready for use."""

    model: TextToImage
    base: TextToImage
    """The base whose text encoder and decoder it shares."""
    raw_base: TextToImage
    """The base as its family loaded it, without the backend's changes: students are loaded from it."""
    manifest: StudentManifest | None
    """None if the model is the base itself."""
    member: str | None = None
    """Which member of a routed student this is; the manifest is then the routed student's."""
    loras: Loras = ()
    """The LoRAs merged into it."""


class Key(NamedTuple):
    """Identifies a model in memory."""

    name: str
    family: str | None
    """Family of a base; None if a student's weights or LoRAs have been applied to one."""
    loras: Loras = ()

    @property
    def label(self) -> str:
        """Name for messages: ``MODEL+LORA:SCALE``."""
        return "".join([self.name, *(f"+{name}:{scale:g}" for name, scale in self.loras)])


def version_of(folder: StudentFolder) -> Version:
    """The version of a student's folder."""
    files = tuple(sorted((path, record.sha256) for path, record in folder.manifest.files.items()))
    return folder.path, folder.manifest.created_at, files


def has_parameters_of(model: TextToImage, base: TextToImage) -> bool:
    """Whether adapters for the base's network fit the model's: it has all the parameters, in the same shapes."""
    own, wanted = ({n: p.shape for n, p in m.network.named_parameters()} for m in (model, base))
    return wanted.items() <= own.items()
