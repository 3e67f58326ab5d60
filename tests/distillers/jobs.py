"""Whole jobs for tests: what they are made from, their specs, and what they told."""

from pathlib import Path
from typing import Any

from tests.helpers import picture_folder, tiny_pipeline
from weights.contracts import EVENTS


def job_inputs(folder: Path, count: int = 6) -> Path:
    """Writes what `job_spec` names, a base and so many pictures, where there is none yet; the folder."""
    if not (folder / "base").exists():
        tiny_pipeline(folder / "base")
        picture_folder(folder / "data", count)
    return folder


def job_spec(folder: Path, student: str = "tiny", method: str = "dmd2", **fields: Any) -> dict[str, Any]:
    """A short job on the `job_inputs` in a folder, in float32 and one thread: every iteration logged, none saved or sampled.

    Args:
        folder: of the `job_inputs`.
        student: its name.
        method: its name.
        fields: of the spec; those of ``train`` change these defaults one by one.
    """
    train = {"iterations": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 100, "sample_every": 100}
    train |= {"threads": 1, "precision": "float32", **fields.pop("train", {})}
    base, data = str(folder / "base"), {"source": str(folder / "data")}
    return {"student": student, "method": method, "base": base, "data": data, "train": train, **fields}


def events(folder: Path) -> list[Any]:
    """What the job in a folder has told; nothing where it has not begun."""
    path = folder / "events.jsonl"
    return [EVENTS.validate_json(line) for line in path.read_text().splitlines()] if path.exists() else []
