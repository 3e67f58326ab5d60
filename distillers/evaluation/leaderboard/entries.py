"""Entries of the board: every recipe for the teacher that starts from the teacher, discovered by its file name."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillers.methods import method
from distillers.spec import check_spec, read_spec
from weights.contracts import DistillJob

PREFIX = "emoji_"


@dataclass(frozen=True)
class Entry:
    """A recipe that takes part, or the reason why it does not."""

    name: str
    job: DistillJob
    raw: dict[str, Any]
    left_out: str | None = None

    @property
    def sha256(self) -> str:
        """sha256 of the recipe's content."""
        return hashlib.sha256(json.dumps(self.raw, sort_keys=True).encode()).hexdigest()

    @property
    def student(self) -> str:
        """The name that its student is published under in the board's own store."""
        return f"board-{self.name.replace('_', '-')}"

    def spec(
        self, *, iterations: int, threads: int, seed: int, minutes: float | None = None, every: int
    ) -> dict[str, Any]:
        """The job to run: the recipe's own, except for what all entries have in common.

        Phases that the recipe specifies in iterations keep their share of the run. A job with several students has the
        budget of one, divided among them.

        Args:
            iterations: of the whole run, summed over all students.
            threads: CPU threads.
            seed: of the run.
            minutes: training time after which to stop, for a probe, whose phases are as short as possible so that it
                reaches the last one. None: stop only after the iterations, whatever the recipe says.
            every: iterations between checkpoints.
        """
        students = len(self.job.parts) or 1
        own = max(1, round(iterations / students))
        config = method(self.job.method).Config.model_validate(self.raw.get("config", {}))
        scaled = config.scaled(0 if minutes is not None else own / self.job.train.iterations)
        train = {
            **self.raw.get("train", {}),
            "iterations": own,
            "threads": threads,
            "seed": seed,
            "max_minutes": minutes and minutes / students,
            "checkpoint_every": every,
            "sample_every": own,
        }
        changed = {} if scaled == config else {"config": scaled.model_dump(mode="json")}
        return {**self.raw, **changed, "student": self.student, "train": train}


def find(folder: Path, base: str) -> list[Entry]:
    """The folder's recipes ``emoji_*.toml``, by name.

    Some cannot be compared at one budget, and are left out with a reason: recipes of another base, and those that start
    from a published student (``start``) or are guided by one, whose training would not be counted.

    Args:
        folder: of TOML files.
        base: the teacher.

    Raises:
        BadSpec: a recipe is not a valid job.
        ValueError: there are no recipes.
    """
    entries = []
    for path in sorted(folder.glob(f"{PREFIX}*.toml")):
        raw = read_spec(str(path))
        job, _ = check_spec(raw)
        reason = None
        if job.base != base:
            reason = f"its base is {job.base}, and the leaderboard's is {base}"
        elif job.start is not None:
            reason = f"it continues from the student {job.start}, whose training the budget does not count"
        elif job.guide is not None:
            reason = f"it is guided by the student {job.guide.student}, whose training the budget does not count"
        entries.append(Entry(path.stem.removeprefix(PREFIX), job, raw, reason))
    if not entries:
        raise ValueError(f"{folder} has no recipes {PREFIX}*.toml")
    return entries


def chosen(entries: Sequence[Entry], only: Sequence[str]) -> list[Entry]:
    """The entries that take part, or those named, with or without the prefix.

    Raises:
        ValueError: there is no entry of that name, or it is left out.
    """
    known = {entry.name: entry for entry in entries}
    if not only:
        return [entry for entry in entries if entry.left_out is None]
    names = [name.removeprefix(PREFIX) for name in only]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"there is no recipe {', '.join(PREFIX + name for name in unknown)}: use one of {', '.join(known)}"
        )
    for name in names:
        if known[name].left_out is not None:
            raise ValueError(f"{name} cannot be on the leaderboard: {known[name].left_out}")
    return [known[name] for name in names]
