"""Every kind of method runs on SANA: short jobs, published, loaded again and drawn with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from distillers.job import JobRun
from tests.distillers.jobs import extracted_from_every_layer, trained_as_stored
from tests.helpers import picture_folder, tiny_sana_pipeline
from weights.families import TextToImage, load
from weights.pipelines import LORA_FILE
from weights.store import Store

FAST = {"student_lr": 1e-2, "warmup": 0}
BLOCKS = {"blocks": ["transformer_blocks.0", "transformer_blocks.2"]}
MATCHED = {"features": "random", "matching_weight": 1.0, "prompted": False, "mismatched_share": 0}
JOBS: dict[str, dict[str, Any]] = {
    "consistency": {"config": {"lr": 1e-2}},
    "dmd2": {"config": {"student_every": 1, "gan_weight": 0.1, "adversary": MATCHED, **FAST}},
    "dmd2 with adapters": {
        "method": "dmd2",
        "lora": {"rank": 2, "shared_base": True},
        "config": {"student_every": 1, "fake_score_lora": True, **FAST},
    },
    "ladd": {"config": BLOCKS},
    "scm": {"config": {"lr": 1e-2, "tangent": "jvp"}, "train": {"gradient_checkpointing": True}},
    "sid": {"config": {"student_every": 1, **FAST}},
    "a scale that it is told": {"method": "consistency", "config": {"lr": 1e-2, "guidance_range": [1, 9]}},
    "a smaller student": {"method": "consistency", "network": {"num_layers": 1}, "config": {"lr": 1e-2}},
}
"""Settings with which every network of a method is trained within two iterations."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    tiny_sana_pipeline(made / "base")
    picture_folder(made / "data")
    return made


@pytest.fixture(scope="module")
def base(folder: Path) -> TextToImage:
    return load("sana", folder / "base")


def job(folder: Path, name: str) -> JobRun:
    wanted = {"method": name, **JOBS[name]}
    student = name.replace(" ", "-")
    train = {"iterations": 2, "batch_size": 2, "threads": 1, "precision": "float32", "log_every": 1}
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
    trained_as_stored(job(folder, name), base, 2)


def test_masks_of_the_captions_are_cached_as_they_are(folder: Path, base: TextToImage) -> None:
    if not (folder / "cache").exists():
        assert job(folder, "consistency").run(resume=False) == 0
    (path,) = (folder / "cache").rglob("encoder_attention_mask.npy")
    states = np.load(path.with_name("encoder_hidden_states.npy"))
    masks = np.load(path)
    assert masks.dtype == np.bool_ and states.dtype == np.float16 and masks.shape == states.shape[:2]
    assert masks.any() and not masks.all()


def test_adapters_are_named_as_diffusers_names_them(folder: Path) -> None:
    run = job(folder, "dmd2 with adapters")
    if not (folder / "store" / run.job.student).exists():
        assert run.run(resume=False) == 0
    layers = load_file(run.store.open(run.job.student).path / LORA_FILE)
    assert all(name.startswith("transformer.") for name in layers)
    assert any(value.any() for name, value in layers.items() if "ff.conv_inverted.lora_B" in name)


def test_a_students_change_is_extracted_from_every_layer(folder: Path, base: TextToImage, tmp_path: Path) -> None:
    extracted_from_every_layer(folder / "base", base, tmp_path)
