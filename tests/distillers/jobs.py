"""Whole jobs for tests: what they are made from, their specs, and what they told."""

from pathlib import Path
from typing import Any

import torch

from distillers.extraction import extract
from distillers.job import JobRun
from tests.helpers import picture_folder, student_manifest, tiny_pipeline
from weights.contracts import StepSchedule
from weights.drawing import draw
from weights.events import EVENTS
from weights.families import TextToImage
from weights.store import Store
from weights.students import load_student

TWO_STEPS = StepSchedule(timesteps=[1.0, 0.5])


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


def trained_as_stored(run: JobRun, base: TextToImage, iterations: int) -> None:
    """A job of so many iterations has a student that draws as it was trained, and otherwise than its base."""
    assert run.run(resume=False) == 0
    told = [event for event in events(run.folder) if event.kind == "progress" and event.step > 0]
    assert [event.step for event in told] == list(range(1, iterations + 1))
    assert all(torch.tensor(list(event.metrics.values())).isfinite().all() for event in told)
    assert run.trainer is not None
    trained = run.trainer.method.student
    stored = run.store.open(run.job.student)
    cond, uncond = base.encode_prompts(["red apple"]), base.encode_prompts([""])
    with run.trainer.averaged(), torch.no_grad():
        scale = stored.manifest.guidance.default_scale
        trained.network.eval()
        ours = draw(trained, cond, uncond, [5], TWO_STEPS, guidance_scale=scale).latents
    theirs = draw(load_student(stored, base), cond, uncond, [5], TWO_STEPS, guidance_scale=scale).latents
    torch.testing.assert_close(theirs, ours, atol=2e-2, rtol=0)  # stored in half precision
    assert (theirs - draw(base, cond, uncond, [5], TWO_STEPS, guidance_scale=scale).latents).abs().max() > 1e-5


def extracted_from_every_layer(base_folder: Path, base: TextToImage, work: Path) -> None:
    """A change of every weight is nearly all in the adapters that are extracted from it."""
    torch.manual_seed(0)
    student, store = base.copy(), Store(work / "store")
    with torch.no_grad():
        for weight in student.network.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
    student.save_network(work / "work", torch.float32)
    store.publish(student_manifest(base_folder, family=base.family), work / "work")
    extract(store, "extracted", "student", rank=16)
    cond = base.encode_prompts(["red apple"])
    whole, adapted, plain = (
        draw(each, cond, None, [1], TWO_STEPS).latents
        for each in (student, load_student(store.open("extracted"), base), base)
    )
    assert (adapted - whole).abs().max() < 0.3 * (plain - whole).abs().max()


def events(folder: Path) -> list[Any]:
    """What the job in a folder has told; nothing where it has not begun."""
    path = folder / "events.jsonl"
    return [EVENTS.validate_json(line) for line in path.read_text().splitlines()] if path.exists() else []
