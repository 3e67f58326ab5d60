"""The hybrid: both losses in one turn, the heads' in another, and a student that finds the teacher's distribution."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distillers.methods.base import Turn
from distillers.methods.hybrid import Hybrid, HybridConfig
from distillers.methods.scm import SCM, SCMConfig
from tests.distillers.conventions import in_every_convention
from tests.distillers.mixtures import VP, distances, mixture_setup, step_of
from weights.denoiser import GUIDANCE, Cond
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import Schedule

STUDENT = Turn(name="student", trains=("student", "log_variance"))
CRITIC = Turn(name="critic", trains=("heads",))


def build(schedule: Schedule = VP, prediction: Prediction = "v", **config: Any) -> Hybrid:
    torch.manual_seed(0)
    times = {"time_mean": -0.3, "time_std": 1.4}  # sCM's, which suit so small a mixture better than SANA-Sprint's
    settings = {"guidance_scale": 1.0, **times, **config}
    return Hybrid(HybridConfig(**settings), mixture_setup("line", schedule, prediction))


@pytest.mark.parametrize(("field", "value"), [("adversarial_weight", 0.0), ("noise_share", 1.5), ("head_kernel", 2)])
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        HybridConfig.model_validate({field: value})
    assert field in str(error.value)


def test_the_students_loss_is_both() -> None:
    method = build(adversarial_weight=0.25)
    torch.manual_seed(0)
    alone = SCM(SCMConfig(guidance_scale=1.0), mixture_setup())
    found = method.loss(STUDENT, step_of(method.setup, 8))
    consistency = alone.consistency_loss(step_of(alone.setup, 8)).loss
    assert torch.equal(found.metrics["student/consistency"], consistency.detach())
    assert torch.allclose(found.loss, consistency + 0.25 * found.metrics["student/adversarial"])


def test_the_heads_judge_the_students_own_pictures() -> None:
    method, scratch = build(), {}
    method.loss(STUDENT, step_of(method.setup, 8, scratch=scratch))
    judged = scratch["samples"]
    assert not judged.requires_grad
    asked = []
    right = method.adversary.critic_loss
    method.adversary.critic_loss = lambda x, *given: asked.append(x) or right(x, *given)  # type: ignore[method-assign,func-returns-value,assignment]
    method.loss(CRITIC, step_of(method.setup, 8, scratch=scratch)).loss.backward()
    assert asked[0] is judged
    assert all(weight.grad is None for weight in method.student.network.parameters())


def test_a_student_that_is_told_its_guidance_is_judged_without_it() -> None:
    method = build(guidance_range=(4.0, 5.0), guidance_scale=4.5)
    told: list[Tensor] = []
    right, judge = method.student.denoiser.forward, method.adversary.student_loss

    def student(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told.append(cond[GUIDANCE])
        return right(x_t, t, cond)

    def judged(x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        assert cond.keys() == {"label"}
        return judge(x, cond, generator)

    method.student.denoiser.forward = student  # type: ignore[method-assign]
    method.adversary.student_loss = judged  # type: ignore[method-assign]
    method.loss(STUDENT, step_of(method.setup, 8)).loss.backward()
    assert len(told) == 3 and all(4 <= scale <= 5 for each in told for scale in each)


@in_every_convention
def test_the_student_finds_the_teachers_distribution(
    schedule: Schedule, prediction: Prediction, tmp_path: Path
) -> None:
    method = build(
        schedule, prediction, lr=1.5e-3, head_lr=1e-3, tangent="finite_difference", tangent_warmup=10,
        prior_weighting=False, finite_difference_step=0.01, adversarial_weight=0.02,
    )  # fmt: skip
    before, after = distances(method, method.setup, tmp_path, 80, batch_size=64)
    assert after < 0.7 * before, (before, after)
