"""What every method keeps, found by being there: a new file in distillers/methods is tested by this one."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from distillers.checkpoint import load_checkpoint
from distillers.methods import UnknownMethod, method, methods
from distillers.methods.base import Guide, Method, MethodConfig, OptimizerSettings, Setup, Step, Turn, Workspace
from distillers.seeds import generator_of, seed_of
from distillers.trainer import Trainer
from tests.distillers.mixtures import MixtureFeed, mixture_setup, trainer_of

METHODS = sorted(methods())
SMALL: dict[str, dict[str, Any]] = {
    "add": {"features": "random"},
    "disback": {"degradation_iterations": 4, "path_points": 3, "backtrack_every": 2, "settings": {"student_every": 2}},
    "tscd": {"stages": [{"segments": 8, "iterations": 3}, {"segments": 4, "iterations": 3}, {"segments": 1}]},
}
"""Settings that make a method's cycle short enough for a test, where its defaults do not."""
ITERATIONS = 10


def config_of(name: str) -> MethodConfig:
    return method(name).Config(**SMALL.get(name, {}))


def build(name: str, folder: Path, setup: Setup | None = None) -> tuple[Method, Setup]:
    """The method, prepared as a job prepares it."""
    torch.manual_seed(0)
    setup = setup or mixture_setup()
    built = method(name)(config_of(name), setup)
    workspace = Workspace(
        folder=folder, prompts=2, conditions=lambda rows: {"label": rows}, seed=seed_of, tick=lambda *_: None
    )
    built.prepare(workspace)
    return built, setup


def test_there_are_methods_and_an_unknown_one_is_answered_with_their_names() -> None:
    assert "dmd2" in METHODS
    with pytest.raises(UnknownMethod, match="dmd2"):
        method("dmd3")


