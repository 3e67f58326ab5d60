"""Activations that are computed again: the same weights, from less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin

from distillers.checkpoint import load_checkpoint
from distillers.job import JobRun
from distillers.methods.base import Step, Turn
from distillers.seeds import generator_of
from distillers.spec import BadSpec, check_spec
from tests.distillers.jobs import job_spec
from tests.helpers import picture_folder, tiny_sd15_pipeline
from weights.store import Store

METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"gan_weight": 0.1, "student_every": 1, "adversary": {"prompted": False, "mismatched_share": 0.0}},
    "sid": {},  # goes back through the teacher
    "scm": {},
}


def spec(folder: Path, name: str, method: str, **train: Any) -> dict[str, Any]:
    return job_spec(folder, name, method, train=train, config=METHODS.get(method, {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    tiny_sd15_pipeline(made / "base")
    picture_folder(made / "data")
    return made


def run(folder: Path, method: str, precision: str, checkpointed: bool) -> JobRun:
    name = f"{method}-{precision}-{checkpointed}".lower()
    raw = spec(folder, name, method, gradient_checkpointing=checkpointed, precision=precision)
    job = JobRun(raw, folder / name, Store(folder / "store"))
    assert job.run(resume=False) == 0
    return job


def kept_bytes(job: JobRun) -> int:
    """What a student's loss keeps for its backward pass."""
    trainer = job.trainer
    turn: Turn = trainer.method.turns(trainer.iteration)[0]
    for name in turn.trains:
        trainer.networks[name].module.requires_grad_(True)
    held = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal held
        held += tensor.nbytes
        return tensor

    batch, numbers = trainer.feed.batch(0), generator_of("kept")
    step = Step(iteration=0, micro=0, batch=batch, shared=numbers, local=numbers)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.method.loss(turn, step)
    return held


@pytest.mark.parametrize(("method", "precision"), [*((method, "float32") for method in METHODS), ("dmd2", "bfloat16")])
def test_it_ends_in_the_same_weights(fresh_accelerator: None, folder: Path, method: str, precision: str) -> None:
    states, kept = [], []
    for checkpointed in (False, True):
        job = run(folder, method, precision, checkpointed)
        kept.append(kept_bytes(job))
        (path,) = (job.folder / "checkpoints").glob("*.safetensors")
        states.append(load_checkpoint(path)[0])
    plain, again = states
    assert kept[1] < 0.9 * kept[0], kept
    assert plain.keys() == again.keys()
    assert not [name for name in plain if not torch.equal(plain[name], again[name])]


def test_what_cannot_be_had_is_refused(folder: Path) -> None:
    wrong = spec(folder, "both", "dmd2", gradient_checkpointing=True, capture=True, gradient_accumulation=2)
    with pytest.raises(BadSpec) as caught:
        check_spec(wrong)
    assert [error["param"] for error in caught.value.errors] == [
        "train.gradient_accumulation", "train.gradient_checkpointing",
    ]  # fmt: skip


def test_a_network_that_has_none_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ModelMixin, "enable_gradient_checkpointing")
    raw = spec(folder, "none", "dmd2", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="the family 'stable_diffusion' does not support it"):
        JobRun(raw, folder / "none", Store(folder / "store"))._build(resume=False)
