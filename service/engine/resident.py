"""A model in memory as the engine gets it, and what tells it from others there."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from weights.contracts import StudentManifest
from weights.families import TextToImage
from weights.store import StudentFolder

Loras = tuple[tuple[str, float], ...]
"""LoRA students by name, and the scale to merge each at."""
Prepare = Callable[[TextToImage, TextToImage | None], TextToImage]
"""A backend's: see `service.engine.backends.base.Backend.prepare`."""
Version = tuple[Path, datetime, tuple[tuple[str, str], ...]]
"""What tells a student from another that was published under the same name: folder, time, and the files' sha256."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Resident:
    """A model in memory, ready to draw."""

    model: TextToImage
    base: TextToImage
    """Whose text encoder and decoder it shares."""
    raw_base: TextToImage
    """The base as its family loaded it, before a backend: what students are loaded from."""
    manifest: StudentManifest | None
    """None: the model is the base itself."""
    member: str | None = None
    """Which of a routed student's students this is; the manifest is then the routed one's."""
    loras: Loras = ()
    """What was merged into it."""


class Key(NamedTuple):
    """What a model lies in memory under."""

    name: str
    family: str | None
    """A base's; None where a student's weights, or adapters, were put into one."""
    loras: Loras = ()

    @property
    def label(self) -> str:
        """For people: ``MODEL+LORA:SCALE``."""
        return "".join([self.name, *(f"+{name}:{scale:g}" for name, scale in self.loras)])


def version_of(folder: StudentFolder) -> Version:
    """Of a verified student."""
    files = tuple(sorted((path, record.sha256) for path, record in folder.manifest.files.items()))
    return folder.path, folder.manifest.created_at, files


def has_parameters_of(model: TextToImage, base: TextToImage) -> bool:
    """Whether adapters for the base's network fit the model's: every parameter is there, in its shape."""
    own, wanted = ({n: p.shape for n, p in m.network.named_parameters()} for m in (model, base))
    return wanted.items() <= own.items()
