"""What a resumed run must have in common with its checkpoint, and how it differs if it does not.

A checkpoint holds the settings themselves, so that a mismatch can be named, and a setting that the code has learnt since
does not end every job that was running: at its default, it is as if it did not exist.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillers.checkpoint import checkpoints_in, load_checkpoint
from distillers.methods.base import MethodConfig
from distillers.spec import LIBERTIES, fingerprint
from weights.contracts import DistillJob

Settings = dict[str, Any]
PRECISION = "train.precision"
SHOWN = 5
"""Most differences that a message names."""


@dataclass(frozen=True)
class Identity:
    """Settings of a job by dotted name, with the digests of the weights that teach."""

    settings: Settings
    defaults: frozenset[str]
    """Names of the settings that have their default value."""
    fingerprint: str
    """A digest of the same, which is all that early checkpoints of version 0.1.0 have."""

    def differences(self, state: dict[str, Any]) -> list[str]:
        """What differs in a checkpoint's state, each as ``name (there -> here)``; empty if it belongs to this job."""
        there: Settings | None = state.get("settings")
        if there is None:
            return [] if state["fingerprint"] == self.fingerprint else ["the base, the guide or a setting"]
        if there.get(PRECISION) == "auto":  # early checkpoints of version 0.1.0 do not say what that was
            there = {name: value for name, value in there.items() if name != PRECISION}
        names = [name for name in there if name not in self.settings or there[name] != self.settings[name]]
        new = [name for name in self.settings if name not in there and name not in self.defaults]
        found = [f"{name} ({_of(there, name)} -> {_of(self.settings, name)})" for name in names + new]
        return [*found[:SHOWN], *([f"{len(found) - SHOWN} more"] if len(found) > SHOWN else [])]


def identity_of(job: DistillJob, config: MethodConfig, *digests: str, precision: str) -> Identity:
    """The identity of a job.

    Args:
        job: its settings count, except for those that only affect the duration or the reporting.
        config: its method's settings.
        digests: of the weights that teach: the base's and, if there is a guide, the guide's.
        precision: what the job computes in, which counts in place of an "auto".
    """
    settings = _flat({**job.model_dump(mode="json", exclude=LIBERTIES), "config": config.model_dump(mode="json")})
    changed = job.model_dump(mode="json", exclude=LIBERTIES, exclude_defaults=True)
    given = _flat({**changed, "config": config.model_dump(mode="json", exclude_defaults=True)})
    teachers = {f"{name}'s weights": digest for name, digest in zip(("base", "guide"), digests, strict=False)}
    settings |= {PRECISION: precision, **teachers}
    return Identity(settings, frozenset(settings.keys() - given.keys()), fingerprint(job, *digests))


def began_in(folders: Iterable[Path]) -> str | None:
    """The precision in which a job's newest checkpoint was computed; None if there is none that says.

    Args:
        folders: the job's, and those of the jobs that are to compute as it does.
    """
    for folder in folders:
        for path in checkpoints_in(folder)[-1:]:
            try:
                settings = load_checkpoint(path, with_tensors=False)[1].get("settings", {})
            except ValueError:  # whoever continues from it says so
                continue
            if settings.get(PRECISION, "auto") != "auto":
                return str(settings[PRECISION])
    return None


def _flat(nested: dict[str, Any], prefix: str = "") -> Settings:
    flat: Settings = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return flat


def _of(settings: Settings, name: str) -> str:
    if name not in settings:  # a table, whose entries are settings of their own
        return "given" if any(each.startswith(f"{name}.") for each in settings) else "not there"
    shown = repr(settings[name])
    return shown if len(shown) <= 40 else shown[:37] + "..."