@pytest.mark.parametrize("name", METHODS)
class TestMethod:
    def test_is_named_and_described(self, name: str) -> None:
        found = method(name)
        assert found.name == name
        assert issubclass(found.Config, MethodConfig)
        module = __import__(found.__module__, fromlist=["_"])
        assert "arxiv.org" in (module.__doc__ or ""), "cite the paper"

    def test_every_setting_is_described_and_unknown_ones_are_refused(self, name: str) -> None:
        config = method(name).Config
        bare = [field for field, info in config.model_fields.items() if not info.description]
        assert not bare, bare
        with pytest.raises(ValueError, match="no_such_setting"):
            config.model_validate({"no_such_setting": 1})
        assert config.model_validate_json(config().model_dump_json()) == config()

    def test_phases_keep_their_share_of_a_run_of_another_length(self, name: str) -> None:
        found, config = method(name), config_of(name)
        assert config.scaled(1.0) == config
        for factor in (0.0, 0.3, 40.0):
            scaled = config.scaled(factor)
            assert found.Config.model_validate(scaled.model_dump(mode="json")) == scaled

    def test_declares_networks_turns_and_schedules(self, name: str, tmp_path: Path) -> None:
        built, _ = build(name, tmp_path)
        trained = built.trained()
        assert trained["student"].average
        assert trained["student"].module is built.student.network
        kinds = get_args(OptimizerSettings.__annotations__["kind"])
        assert all(each.optimizer.kind in kinds and each.optimizer.lr > 0 for each in trained.values())
        trains: dict[str, tuple[str, ...]] = {}
        for iteration in range(ITERATIONS):
            turns = built.turns(iteration)
            assert turns and len({turn.name for turn in turns}) == len(turns)
            for turn in turns:
                assert set(turn.trains) <= trained.keys()
                assert trains.setdefault(turn.name, turn.trains) == turn.trains
        assert {network for names in trains.values() for network in names} == trained.keys()
        assert all(len(schedule.timesteps) == steps for steps, schedule in built.schedules().items())
        assert built.guidance().default_scale >= 0

    def test_every_loss_is_finite_and_reaches_all_and_only_its_networks(self, name: str, tmp_path: Path) -> None:
        built, setup = build(name, tmp_path)
        trainer = trainer_of(built, setup, tmp_path, batch_size=8)
        seen = set()
        for iteration in range(ITERATIONS):
            for turn in built.turns(iteration):
                if turn.name not in seen:
                    seen.add(turn.name)
                    trainer.iteration = iteration
                    self.check_loss(built, turn, self.step(name, setup, iteration, turn.name), trainer)
                built.after_step(turn, iteration)
        assert all(weight.grad is None for weight in setup.base.network.parameters())

    def test_the_same_numbers_give_the_same_loss(self, name: str, tmp_path: Path) -> None:
        losses = []
        for _ in range(2):
            built, setup = build(name, tmp_path)
            turn = built.turns(0)[0]
            losses.append(float(built.loss(turn, self.step(name, setup, 0, turn.name)).loss.detach()))
        assert losses[0] == losses[1]

    def test_training_moves_the_student_and_never_the_teacher(self, name: str, tmp_path: Path) -> None:
        built, setup = build(name, tmp_path)
        before = {key: value.clone() for key, value in setup.base.network.state_dict().items()}
        start = [weight.detach().clone() for weight in built.student.network.parameters()]
        trainer_of(built, setup, tmp_path, batch_size=8, iterations=ITERATIONS).run()
        assert any(
            not torch.equal(old, new) for old, new in zip(start, built.student.network.parameters(), strict=True)
        )
        assert all(torch.equal(before[key], value) for key, value in setup.base.network.state_dict().items())

    def test_its_teacher_can_be_led_away_from_a_worse_one(self, name: str, tmp_path: Path) -> None:
        losses = {}
        for scale in (1.0, 3.0):
            setup = mixture_setup()
            guide = Guide(model=setup.new_network(False), scale=scale)
            guide.model.network.requires_grad_(False)
            (tmp_path / str(scale)).mkdir()
            built, _ = build(name, tmp_path / str(scale), dataclasses.replace(setup, guide=guide))
            for iteration in range(ITERATIONS):
                for turn in built.turns(iteration):
                    step = self.step(name, setup, iteration, turn.name)
                    cond = {
                        "label": torch.zeros_like(step.batch.cond["label"])
                    }  # the unconditional prompt is left alone
                    batch = dataclasses.replace(step.batch, cond=cond, real_cond=step.batch.real_cond and cond)
                    loss = built.loss(turn, dataclasses.replace(step, batch=batch)).loss
                    losses[scale, iteration, turn.name] = float(loss.detach())
                    built.after_step(turn, iteration)
            loss.backward()
            assert all(weight.grad is None for weight in guide.model.network.parameters())
        assert all(math.isfinite(loss) for loss in losses.values())
        differ = any(loss != losses[1.0, *key[1:]] for key, loss in losses.items())
        assert differ == (name != "ladd"), "its teacher has features alone, which are its own"

    def test_stopped_and_resumed_it_ends_in_the_same_weights(self, name: str, tmp_path: Path) -> None:
        ends = []
        for stops in ((ITERATIONS,), (ITERATIONS // 2 - 1, ITERATIONS)):
            folder = tmp_path / str(len(stops))
            for stop in stops:
                built, setup = build(name, tmp_path)
                trainer = trainer_of(built, setup, folder, batch_size=8, iterations=stop, gradient_accumulation=2)
                latest = trainer.latest_checkpoint()
                if latest is not None:
                    trainer.load(latest)
                trainer.run()
            latest = trainer.latest_checkpoint()
            assert latest is not None
            ends.append(load_checkpoint(latest)[0])
        assert ends[0].keys() == ends[1].keys()
        assert not [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])]

    @staticmethod
    def check_loss(built: Method, turn: Turn, step: Step, trainer: Trainer) -> None:
        trainer._only(turn)
        found = built.loss(turn, step)
        assert found.loss.ndim == 0 and torch.isfinite(found.loss)
        assert not [key for key, value in found.metrics.items() if value.requires_grad or value.ndim]
        found.loss.backward()
        for name, network in trainer.networks.items():
            touched = {weight.grad is not None for weight in network.weights.values()}
            assert touched == {name in turn.trains}, (turn.name, name)
            for weight in network.weights.values():
                weight.grad = None

    @staticmethod
    def step(name: str, setup: Setup, iteration: int, turn: str) -> Step:
        batch = MixtureFeed(setup, 8).batch(iteration)
        if method(name).needs_pictures(config_of(name)) is None:  # then a job on prompts alone is let through
            batch = dataclasses.replace(batch, real=None, real_cond=None)
        return Step(
            iteration=iteration,
            micro=0,
            batch=batch,
            shared=generator_of("shared", turn, iteration),
            local=generator_of("local", turn, seed_of(iteration)),
        )
