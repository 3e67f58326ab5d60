"""Teacher score matching: a network of another size learns the teacher's predictions.

Multi-Student Distillation, Song et al. 2024, https://arxiv.org/abs/2410.23274, section 4.3. A distillation that starts
from the teacher's weights needs a student of the teacher's shape. A smaller one first learns to denoise like the
teacher, on noised real images x (equation 6),

    loss = lambda_t |S(x_t, t) - T(x_t, t)|^2,    x_t = alpha_t x + sigma_t eps,  t uniform        S, T: x_0 estimates

and then is a teacher of its own size, whose few-step images are as poor as any teacher's. The next job distils it
(``start`` names this job's student) with any other method, such as dmd2, first without and then with the discriminator.
The job's ``network`` lists the settings that differ from the teacher's. With a partition, each student starts from the
one of its own part.

lambda_t makes this the squared error of the prediction named by ``weighting`` (`distillers.losses.score`). Departures:
the paper's lambda_t is EDM's, for its EDM teachers; the default here is that of v, which on a variance-preserving
schedule is EDM's with sigma_data = 1.
"""

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, no_grad

from distillers.critics import guided_x0
from distillers.losses.score import Weighting, denoising_loss, score_weight
from distillers.methods.base import Step, Turn, TurnLoss
from distillers.methods.few_step import LoneStudent, LoneStudentConfig, check_told_times
from distillers.rollout import draw_noise, draw_times
from weights.diffusion.schedules import add_noise


class ScoreMatchingConfig(LoneStudentConfig):
    """Settings of score matching. The schedules are for the sample sheets, and for the stage that follows."""

    guidance_scale: float = Field(
        1.0,
        ge=0,
        description="teacher's guidance w: uncond + w (cond - uncond); 1.0 leaves it to the next stage",
    )
    times: tuple[float, float] = Field((0.001, 1.0), description="range of the training times, which are uniform")
    weighting: Weighting = Field("v", description="prediction whose squared error is minimised")
    sigma_data: float = Field(1.0, gt=0, description="standard deviation of the latents, for the 'edm' weighting")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of the student")
    warmup: int = Field(500, ge=0, description="updates over which the student's learning rate rises to its value")

    @model_validator(mode="after")
    def _is_told_the_times_of_its_states(self) -> Self:
        check_told_times(self.schedules)
        return self

    @model_validator(mode="after")
    def _times_lie_inside(self) -> Self:
        if not 0.001 <= self.times[0] <= self.times[1] <= 1:
            raise ValueError(f"times: {self.times} must be (low, high) with 0.001 <= low <= high <= 1")
        return self


class ScoreMatching(LoneStudent):
    """See the module docstring."""

    name = "score_matching"
    Config = ScoreMatchingConfig
    config: ScoreMatchingConfig

    @classmethod
    def needs_pictures(cls, config: ScoreMatchingConfig) -> str | None:
        return "the student learns the teacher's predictions on noised real images"

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        config, (real, cond) = self.config, step.batch.pictures
        schedule = self.teacher.schedule
        t = draw_times(len(real), config.times, step.local, real.device)
        x_t = add_noise(schedule, real, draw_noise(tuple(real.shape), step.local, real.device), t)
        with no_grad():
            answer: Tensor = guided_x0(self.teacher, x_t, t, cond, self.setup.uncond, config.guidance_scale)
        weight = score_weight(schedule.alpha(t), schedule.sigma(t), config.weighting, config.sigma_data)
        learned = self.student.denoiser(x_t, t, cond)
        gap = (learned.detach() - answer).square().mean().sqrt()
        return TurnLoss(loss=denoising_loss(learned, answer, weight), metrics={"student/gap": gap})
