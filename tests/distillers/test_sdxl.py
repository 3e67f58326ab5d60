"""Jobs on SDXL's classes: methods know of no family, and the recipe is one that runs."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from distillers.job import JobRun
from tests.distillers.jobs import job_spec
from tests.helpers import picture_folder, tiny_sdxl_pipeline
from weights.drawing import draw
from weights.families import load
from weights.families.stable_diffusion import LORA_FILE
from weights.store import Store
from weights.students import load_student

FAMILY = "stable_diffusion_xl"
RECIPE = Path("distillers/recipes/sdxl_dmd2.toml")
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"gan_weight": 0.1, "student_every": 1, "adversary": {}},
    "consistency": {"guidance_range": [2.0, 8.0], "lr": 1e-3},
    "scm": {},
    "ladd": {"student_lr": 1e-3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    tiny_sdxl_pipeline(made / "base")
    picture_folder(made / "data")
    return made


def draws_what_it_learned(folder: Path, run: JobRun, steps: int) -> bool:
    """Whether the published student draws, and otherwise than its base."""
    published = Store(folder / "store").open(run.job.student)
    assert published.manifest.family == FAMILY
    base = load(FAMILY, folder / "base")
    student = load_student(published, base)
    cond, schedule = base.encode_prompts(["red apple"]), published.manifest.schedules[steps]
    with torch.no_grad():
        ours, theirs = (draw(model, cond, None, [3], schedule).latents for model in (student, base))
    assert ours.isfinite().all()
    return not torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_it_as_any_other(folder: Path, method: str) -> None:
    raw = job_spec(folder, f"xl-{method}", method, config=METHODS[method])
    run = JobRun(raw, folder / method, Store(folder / "store"), cache=folder / "cache")
    assert run.run(resume=False) == 0
    assert draws_what_it_learned(folder, run, 2)


def test_the_recipe_runs(folder: Path) -> None:
    recipe = tomllib.loads(RECIPE.read_text())
    recipe |= {"base": str(folder / "base"), "data": {"source": str(folder / "data")}}
    recipe["train"] |= {
        "iterations": 3,
        "precision": "float32",
        "threads": 1,
        "batch_size": 2,
        "gradient_accumulation": 1,
    }
    recipe["config"] |= {"student_every": 1, "warmup": 0}
    run = JobRun(recipe, folder / "recipe", Store(folder / "store"), cache=folder / "cache")
    assert run.run(resume=False) == 0
    assert (Store(folder / "store").open("sdxl-dmd2").path / LORA_FILE).is_file()
    assert draws_what_it_learned(folder, run, 4)
