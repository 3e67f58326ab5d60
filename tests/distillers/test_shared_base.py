"""LoRA jobs whose networks share one frozen base: the same numbers as without sharing, and the base in memory once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distillers.adapters import copy_sharing_frozen
from distillers.checkpoint import load_checkpoint
from distillers.job import JobRun
from distillers.methods.base import Step
from distillers.seeds import generator_of
from distillers.spec import BadSpec, check_spec
from distillers.trainer import Trainer
from tests.distillers.jobs import events, job_inputs, job_spec
from weights.families.base import TextToImage
from weights.families.stable_diffusion import LORA_FILE, StableDiffusion
from weights.store import Store

CONFIGS: dict[str, dict[str, Any]] = {
    "dmd2": {"student_every": 2, "student_lr": 1e-2, "fake_score_lr": 1e-2, "warmup": 0, "fake_score_lora": True},
    "consistency": {"lr": 1e-2, "target_decay": 0.5},
}
METHODS = sorted(CONFIGS)
TWO_STEPS = {"2": {"timesteps": [1.0, 0.5]}}


@dataclass(frozen=True)
class Jobs:
    """Makes jobs on one base, each in the folder of its name."""

    base: Path
    folder: Path

    def make(
        self, name: str, method: str = "dmd2", *, shared: bool = True, iterations: int = 4, **config: Any
    ) -> JobRun:
        raw = job_spec(
            self.folder,
            method=method,
            train={"iterations": iterations, "batch_size": 4},
            lora={"rank": 2, "dropout": 0.1, "shared_base": shared},
            config={"schedules": TWO_STEPS, **CONFIGS[method], **config},
        )
        store = Store(self.folder / name / "store")
        return JobRun(raw, self.folder / name, store, cache=self.folder / "cache", replace=True)

    def trained(self, name: str, method: str = "dmd2", *, resume: bool = False, **job: Any) -> JobRun:
        run = self.make(name, method, **job)
        assert run.run(resume) == 0
        return run


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = job_inputs(tmp_path_factory.mktemp("jobs"))
    return Jobs(folder / "base", folder)


@dataclass(frozen=True)
class Pair:
    """The same job at its end, with and without sharing."""

    method: str
    shared: JobRun
    apart: JobRun


@pytest.fixture(scope="module", params=METHODS)
def pair(jobs: Jobs, request: pytest.FixtureRequest) -> Pair:
    method = request.param
    runs = {shared: jobs.trained(f"{method}-{shared}", method, shared=shared) for shared in (True, False)}
    return Pair(method, runs[True], runs[False])


def trainer_of(run: JobRun) -> Trainer:
    assert run.trainer is not None
    return run.trainer


def teacher(trainer: Trainer) -> TextToImage:
    return trainer.method.setup.base  # type: ignore[attr-defined,no-any-return]


def networks(trainer: Trainer) -> list[nn.Module]:
    """Every network of the base's shape that the job holds, the teacher's first."""
    found = [
        teacher(trainer).network,
        *(network.module for name, network in trainer.networks.items() if name != "heads"),
    ]
    average = getattr(trainer.method, "average", None)
    return found if average is None else [*found, average.network]


def base_bytes(trainer: Trainer) -> int:
    """Memory that holds weights of the base, adapters left out; what is shared counts once."""
    weights = [w for network in networks(trainer) for name, w in network.named_parameters() if "lora_" not in name]
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    return sum(storages.values())


def once(trainer: Trainer) -> int:
    return sum(weight.nbytes for weight in teacher(trainer).network.parameters())


def adapters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in network.named_parameters() if "lora_" in name}


def last_state(run: JobRun) -> dict[str, Tensor]:
    path = trainer_of(run).latest_checkpoint()
    assert path is not None
    return load_checkpoint(path)[0]


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


def inputs(model: TextToImage) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([1.0, 0.5]), model.encode_prompts(["red apple", "blue dog"])


def logged(run: JobRun) -> list[dict[str, float]]:
    return [event.metrics for event in events(run.folder) if event.kind == "progress" and event.step > 0]


def test_sharing_changes_no_number(pair: Pair) -> None:
    """Losses, gradient norms, weights, moments, averages and the published file: all to the last bit."""
    left, right = last_state(pair.shared), last_state(pair.apart)
    assert_same(left, right)
    moved = [name for name in left if name.startswith("network.student") and "lora_B" in name and left[name].any()]
    assert moved, "adapters start at zero: the student has learned something"
    assert logged(pair.shared) == logged(pair.apart)
    files = [load_file(run.store.open("tiny").path / LORA_FILE) for run in (pair.shared, pair.apart)]
    assert files[0]
    assert_same(*files)


def test_the_base_is_held_once(pair: Pair) -> None:
    """After all that converts weights in place, too: each network's memory format, and the training itself."""
    shared, apart = trainer_of(pair.shared), trainer_of(pair.apart)
    assert len(networks(shared)) == len(networks(apart)) == 3
    assert base_bytes(shared) == once(shared)
    # Consistency's target always stands on the student's frozen weights.
    assert base_bytes(apart) == {"dmd2": 3, "consistency": 2}[pair.method] * once(apart)


