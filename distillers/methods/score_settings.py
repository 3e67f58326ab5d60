"""Settings of the score distillation family (`distillers.methods.score_distillation`)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from distillers.adversary_settings import AdversaryConfig
from distillers.losses.score import Weighting
from distillers.methods.base import Betas
from distillers.methods.few_step import RolledOutConfig

Interval = tuple[float, float]


class ScoreDistillationConfig(RolledOutConfig):
    """Settings of the whole family. The defaults are DMD2's for SD1.5 where its public code has them."""

    guidance_scale: float = Field(
        1.75, ge=0, description="teacher's guidance w: uncond + w (cond - uncond); 1.0 turns it off"
    )
    guidance_interval: Interval | None = Field(
        None, description="(low, high): guide only at times in this range; at all times if left out"
    )
    student_every: int = Field(
        5, ge=1, description="updates of the fake score per update of the student (ImageNet, SDXL 5; SD1.5 10)"
    )
    share_samples: bool = Field(True, description="the fake score reuses the samples of the student's turn")
    dm_weight: float = Field(1.0, gt=0, description="weight of the distribution matching loss")
    dm_times: Interval = Field((0.021, 0.981), description="range of the distribution matching's times, uniform")
    dm_levels: Interval | None = Field(
        None, description="(mean, std): draw these times with a normal ln(sigma / alpha) instead"
    )
    score_times: Interval = Field((0.001, 1.0), description="range of the fake score's training times, uniform")
    score_levels: Interval | None = Field(
        None, description="(mean, std): draw these times with a normal ln(sigma / alpha) instead"
    )
    score_weighting: Weighting = Field("eps", description="prediction whose squared error trains the fake score")
    sigma_data: float = Field(1.0, gt=0, description="standard deviation of the latents, for the 'edm' weighting")
    gan_weight: float = Field(1e-3, ge=0, description="weight of the student's adversarial loss; 0 turns the GAN off")
    discriminator_weight: float = Field(
        1e-2, gt=0, description="weight of the discriminator's loss in the fake score's"
    )
    gan_features: Literal["fake_score", "teacher"] = Field(
        "fake_score", description="network on whose bottleneck the head stands; in the paper the fake score"
    )
    gan_times: Interval = Field((0.001, 1.0), description="range of the discriminator's times, uniform")
    share_times: bool = Field(
        False, description="show the discriminator the noised images of the score losses, which saves a pass each turn"
    )
    r1_weight: float = Field(0.0, ge=0, description="weight of the approximate R1 penalty (usually 100 to 1000)")
    r1_noise: float = Field(0.1, gt=0, description="standard deviation of the noise in that penalty")
    adversary: AdversaryConfig | None = Field(
        None, description="a second discriminator, on blocks of the frozen teacher; none if left out"
    )
    adversary_weight: float = Field(
        1.0,
        gt=0,
        description="norm of its gradient with respect to the student's images, relative to the matching loss's",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="optimizer of every network; muon updates matrices along their orthogonalised momentum"
    )
    student_lr: float = Field(1e-5, gt=0, description="the student's learning rate")
    fake_score_lr: float = Field(1e-5, gt=0, description="the fake score's learning rate")
    head_lr: float | None = Field(
        None, gt=0, description="the discriminator head's learning rate; the fake score's if left out"
    )
    student_betas: Betas = Field(
        (0.9, 0.999), description="AdamW's betas for the student; beta1 = 0 makes adversarial training more stable"
    )
    critic_betas: Betas = Field((0.9, 0.999), description="AdamW's betas for the fake score and its head")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay of all networks")
    warmup: int = Field(500, ge=0, description="updates over which each network's learning rate rises to its value")
    fake_score_lora: bool = Field(
        False, description="in a LoRA job, train only adapters of the fake score too; if false, all its weights"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name in ("dm_times", "score_times", "gan_times", "guidance_interval"):
            interval = getattr(self, name)
            if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
                raise ValueError(f"{name}: {interval} must be (low, high) with 0 <= low <= high <= 1")
            if interval is not None and name != "guidance_interval" and interval[0] < 0.001:
                raise ValueError(f"{name}: {interval} must not start below 0.001, where there is no noise")
        for name in ("dm_levels", "score_levels"):
            levels = getattr(self, name)
            if levels is not None and levels[1] <= 0:
                raise ValueError(f"{name}: {levels} must be (mean, std) with std above 0")
        return self


class TurnAboutConfig(ScoreDistillationConfig):
    """Settings of methods before DMD2: student and fake score alternate, without guidance or a discriminator.

    As in their public code, which is EDM's, there is no warm-up and the fake score has EDM's weighting. AdamW's weight
    decay of 0.01, where they use Adam without, is the family's: at their learning rate of 1e-5, an update shrinks the
    weights by a ten-millionth. Their code updates the fake score first, on samples of its own, and then the student; here
    the student is updated first and its samples are shared, as in DMD2, so that the fake score is one update of the student
    further behind (``share_samples = false`` undoes this, for another evaluation).
    """

    guidance_scale: float = Field(
        1.0, ge=0, description="teacher's guidance w: uncond + w (cond - uncond); 1.0, the paper's, turns it off"
    )
    student_every: int = Field(1, ge=1, description="updates of the fake score per update of the student")
    gan_weight: float = Field(
        0.0, ge=0, description="weight of the student's adversarial loss; 0, the paper's, turns it off"
    )
    student_betas: Betas = Field((0.0, 0.999), description="AdamW's betas for the student")
    critic_betas: Betas = Field((0.0, 0.999), description="AdamW's betas for the fake score and its head")
    score_weighting: Weighting = Field("edm", description="prediction whose squared error trains the fake score")
    warmup: int = Field(0, ge=0, description="updates over which each network's learning rate rises to its value")
