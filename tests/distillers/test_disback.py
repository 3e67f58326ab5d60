"""DisBack: the path it records, the way it walks back, and that it finds the teacher's distribution."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distillers.methods.base import Setup, Turn
from distillers.methods.disback import DisBack, DisBackConfig
from distillers.methods.dmd2 import DMD2
from distillers.methods.sid import SiD
from tests.distillers.conventions import in_every_convention
from tests.distillers.mixtures import distances, mixture_setup, step_of, trainer_of
from weights.contracts import StepSchedule
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import EDM, Schedule

ONE = {1: StepSchedule(timesteps=[1.0])}
CRITIC = Turn(name="critic", trains=("fake_score",))
SETTINGS: dict[str, Any] = {
    "guidance_scale": 1.0, "student_every": 2, "student_lr": 1e-3, "fake_score_lr": 2e-3, "student_betas": (0.0, 0.99),
    "critic_betas": (0.0, 0.99), "warmup": 10, "score_weighting": "v", "schedules": ONE, "dm_times": (0.15, 0.98),
    "gan_weight": 0.0,
}  # fmt: skip
SHORT: dict[str, Any] = {"degradation_iterations": 6, "path_points": 3, "backtrack_every": 2, "settings": SETTINGS}


def build(**config: Any) -> DisBack:
    torch.manual_seed(0)
    return DisBack(DisBackConfig.model_validate({**SHORT, **config}), mixture_setup())


def weights_of(method: DisBack) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.inner.fake_score_network.named_parameters()}


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("method", {"method": "consistency"}),
        ("settings.student_every", {"settings": {"student_every": 0}}),
        ("settings.no_such", {"settings": {"no_such": 1}}),
        ("regression_iterations", {"settings": {"regression_iterations": 10}}),
        ("path_points", {"path_points": 7}),
        ("backtrack_every", {"backtrack_every": 0}),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        DisBackConfig.model_validate({**SHORT, **config})
    assert field in str(error.value)


def test_errors_of_the_wrapped_method_have_the_bad_value_and_what_is_allowed() -> None:
    bad = {"student_every": 0, "student_rate": 1e-5, "optimizer": "sgd"}
    with pytest.raises(ValidationError) as error:
        DisBackConfig.model_validate({"settings": bad})
    told = str(error.value)
    for part in (
        "settings.student_every: Input should be greater than or equal to 1 (got 0)",
        "settings.student_rate: there is no such field: did you mean student_lr? Use one of schedules, ",
        " student_lr, ",
        "settings.optimizer: Input should be 'adamw' or 'muon' (got 'sgd')",
    ):
        assert part in told
    with pytest.raises(ValidationError, match=r"settings: dm_times: \(0.9, 0.1\) must be \(low, high\)"):
        DisBackConfig.model_validate({"settings": {"dm_times": (0.9, 0.1)}})


def test_it_wraps_the_method_that_is_named() -> None:
    assert isinstance(build().inner, DMD2)
    other = build(method="sid")
    assert isinstance(other.inner, SiD)
    assert other.student is other.inner.student
    assert other.schedules() == ONE
    assert DisBack.needs_pictures(other.config) is None
    with_gan = DisBackConfig(settings={"gan_weight": 1.0})
    assert "gan_weight" in str(DisBack.needs_pictures(with_gan))


def test_first_only_the_fake_score_learns_then_the_method_begins() -> None:
    method = build()
    names = [[turn.name for turn in method.turns(iteration)] for iteration in range(10)]
    assert names == [["critic"]] * 6 + [["critic"], ["student", "critic"]] * 2


def test_the_path_is_walked_back_to_the_teacher() -> None:
    method = build(path_points=4, degradation_iterations=8, backtrack_every=3)
    assert [method.point(iteration) for iteration in range(8, 20)] == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 3


def test_points_are_the_fake_scores_weights_at_equal_distances(tmp_path: Path) -> None:
    method = build()
    trainer = trainer_of(method, method.setup, tmp_path, batch_size=8)
    seen: dict[int, dict[str, Tensor]] = {}
    for iteration in range(6):
        trainer._iterate()
        trainer.iteration += 1
        seen[iteration + 1] = weights_of(method)
    assert set(method.path) == {1, 2}
    for point, kept in method.path.items():
        assert all(torch.equal(kept[name], seen[2 * point][name]) for name in kept)
    assert any(not torch.equal(method.path[1][name], method.path[2][name]) for name in method.path[1])


def test_the_target_is_the_point_and_passed_points_are_dropped() -> None:
    method = build()
    method.path = {point: {k: v + point for k, v in weights_of(method).items()} for point in (1, 2)}
    for iteration, point in ((6, 2), (8, 1)):
        method.loss(CRITIC, step_of(method.setup, 4, iteration))
        target = method._target.network.state_dict()
        assert all(torch.equal(target[name], value) for name, value in method.path[point].items())
        assert method.inner.teacher is method._target.denoiser
        method.after_step(CRITIC, iteration + 1)
    assert method.path == {}
    method.loss(CRITIC, step_of(method.setup, 4, 10))
    assert method.inner.teacher is method.setup.teacher


def test_the_path_is_saved_and_comes_back() -> None:
    method, other = (build(method="f_distill", settings={}) for _ in range(2))
    method.path = {2: weights_of(method)}
    method.inner.load_state({"ratio_means": torch.full((10,), 3.0)})
    other.load_state(method.state())
    assert other.path.keys() == {2}
    assert all(torch.equal(other.path[2][name], value) for name, value in method.path[2].items())
    assert torch.equal(other.inner.state()["ratio_means"], torch.full((10,), 3.0))


def distances_after(folder: Path, setup: Setup, inner: str = "dmd2", **changed: Any) -> tuple[float, float]:
    """The one-step student's distance to the data, before and after."""
    torch.manual_seed(0)
    settings = {**SETTINGS, **({"alpha": 1.0} if inner == "sid" else {}), **changed}
    config = {"degradation_iterations": 40, "path_points": 3, "backtrack_every": 40, "settings": settings}
    method = DisBack(DisBackConfig.model_validate({"method": inner, **config}), setup)
    return distances(method, setup, folder, 240)


@in_every_convention
def test_the_student_finds_the_teachers_distribution(
    schedule: Schedule, prediction: Prediction, tmp_path: Path
) -> None:
    changed = {"score_weighting": "edm"} if isinstance(schedule, EDM) else {}
    if prediction == "eps":  # an error of eps is one of x0 times sigma / alpha, 14 at the first time
        changed = {"student_lr": 1e-4, "fake_score_lr": 5e-4, "score_weighting": "eps"}
    before, after = distances_after(tmp_path, mixture_setup("line", schedule, prediction), **changed)
    assert after < 0.7 * before, (before, after)


def test_so_it_does_around_another_method(tmp_path: Path) -> None:
    before, after = distances_after(tmp_path, mixture_setup(), "sid")
    assert after < 0.6 * before, (before, after)


def test_a_target_that_stays_at_the_degraded_end_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DisBack, "point", lambda self, iteration: 49 if iteration >= 150 else 0)
    method = build(degradation_iterations=150, path_points=50)
    before, after = distances(method, method.setup, tmp_path, 350)
    assert after > 0.65 * before
