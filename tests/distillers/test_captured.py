"""Captured iterations: what is captured when, that nothing of it shows in the weights, and on a GPU the real thing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from distillers import captured, job, trainer
from distillers.checkpoint import load_checkpoint
from distillers.job import JobRun
from distillers.seeds import generator_of
from distillers.spec import BadSpec, check_spec
from tests.distillers.jobs import job_inputs, job_spec
from weights.store import Store

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
ITERATIONS = 8
# Rates that are the same numbers in half as many bits.
SETTINGS = {"student_every": 1, "student_lr": 2**-10, "fake_score_lr": 2**-10, "weight_decay": 0.0, "warmup": 4}
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "consistency": {},
    "add": {"features": "random", "matching_weight": 1.0, "student_lr": 2**-10, "head_lr": 2**-10, "warmup": 4},
}
ONE = {"timesteps": [1.0]}
ADVERSARY = {"blocks": ["up_blocks.0"], "prompted": False, "mismatched_share": 0.0, "head_lr": 1e-3}


class Ran(NamedTuple):
    """A job that is over, and its exit status."""

    job: JobRun
    status: int


class Rerun:
    """In place of a graph: the function itself, run as often before as capturing would."""

    made: list["Rerun"]
    warmups = 3

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor, pool: Any, warmed: Callable[[], None]) -> None:
        self.function, self.replays = function, 0
        for _ in range(self.warmups):
            function(*inputs)
        warmed()
        self.made.append(self)

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.replays += 1
        return self.function(*inputs)


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> type[Rerun]:
    """Iterations are run again where they would be replayed, on whatever device there is."""
    Rerun.made, Rerun.warmups = [], 3
    monkeypatch.setattr(captured, "Replayed", Rerun)
    if not torch.cuda.is_available():
        for module in (captured, job):
            monkeypatch.setattr(module, "check_place", lambda accelerator: None)
        monkeypatch.setattr(captured, "_generator", lambda device: torch.default_generator)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return Rerun


def run(folder: Path, name: str, config: dict[str, Any] | None = None, method: str = "dmd2", **train: Any) -> Ran:
    settings = {**OWN_SETTINGS.get(method, SETTINGS), **(config or {})}
    train = {"iterations": ITERATIONS, "log_every": 4, "capture": True, **train}
    raw = job_spec(job_inputs(folder), name, method, train=train, config=settings)
    made = JobRun(raw, folder / name, Store(folder / "store"))
    return Ran(made, made.run(resume=True))


def state(folder: Path, name: str) -> dict[str, Tensor]:
    (path,) = (folder / name / "checkpoints").glob("*.safetensors")
    return load_checkpoint(path)[0]


LEARNS_BY: dict[str, dict[str, Any]] = {
    "dmd2": {"adversary": ADVERSARY, "gan_weight": 0.1},
    "f_distill": {"gan_weight": 0.1},  # keeps averages of ratios
    "add": {"backward_simulation": True},
}


@pytest.mark.parametrize("method", LEARNS_BY)
def test_capturing_leaves_no_trace_in_the_weights(rerun: type[Rerun], tmp_path: Path, method: str) -> None:
    assert run(tmp_path, "warmed", LEARNS_BY[method], method).status == 0
    rerun.warmups = 0
    assert run(tmp_path, "cold", LEARNS_BY[method], method).status == 0
    warmed, cold = state(tmp_path, "warmed"), state(tmp_path, "cold")
    assert warmed.keys() == cold.keys()
    assert not [name for name in warmed if not torch.equal(warmed[name], cold[name])]


def test_a_graph_is_made_for_each_step_that_is_trained_and_used_again(rerun: type[Rerun], tmp_path: Path) -> None:
    run(tmp_path, "many", {"schedules": {1: ONE, 2: {"timesteps": [1.0, 0.5]}}}, iterations=20)
    assert len(rerun.made) == 2  # one step is the first of two as well
    assert sum(graph.replays for graph in rerun.made) == 20


def test_a_graph_has_the_turns_of_its_iteration(rerun: type[Rerun], tmp_path: Path) -> None:
    run(tmp_path, "seldom", {"schedules": {1: ONE}, "student_every": 3})
    assert [graph.replays for graph in rerun.made] == [6, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's sums are not the same bits twice")
def test_it_learns_what_an_eager_job_learns_from_the_same_numbers(
    rerun: type[Rerun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "captured", cooldown=0.5)

    def drawn(*parts: Any) -> torch.Generator:
        return torch.default_generator if parts[1] == "local" else generator_of(*parts)

    monkeypatch.setattr(trainer, "generator_of", drawn)
    run(tmp_path, "eager", capture=False, cooldown=0.5)
    ours, theirs = state(tmp_path, "captured"), state(tmp_path, "eager")
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_a_resumed_job_goes_on_with_its_rates(rerun: type[Rerun], tmp_path: Path) -> None:
    whole = run(tmp_path, "whole").job.trainer
    half = run(tmp_path, "half", max_minutes=1e-9, checkpoint_every=1).job.trainer
    assert whole is not None and half is not None
    while half.iteration < ITERATIONS // 2:
        half._iterate()
        half.iteration += 1
    half.save()
    checkpoint = half.latest_checkpoint()
    assert checkpoint is not None
    whole.load(checkpoint)
    while whole.iteration < ITERATIONS:
        whole._iterate()
        whole.iteration += 1
    assert {name: network.updates for name, network in whole.networks.items()} == dict.fromkeys(
        whole.networks, ITERATIONS
    )
    ours, theirs = (dict(whole.networks["student"].weights), state(tmp_path, "whole"))
    assert not [name for name, value in ours.items() if not torch.equal(value.cpu(), theirs[f"network.student.{name}"])]


def test_numbers_that_are_not_finite_end_it_before_they_are_saved(
    rerun: type[Rerun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(tmp_path, "diverges", {"student_lr": 1e30, "warmup": 0}, ema_decay=0.0)
    assert ran.status == 1 and not list((tmp_path / "diverges" / "checkpoints").glob("*"))
    assert "last good checkpoint: none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"config": {"guidance_interval": (0.2, 0.8)}}, "train.capture", r"guidance_interval \(0\.2, 0\.8\) counts"),
        ({"config": {"adversary": {"blocks": ["mid_block"]}}}, "train.capture", r"mismatched_share 0\.5 counts"),
        ({"config": {"regression_iterations": 3}}, "train.capture", "regression_iterations 3 reads"),
        (
            {"method": "add", "config": {"features": None, "prompted": True, "mismatched_share": 0.5}},
            "train.capture",
            r"mismatched_share 0\.5 counts",
        ),
        (
            {"method": "consistency"},
            "train.capture",
            r"consistency's losses read .* capture off \(.*: add, diff_instruct, ",
        ),
        ({"guide": {"student": "worse"}}, "guide", "autoguidance by 'worse' counts rows"),
        ({"train": {"gradient_accumulation": 2}}, "train.gradient_accumulation", "2 must be 1 with capture"),
        ({"train": {"gradient_checkpointing": True}}, "train.gradient_checkpointing", "leave it out, or capture"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_the_spec(change: dict[str, Any], param: str, says: str) -> None:
    raw = {"student": "refused", "method": "dmd2", **change}
    raw["train"] = {"capture": True, **change.get("train", {})}
    with pytest.raises(BadSpec) as error:
        check_spec(raw)
    (found,) = error.value.errors
    assert found["param"] == param and re.search(says, found["message"]), found
    raw["train"] = {"capture": False, **change.get("train", {})}
    check_spec(raw)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_nothing_is_loaded_to_be_captured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillers.job.load", lambda *_: pytest.fail("a network was loaded"))
    assert run(tmp_path, "refused").status == 1
    assert "needs an NVIDIA GPU, but this job runs on cpu" in capsys.readouterr().out


@gpu
@pytest.mark.parametrize("method", ["dmd2", "sim", "f_distill", "add"])
def test_a_graph_trains_as_the_function_does(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {"guidance_scale": 1.5}
    if method != "add":
        config |= {"adversary": ADVERSARY, "gan_weight": 0.1}
    assert run(tmp_path, "replayed", config, method).status == 0
    Rerun.made, Rerun.warmups = [], 3
    monkeypatch.setattr(captured, "Replayed", Rerun)
    assert run(tmp_path, "rerun", config, method).status == 0
    replayed, again = state(tmp_path, "replayed"), state(tmp_path, "rerun")
    assert replayed.keys() == again.keys()
    for name in replayed:
        if name.startswith("network."):
            torch.testing.assert_close(replayed[name], again[name], rtol=0.02, atol=2e-4)
