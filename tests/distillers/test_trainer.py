"""The trainer: accumulation, clipping, warm-up, averages, checkpoints, stopping, divergence, precision, reports."""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from distillers.checkpoint import load_checkpoint
from distillers.ema import Average
from distillers.identity import Identity
from distillers.methods.base import Method, MethodConfig, OptimizerSettings, Setup, Step, Trained, Turn, TurnLoss
from distillers.precision import fast_kernels, resolve_precision
from distillers.processes import Interrupted
from distillers.seeds import generator_of, seed_of
from distillers.trainer import BadCheckpoint, Diverged
from tests.distillers.jobs import events
from tests.distillers.mixtures import mixture_setup, trainer_of
from weights.contracts import StepSchedule
from weights.families.base import TextToImage


class Fake(Method):
    """Pulls the student's first bias towards random numbers; a second network is trained in a turn of its own."""

    name: ClassVar[str] = "fake for the trainer's tests"
    Config = MethodConfig

    def __init__(self, config: Any, setup: Setup, *, warmup: int = 0, poison: int | None = None) -> None:
        self.model = setup.new_student()
        self.other = nn.Linear(2, 1)
        self.warmup, self.poison = warmup, poison
        self.stepped: list[tuple[str, int]] = []
        self.counter = torch.zeros(1)
        self.seen: list[Step] = []

    @property
    def student(self) -> TextToImage:
        return self.model

    def trained(self) -> dict[str, Trained]:
        settings = OptimizerSettings(lr=1e-2, betas=(0.0, 0.9), warmup=self.warmup)
        return {
            "student": Trained(module=self.model.network, optimizer=settings, average=True),
            "other": Trained(module=self.other, optimizer=OptimizerSettings(lr=1e-2, kind="radam")),
        }

    def turns(self, iteration: int) -> list[Turn]:
        student, other = Turn(name="student", trains=("student",)), Turn(name="other", trains=("other",), lr=0.5)
        return [student, other] if iteration % 2 else [student]

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        self.seen.append(step)
        bias = self.model.network.enter.bias if turn.name == "student" else self.other.bias
        assert isinstance(bias, Tensor)
        target = torch.randn(len(bias), generator=step.local)
        loss = (bias - target).square().mean()
        if turn.name == "student" and step.iteration == self.poison:
            loss = loss * math.nan
        return TurnLoss(loss=loss, metrics={"fake/loss": loss.detach()})

    def schedules(self) -> dict[int, StepSchedule]:
        return {1: StepSchedule(timesteps=[1.0])}

    def after_step(self, turn: Turn, iteration: int) -> None:
        self.stepped.append((turn.name, iteration))
        self.counter += 1

    def state(self) -> dict[str, Tensor]:
        return {"counter": self.counter}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.counter = tensors["counter"]


def fake_trainer(folder: Path, *, seed: int = 0, method: dict[str, Any] | None = None, **train: Any) -> Any:
    torch.manual_seed(0)
    setup = mixture_setup()
    fake = Fake(MethodConfig(), setup, **(method or {}))
    settings = {"iterations": 6, "checkpoint_every": 100, "sample_every": 100, "seed": seed, **train}
    return trainer_of(fake, setup, folder, batch_size=4, **settings)


def state_of(trainer: Any) -> dict[str, Tensor]:
    return load_checkpoint(trainer.latest_checkpoint())[0]


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def test_turns_are_taken_in_order_and_only_their_networks_step(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path)
    before = trainer.method.other.weight.detach().clone(), trainer.method.other.bias.detach().clone()
    trainer._iterate()
    assert torch.equal(trainer.method.other.bias, before[1])
    trainer.iteration = 1
    trainer._iterate()
    assert not torch.equal(trainer.method.other.bias, before[1])
    assert trainer.method.stepped == [("student", 0), ("student", 1), ("other", 1)]
    assert trainer.networks["student"].updates == 2


def test_a_turns_learning_rate_comes_before_the_networks(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path)
    trainer.run()
    rates = {name: network.optimizer.param_groups[0]["lr"] for name, network in trainer.networks.items()}
    assert rates == {"student": 1e-2, "other": 0.5}


