"""Dropout is on in the step that is trained, and nowhere else: not in rollouts, targets, or networks of other turns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillers.methods import method
from distillers.methods.base import Method, Setup, Step, Turn, TurnLoss
from distillers.methods.disback import DisBack
from distillers.methods.few_step import RolledOut, SelfTaught
from distillers.rollout import draw_noise, evaluating
from tests.distillers.mixtures import mixture_setup, step_of, trainer_of
from weights.families.base import TextToImage

B = 16
STUDENT = Turn(name="student", trains=("student",))


def dropping() -> Setup:
    """Its trained networks drop half of their last layer's inputs."""
    setup = mixture_setup("ring")

    def new_network(adapters: bool) -> TextToImage:
        model = setup.new_network(adapters)
        model.network.leave.insert(0, nn.Dropout(0.5))  # type: ignore[operator, union-attr]
        return model

    return replace(setup, new_network=new_network, new_student=lambda: new_network(True))


def build(name: str, **config: Any) -> Method:
    return method(name)(method(name).Config(**config), dropping())


def test_a_rollout_is_what_inference_does_and_its_last_step_is_trained_with_dropout() -> None:
    built = build("dmd2", schedules={3: {"timesteps": [1.0, 0.7, 0.4]}})
    assert isinstance(built, RolledOut)
    later = next(n for n in range(100) if built._draw_step(step_of(built.setup, B, n).shared)[1] == 2)
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        drawn.append(built._sampled(step_of(built.setup, B, later)))
    assert torch.equal(drawn[0].x_t, drawn[1].x_t)
    assert not torch.equal(drawn[0].x, drawn[1].x)
    assert built.student.network.training


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("name", ["consistency", "tscd", "scm"])
def test_a_target_has_no_dropout(name: str, decay: float) -> None:
    built = build(name, target_decay=decay, guidance_scale=1.0)
    assert isinstance(built, SelfTaught)
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found = built.loss(STUDENT, step_of(built.setup, B))
        seen.append((found.metrics["student/derivative" if name == "scm" else "student/target_std"], found.loss))
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]


def test_only_the_networks_of_a_turn_and_the_student_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student in the critic's turn too: the fake score follows the images that the student's turn makes."""
    built = build("dmd2", student_every=1)
    assert isinstance(built, RolledOut)
    seen: dict[str, dict[str, bool]] = {}
    right = built.loss

    def spy(turn: Turn, step: Step) -> TurnLoss:
        seen[turn.name] = {name: network.module.training for name, network in trainer.networks.items()}
        return right(turn, step)

    monkeypatch.setattr(built, "loss", spy)
    trainer = trainer_of(built, built.setup, tmp_path, batch_size=B, iterations=1)
    trainer.run()
    assert seen == {
        "student": {"student": True, "fake_score": False, "heads": False},
        "critic": {"student": True, "fake_score": True, "heads": True},
    }


def test_a_point_of_the_path_is_a_teacher_without_dropout() -> None:
    built = build("disback")
    assert isinstance(built, DisBack) and not built._target.network.training


def test_evaluating_leaves_every_module_as_it_was() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5).eval())
    x: Tensor = draw_noise((64,), torch.Generator().manual_seed(0), torch.device("cpu"))
    with evaluating(network):
        assert torch.equal(network(x), x)
    assert [module.training for module in network.modules()] == [True, True, False]
