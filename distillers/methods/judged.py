"""Base classes of methods whose discriminator heads are updated in turns of their own, after the student's."""

from distillers.adversary import Adversary
from distillers.adversary_settings import AdversaryConfig
from distillers.methods.base import Betas, OptimizerSettings, Setup, Trained, Turn
from distillers.methods.few_step import FewStepConfig, FewStepMethod


class JudgedConfig(AdversaryConfig, FewStepConfig):
    """Settings of a method that trains a student and discriminator heads; each method sets its own defaults."""

    student_every: int
    student_lr: float
    student_betas: Betas
    weight_decay: float
    warmup: int


class Judged(FewStepMethod):
    """Builds the discriminator, and updates the student before the heads."""

    config: JudgedConfig

    def __init__(self, config: JudgedConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.adversary = Adversary(config, setup)

    def trained(self) -> dict[str, Trained]:
        config = self.config
        optimizer = OptimizerSettings(
            lr=config.student_lr, betas=config.student_betas, weight_decay=config.weight_decay, warmup=config.warmup
        )
        return {
            "student": Trained(module=self.student.network, optimizer=optimizer, average=True),
            "heads": self.adversary.trained(config.weight_decay, config.warmup),
        }

    def turns(self, iteration: int) -> list[Turn]:
        critic = Turn(name="critic", trains=("heads",))
        if (iteration + 1) % self.config.student_every == 0:
            return [Turn(name="student", trains=("student",)), critic]
        return [critic]