def test_warmup_rises_by_the_networks_own_updates(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, method={"warmup": 4})
    seen = []
    for trainer.iteration in range(6):
        trainer._iterate()
        seen.append(trainer.networks["student"].optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_learning_rates_fall_over_the_last_share_of_the_iterations(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, iterations=10, cooldown=0.4)
    seen = []
    for trainer.iteration in range(10):
        trainer._iterate()
        seen.append([network.optimizer.param_groups[0]["lr"] for network in trainer.networks.values()])
    student, other = zip(*seen, strict=True)
    assert student == pytest.approx([1e-2] * 7 + [0.75e-2, 0.5e-2, 0.25e-2])
    assert other[1::2] == pytest.approx([0.5, 0.5, 0.5, 0.375, 0.125])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, gradient_clip=1e-3)
    norms = []
    network = trainer.networks["student"]
    step = network.optimizer.step

    def spy() -> None:
        norms.append(torch.stack([w.grad.norm() for w in network.weights.values() if w.grad is not None]).norm())
        step()

    network.optimizer.step = spy
    trainer._iterate()
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-3)
    assert float(trainer._sums["student/gradient_norm"]) > 1e-2


def test_accumulation_averages_the_micro_batches(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, gradient_accumulation=3)
    bias = trainer.method.model.network.enter.bias
    start, gradients = bias.detach().clone(), []
    step = trainer.networks["student"].optimizer.step

    def spy() -> None:
        gradients.append(bias.grad.clone())
        step()

    trainer.networks["student"].optimizer.step = spy
    trainer._iterate()
    targets = [
        torch.randn(len(start), generator=generator_of(0, "local", "student", 0, micro, 0)) for micro in range(3)
    ]
    expected = sum(2 * (start - target) / len(start) for target in targets) / 3
    torch.testing.assert_close(gradients[0], expected)
    assert [step.micro for step in trainer.method.seen] == [0, 1, 2]


def test_turns_of_one_micro_batch_share_their_scratch(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, gradient_accumulation=2)
    trainer.iteration = 1
    trainer._iterate()
    first, second, third, fourth = (step.scratch for step in trainer.method.seen)
    assert first is third and second is fourth and first is not second


def test_the_average_follows_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = Average(module, 0.9)
    expected = float(average.values["weight"])
    for update, value in enumerate((1.0, 2.0, -1.0)):
        module.weight.data.fill_(value)
        average.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        assert float(average.values["weight"]) == pytest.approx(expected)
    with average.applied():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == -1.0


def test_no_average_where_it_is_off(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, ema_decay=0.0)
    assert trainer.networks["student"].average is None
    with trainer.averaged():
        trainer._iterate()


def test_frozen_weights_are_not_averaged_or_saved(tmp_path: Path) -> None:
    setup = mixture_setup()

    class Partly(Fake):
        def __init__(self, config: Any, setup: Setup) -> None:
            super().__init__(config, setup)
            self.model.network.leave.requires_grad_(False)

    trainer = trainer_of(Partly(MethodConfig(), setup), setup, tmp_path, iterations=1, batch_size=2)
    trainer.save()
    names = state_of(trainer)
    assert not [name for name in names if ".leave." in name]
    assert "network.student.enter.bias" in names and "average.student.enter.bias" in names


def test_stopped_anywhere_and_resumed_it_ends_the_same(tmp_path: Path) -> None:
    straight = fake_trainer(tmp_path / "straight")
    straight.run()
    for stop in range(1, 6):
        folder = tmp_path / f"stopped-{stop}"
        first = fake_trainer(folder, iterations=stop)
        first.run()
        second = fake_trainer(folder, seed=0)
        second.load(second.latest_checkpoint())
        assert second.iteration == stop
        second.run()
        assert_same_state(state_of(second), state_of(straight))


def test_another_seed_ends_elsewhere(tmp_path: Path) -> None:
    ends = []
    for seed in (0, 1):
        trainer = fake_trainer(tmp_path / str(seed), seed=seed)
        trainer.run()
        ends.append(state_of(trainer)["network.student.enter.bias"])
    assert not torch.equal(ends[0], ends[1])


def test_old_checkpoints_go(tmp_path: Path) -> None:
    fake_trainer(tmp_path, checkpoint_every=1, keep_checkpoints=2).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iteration-00000005.safetensors", "iteration-00000006.safetensors"]


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path)
    trainer.save()
    other = fake_trainer(tmp_path)
    other.identity = Identity({"of": "another"}, frozenset(), "another")
    with pytest.raises(BadCheckpoint, match=r"other settings \(of \('the test' -> 'another'\)\)"):
        other.load(other.latest_checkpoint())


def test_asked_to_stop_it_saves_first(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path)
    trainer.asked_to_stop = True
    with pytest.raises(Interrupted):
        trainer.run()
    assert trainer.latest_checkpoint().name == "iteration-00000001.safetensors"


def test_a_time_limit_ends_the_training(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, iterations=1_000_000, max_minutes=1e-4)
    trainer.run()
    assert 0 < trainer.iteration < 1_000_000
    assert trainer.latest_checkpoint().stem == f"iteration-{trainer.iteration:08d}"


