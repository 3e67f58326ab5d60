"""Exports a student as a self-contained diffusers pipeline, for use without this project."""

import shutil
import uuid
from pathlib import Path

from weights.bundled import licence_files, resolve_base
from weights.families import load
from weights.store import Store, digest_base
from weights.student_files import readable
from weights.students import check_base, load_student
from weights.trajectory import schedule_for


def export(store: Store, name: str, target: Path, steps: int, base: str | None = None) -> Path:
    """Export a student at one step count to the new folder ``target``.

    ``DiffusionPipeline.from_pretrained(target)`` then generates, with ``num_inference_steps=steps, guidance_scale=1``
    (or the requested scale, if the student embeds guidance), the same pixels as the server from the same seed, within
    the dtype's rounding. Diffusers' SD3 and FLUX.1 pipelines do not pass their generator on to the scheduler: for
    several steps, seed them with ``torch.manual_seed``, on a CPU. FLUX.1's also needs height and width, if they are not
    1024 pixels, and ``max_sequence_length=256`` for a student of schnell.

    The folder also holds the base's licence and attribution files, and the student's manifest.

    Args:
        store: where the student is.
        name: the student.
        target: a folder that does not exist.
        steps: from 1 to the most that the student was trained for; see `weights.trajectory.schedule_for`.
        base: where its base is now: a bundled name, a folder, or a hub id; by default, where it was during training.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError: the base cannot be found.
        StoreError: the student does not exist, or cannot be verified.
        WrongBase: the student was made from another base.
        ValueError: the student supports fewer steps, diffusers cannot run at their times, or it has no own weights.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; export into a new folder")
    folder = store.open(name)
    router = folder.manifest.router
    if router is not None:
        raise ValueError(
            f"student {name!r} is a router, which a diffusers pipeline cannot be: export one of its students, "
            f"{', '.join(router.students)}"
        )
    schedule = schedule_for(folder.manifest.schedules, steps)
    if schedule.sampler != "consistency":
        raise ValueError(
            f"only consistency sampling can be exported, but {name!r} uses {schedule.sampler} for {steps} steps"
        )
    source = resolve_base(base if base is not None else folder.manifest.base.id)
    check_base(folder, digest_base(source))
    student = load_student(folder, load(folder.manifest.family, source))
    staging = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    try:
        staging.mkdir(parents=True)  # not by tempfile, whose folders are for the owner alone
    except OSError as error:
        raise OSError(f"{target} cannot be made ({error.strerror}): export to a place that you can write to") from error
    try:
        student.export(staging, schedule)
        for terms in licence_files(source):
            shutil.copyfile(terms, staging / terms.name)
        readable(staging)
        shutil.copy2(folder.path / "student.json", staging / "student.json")
        for adapter in folder.path.glob("pytorch_lora_weights.safetensors"):
            shutil.copy2(adapter, staging / adapter.name)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