def test_training_leaves_the_teacher_as_it_was_loaded(pair: Pair, jobs: Jobs) -> None:
    fresh, ours = StableDiffusion.load(jobs.base), teacher(trainer_of(pair.shared))
    assert_same(dict(ours.network.state_dict()), dict(fresh.network.state_dict()))
    with torch.no_grad():
        left, right = (model.denoiser(*inputs(fresh)) for model in (ours, fresh))
        student = trainer_of(pair.shared).method.student.denoiser.eval()(*inputs(fresh))
    # Convolutions sum in another order where the weights lie channels-last, as they do in training.
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert (student - right).abs().max() > 100 * (left - right).abs().max()


def test_stopped_and_resumed_it_ends_in_the_same_weights(pair: Pair, jobs: Jobs) -> None:
    name = f"{pair.method}-stopped"
    jobs.trained(name, pair.method, iterations=2)
    resumed = jobs.trained(name, pair.method, resume=True)
    state = last_state(resumed)
    assert_same(state, last_state(pair.shared))
    trainer = trainer_of(resumed)
    assert base_bytes(trainer) == once(trainer), "restoring copies into the weights that are there"
    kept = [name for name in state if name.startswith(("network.", "average.", "method."))]
    strange = [name for name in kept if "lora_" not in name and not name.startswith("network.heads.")]
    assert kept and not strange, "a checkpoint holds no weights of the base"


def test_a_fake_score_that_trains_every_weight_is_a_copy_beside_the_shared_base(jobs: Jobs) -> None:
    trainer = jobs.make("mixed", fake_score_lora=False)._build(resume=False)
    assert base_bytes(trainer) == 2 * once(trainer)
    weights = trainer.networks["fake_score"].weights
    assert weights.keys() == dict(teacher(trainer).network.named_parameters()).keys()


def test_in_bfloat16_the_shared_weights_are_and_the_adapters_are_not(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = jobs.make("bfloat16", iterations=2)
    monkeypatch.setattr(run, "precision", "bfloat16")  # accelerate keeps one precision a process: autocast is ours here
    trainer = run._build(resume=False)
    with torch.autocast("cpu", torch.bfloat16):
        trainer.run()
    assert {weight.dtype for weight in teacher(trainer).network.parameters()} == {torch.bfloat16}
    assert base_bytes(trainer) == once(trainer)
    for name in ("student", "fake_score"):
        weights = trainer.networks[name].weights
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert all(weight.isfinite().all() for weight in weights.values())
        assert any(weight.any() for key, weight in weights.items() if "lora_B" in key)


def test_gradients_reach_the_turn_s_own_adapters_alone(jobs: Jobs) -> None:
    trainer = jobs.make("gradients")._build(resume=False)
    turns = trainer.method.turns(iteration=1)
    assert [turn.name for turn in turns] == ["student", "critic"]
    for turn in turns:
        trainer._only(turn)
        step = Step(
            iteration=1,
            micro=0,
            batch=trainer.feed.batch(1),
            shared=generator_of("shared"),
            local=generator_of("local"),
        )
        trainer.method.loss(turn, step).loss.backward()
        for name in ("student", "fake_score"):
            weights = adapters(trainer.networks[name].module)
            assert weights and {weight.grad is not None for weight in weights.values()} == {name in turn.trains}
            for weight in weights.values():
                weight.grad = None
        assert all(weight.grad is None and not weight.requires_grad for weight in teacher(trainer).network.parameters())


def test_one_network_s_adapters_hooks_and_mode_are_not_another_s(jobs: Jobs) -> None:
    trainer = jobs.make("apart")._build(resume=False)
    method: Any = trainer.method
    denoisers = {"teacher": teacher(trainer).denoiser, "student": method.student.denoiser, "fake": method.fake_score}
    student, fake_score = trainer.networks["student"].module, trainer.networks["fake_score"].module
    student.eval()
    assert fake_score.training and not adapters(teacher(trainer).network)
    fake_score.eval()
    arguments = inputs(teacher(trainer))

    def answers() -> dict[str, list[Tensor]]:
        found = {}
        for name, denoiser in denoisers.items():
            x0, features = denoiser.with_features(*arguments)
            found[name] = [x0, *features, *denoiser.features(*arguments)]
        return found

    with torch.no_grad():
        before = answers()
        for weight in adapters(student).values():
            weight.add_(0.1)
        after = answers()
    assert all(len(tensors) == 3 for tensors in after.values())
    same = {name: [torch.equal(*both) for both in zip(before[name], after[name], strict=True)] for name in denoisers}
    assert same == {"teacher": [True] * 3, "student": [False] * 3, "fake": [True] * 3}


def test_a_copy_shares_what_is_frozen_and_owns_the_rest() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    copied = copy_sharing_frozen(network)
    names = {name for name, weight in network.named_parameters() if copied.get_parameter(name) is weight}
    assert names == {"0.weight", "0.bias"}
    assert_same(dict(network.state_dict()), dict(copied.state_dict()))
    with torch.no_grad():
        copied(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
        copied.get_parameter("2.weight").zero_()
    assert network[1].running_mean is not None and not network[1].running_mean.any()
    assert network[2].weight.any()


@pytest.mark.parametrize("value", ["base", 2, None])
def test_what_is_no_switch_is_refused(value: Any) -> None:
    with pytest.raises(BadSpec, match=r"lora\.shared_base: .*boolean"):
        check_spec({"student": "tiny", "method": "dmd2", "lora": {"shared_base": value}})