def test_a_loss_that_is_not_finite_names_step_loss_and_checkpoint(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, method={"poison": 3}, checkpoint_every=2)
    with pytest.raises(Diverged) as error:
        trainer.run()
    for part in ("iteration 3", "student turn's loss is nan", "iteration-00000002.safetensors"):
        assert part in str(error.value)
    assert trainer.latest_checkpoint().name == "iteration-00000002.safetensors"
    assert all(torch.isfinite(weight).all() for weight in trainer.method.model.network.parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path)
    trainer.method.model.network.enter.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match="gradient"):
        trainer._iterate()
    assert trainer.method.stepped == []


def test_events_and_scalars_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fake_trainer(tmp_path, log_every=2, checkpoint_every=4)
    with trainer.reporter:
        trainer.run()
    found = events(tmp_path)
    assert [(event.kind, event.step) for event in found] == [
        ("started", 0), ("progress", 2), ("progress", 4), ("checkpoint", 4), ("progress", 6), ("checkpoint", 6),
    ]  # fmt: skip
    metrics = found[1].metrics
    assert {"student/loss", "student/gradient_norm", "fake/loss", "other/loss"} <= metrics.keys()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["kind"] for event in printed] == [event.kind for event in found]
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(("log_every", "steps"), [(100, [6]), (4, [4, 6]), (3, [3, 6])])
def test_the_last_step_is_logged_once_however_short_the_job(tmp_path: Path, log_every: int, steps: list[int]) -> None:
    """Before its state is saved, and not again by a job that is resumed when all is done."""
    for resume in (False, True):
        trainer = fake_trainer(tmp_path, log_every=log_every, checkpoint_every=6)
        if resume:
            trainer.load(trainer.latest_checkpoint())
        with trainer.reporter:
            trainer.run()
    found = [event for event in events(tmp_path) if event.kind in ("progress", "checkpoint")]
    assert [event.step for event in found] == [*steps, 6] and found[-1].kind == "checkpoint"
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [scalar.step for scalar in board.Scalars("student/loss")] == steps


def test_the_last_step_before_the_time_was_up_is_logged(tmp_path: Path) -> None:
    trainer = fake_trainer(tmp_path, iterations=1_000_000, max_minutes=1e-9)
    with trainer.reporter:
        trainer.run()
    assert [(event.kind, event.step) for event in events(tmp_path)][1:] == [("progress", 1), ("checkpoint", 1)]


def test_a_resumed_job_shows_every_step_once(tmp_path: Path) -> None:
    """Killed after step 6, with a checkpoint of step 4: steps 5 and 6 are trained again."""
    for resume in (False, True):
        trainer = fake_trainer(tmp_path, log_every=1, checkpoint_every=4)
        if resume:
            trainer.latest_checkpoint().unlink()
            trainer.load(trainer.latest_checkpoint())
        with trainer.reporter:
            trainer.run()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [scalar.step for scalar in board.Scalars("student/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_silent_reporter_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fake_trainer(tmp_path, log_every=1)
    trainer.reporter.main = False
    trainer.run()
    assert not (tmp_path / "events.jsonl").exists()
    assert capsys.readouterr().out == ""


def test_seeds_are_stable_and_apart() -> None:
    assert seed_of(0, "data", 1, 2) == seed_of(0, "data", 1, 2)
    parts = [(0, "data", 1, 2), (0, "data", 12), (0, "data", "1", 2), (1, "data", 1, 2), (0, "data", 2, 1)]
    assert len({seed_of(*each) for each in parts}) == len(parts)
    assert seed_of(0, "data", 1) == 8811026018193122889


def test_precision_is_what_was_asked_or_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == "float32"
    assert resolve_precision("bfloat16", cpu) == "bfloat16"
    for avx, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert resolve_precision("auto", cpu) == ("bfloat16" if avx or amx else "float32")
    assert resolve_precision("auto", torch.device("meta")) == "float32"


def test_kernels_that_are_slow_in_bfloat16_run_in_float32() -> None:
    """Exactly: as if the inputs had been float32, rounded once at the end. Float32 inputs are left alone."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=generator).bfloat16().requires_grad_().unbind()
    x = torch.randn(2, 8, 4, 4, generator=generator).bfloat16()
    norm = torch.nn.GroupNorm(4, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q.float(), k.float(), v.float()).bfloat16(), norm(x.float()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), fast_kernels(torch.device("cpu")):
        found = attend(q, k, value=v), norm(x)
        wide = norm(x.float())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert wide.dtype == torch.float32
    with fast_kernels(torch.device("meta")), torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
