"""Every method runs on a transformer over a shifted flow: short jobs, published, loaded again and drawn with."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distillers.evaluation.models import load_models
from distillers.job import JobRun
from distillers.methods import methods
from tests.distillers.jobs import extracted_from_every_layer, trained_as_stored
from tests.helpers import picture_folder, tiny_sd3_pipeline
from weights.events import EVENTS
from weights.families import TextToImage, load
from weights.pipelines import LORA_FILE
from weights.store import Store

FAST = {"student_lr": 1e-2, "warmup": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "add": {"features": "random"},
    "consistency": {"lr": 1e-2},
    "disback": {"degradation_iterations": 2, "path_points": 2, "backtrack_every": 1, "settings": {"student_every": 1}},
    "dmd2": {"student_every": 1, "gan_weight": 0.1, **FAST},
    "scm": {"lr": 1e-2, "tangent": "jvp"},
    "sid": {**FAST, "student_every": 1},
    "tscd": {"stages": [{"segments": 8, "iterations": 1}, {"segments": 4, "iterations": 1}, {"segments": 1}]},
}
"""Settings with which every network of a method is trained within four iterations."""
MORE: dict[str, dict[str, Any]] = {
    "dmd2 with adapters": {
        "method": "dmd2",
        "lora": {"rank": 2, "shared_base": True},
        "config": {**CONFIGS["dmd2"], "fake_score_lora": True},
    },
    "dmd2 with a critic of several blocks": {
        "method": "dmd2",
        "config": {**CONFIGS["dmd2"], "adversary": {"blocks": ["transformer_blocks.0", "transformer_blocks.2"]}},
    },
    "a smaller student": {"method": "consistency", "network": {"num_layers": 1}, "config": CONFIGS["consistency"]},
    "without its activations": {"method": "dmd2", "config": CONFIGS["dmd2"], "train": {"gradient_checkpointing": True}},
}
JOBS = {**{name: {"method": name, "config": CONFIGS.get(name, {})} for name in sorted(methods())}, **MORE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    tiny_sd3_pipeline(made / "base", with_t5=False)
    picture_folder(made / "data")
    return made


@pytest.fixture(scope="module")
def base(folder: Path) -> TextToImage:
    return load("stable_diffusion_3", folder / "base")


def job(folder: Path, name: str, wanted: dict[str, Any] | None = None) -> JobRun:
    wanted = wanted or JOBS[name]
    student = name.replace(" ", "-").replace("_", "-")
    train = {"iterations": 4, "batch_size": 2, "threads": 1, "precision": "float32", "log_every": 1}
    raw = {
        "student": student,
        "base": str(folder / "base"),
        "data": {"source": str(folder / "data")},
        **wanted,
        "train": {**train, **wanted.get("train", {})},
    }
    return JobRun(raw, folder / student, Store(folder / "store"), cache=folder / "cache")


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_in_a_student_that_draws_as_it_was_trained(folder: Path, base: TextToImage, name: str) -> None:
    trained_as_stored(job(folder, name), base, 4)


def test_adapters_are_named_as_diffusers_names_them(folder: Path) -> None:
    run = job(folder, "dmd2 with adapters")
    if not (folder / "store" / run.job.student).exists():
        assert run.run(resume=False) == 0
    layers = load_file(run.store.open(run.job.student).path / LORA_FILE)
    assert all(name.startswith("transformer.transformer_blocks.") or ".proj_out." in name for name in layers)
    assert any(value.any() for name, value in layers.items() if "lora_B" in name)


def test_a_students_change_is_extracted_from_every_layer(folder: Path, base: TextToImage, tmp_path: Path) -> None:
    extracted_from_every_layer(folder / "base", base, tmp_path)


def test_a_base_alone_is_measured_as_its_own_family(folder: Path) -> None:
    teacher, students = load_models([str(folder / "base")], None)
    assert teacher.pipeline.family == "stable_diffusion_3" and not students


def test_a_scale_that_sd3_cannot_be_told_ends_the_job_with_its_reason(folder: Path) -> None:
    run = job(folder, "told", {"method": "consistency", "config": {"guidance_range": [1, 9]}})
    assert run.run(resume=False) == 1
    last = EVENTS.validate_json((run.folder / "events.jsonl").read_text().splitlines()[-1])
    assert last.kind == "failed" and "cannot be conditioned on a guidance scale; leave it out, and set" in last.message
