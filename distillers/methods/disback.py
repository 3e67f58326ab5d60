"""DisBack: distribution backtracking for any score distillation (Zhang et al. 2024, https://arxiv.org/abs/2408.15991).

A student starts far from its teacher, where the teacher's score is least reliable. DisBack first records a path of
degraded teachers from the teacher to the initial student, and then distils along it backwards:

    degradation   the fake score, initialised from the teacher, learns the score of the initial student's images
                  (section 4.2); the path consists of its weights at ``path_points`` equally spaced iterations
    backtracking  the method named by ``method`` distils (section 4.3), with a point of the path as its teacher: first
                  the last but one, then one point back every ``backtrack_every`` iterations, finally the teacher

The last point of the path is the fake score itself as backtracking starts, already fitted to the student. The other
points are kept on the CPU and in the checkpoints, and dropped once the target has passed them. ``method`` can be any of
the family (`distillers.methods.score_distillation`), with its own ``settings``.

Departures: the paper degrades the teacher until it has converged on the student; here degradation takes a fixed number
of iterations, so that a resumed job is identical to an uninterrupted one. Classifier-free guidance applies to the
points of the path as it does to the teacher. If the wrapped method has a discriminator (``gan_weight`` above 0, which
the paper's does not), degradation trains it as well, so that it can judge when backtracking starts; its loss reaches the
fake score as in every later turn, and the path is then not one of pure score matching.
"""

from typing import Any, Self, cast

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from distillers.methods.base import Method, MethodConfig, Setup, Step, Trained, Turn, TurnLoss, Workspace
from distillers.methods.score_distillation import ScoreDistillation
from distillers.methods.score_settings import ScoreDistillationConfig
from weights.contracts import GuidanceConvention, StepSchedule
from weights.denoiser import Denoiser
from weights.families.base import TextToImage
from weights.fields import no_such_field


class DisBackConfig(MethodConfig):
    """Settings of DisBack: of the path, and of the method that distils along it."""

    method: str = Field("dmd2", description="the score distillation to run along the path: dmd2, sid, f_distill, ...")
    settings: dict[str, Any] = Field(default_factory=dict, description="that method's own settings")
    degradation_iterations: int = Field(
        1000, ge=1, description="iterations in which the fake score alone is trained on the student's images"
    )
    path_points: int = Field(5, ge=1, description="points recorded on the way; the last is the degraded end")
    backtrack_every: int = Field(500, ge=1, description="iterations after which the target moves back by one point")

    @model_validator(mode="after")
    def _method_is_of_the_family(self) -> Self:
        inner = self.inner()
        if getattr(inner, "regression_iterations", 0):
            raise ValueError(
                "settings: regression_iterations must be 0, since the path depends on the student that the regression "
                "makes: run the regression in a job of its own, and let this one start from its student"
            )
        if self.path_points > self.degradation_iterations:
            raise ValueError(
                f"path_points: {self.path_points} must be at most degradation_iterations, {self.degradation_iterations}"
            )
        return self

    @property
    def least_iterations(self) -> int:
        return self.degradation_iterations + self.backtrack_every * (self.path_points - 1) + 1

    @property
    def teacher_scale(self) -> float:
        return self.inner().teacher_scale

    def scaled(self, factor: float) -> Self:
        return self.model_copy(
            update={
                "degradation_iterations": max(self.path_points, round(factor * self.degradation_iterations)),
                "backtrack_every": max(1, round(factor * self.backtrack_every)),
            }
        )

    def inner(self) -> ScoreDistillationConfig:
        """The settings of the wrapped method.

        Raises:
            ValueError: the family has no such method, or its settings are invalid.
        """
        from distillers.methods import methods  # not at the top: that package imports this module

        family = {name: each for name, each in methods().items() if issubclass(each, ScoreDistillation)}
        if self.method not in family:
            raise ValueError(
                f"method: {self.method!r} is not a score distillation: use one of {', '.join(sorted(family))}"
            )
        try:
            return cast(ScoreDistillationConfig, family[self.method].Config.model_validate(self.settings))
        except ValidationError as error:
            wrapped = family[self.method].Config
            raise ValueError("; ".join(_told(dict(each), wrapped) for each in error.errors())) from error


def _told(error: dict[str, Any], config: type[MethodConfig]) -> str:
    """One of pydantic's errors about the wrapped method's settings, with the bad value and what is allowed."""
    field, given = ".".join(["settings", *map(str, error["loc"])]), error["input"]
    unknown = error["type"] == "extra_forbidden"
    message = no_such_field(config, error["loc"]) if unknown else error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, dict) else f" (got {given!r})"
    return f"{field}: {message}{shown}"


class DisBack(Method):
    """See the module docstring."""

    name = "disback"
    Config = DisBackConfig

    def __init__(self, config: DisBackConfig, setup: Setup) -> None:
        from distillers.methods import method

        self.config, self.setup = config, setup
        settings = config.inner()
        self.inner = cast(ScoreDistillation, method(config.method)(settings, setup))
        self.path: dict[int, dict[str, Tensor]] = {}
        """Weights by point, from 1; the last point is the fake score itself and not stored here."""
        self._learning = [name for name, weight in self._fake_weights().items() if weight.requires_grad]
        self._target = setup.new_network(settings.fake_score_lora)
        self._target.network.requires_grad_(False).eval()
        self._target_point = 0

    @classmethod
    def needs_pictures(cls, config: DisBackConfig) -> str | None:
        from distillers.methods import method

        return method(config.method).needs_pictures(config.inner())

    @property
    def student(self) -> TextToImage:
        return self.inner.student

    def trained(self) -> dict[str, Trained]:
        return self.inner.trained()

    def turns(self, iteration: int) -> list[Turn]:
        done = iteration - self.config.degradation_iterations
        return [self.inner.critic_turn()] if done < 0 else self.inner.turns(done)

    def schedules(self) -> dict[int, StepSchedule]:
        return self.inner.schedules()

    def guidance(self) -> GuidanceConvention:
        return self.inner.guidance()

    def prepare(self, workspace: Workspace) -> None:
        self.inner.prepare(workspace)

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        self.inner.teacher = self._teacher_at(step.iteration)
        return self.inner.loss(turn, step)

    def point(self, iteration: int) -> int:
        """The point of the path that is the target at that iteration; 0 is the teacher."""
        done = iteration - self.config.degradation_iterations
        return max(0, self.config.path_points - 1 - done // self.config.backtrack_every) if done >= 0 else 0

    def _teacher_at(self, iteration: int) -> Denoiser:
        """The denoiser that serves as the teacher at that iteration."""
        point = self.point(iteration)
        if point == 0:
            return self.setup.teacher
        if point != self._target_point:
            self._target.network.load_state_dict(self.path[point], strict=False)  # frozen weights are never stored
            self._target_point = point
        return self._target.denoiser

    @torch.no_grad()
    def after_step(self, turn: Turn, iteration: int) -> None:
        self.inner.after_step(turn, iteration)
        length, points = self.config.degradation_iterations, self.config.path_points
        for point in range(1, points):
            if iteration + 1 == point * length // points:
                weights = self._fake_weights()
                self.path[point] = {name: weights[name].detach().cpu().clone() for name in self._learning}
        if iteration >= length:
            following = self.point(iteration + 1)
            self.path = {point: weights for point, weights in self.path.items() if point <= following}

    def _fake_weights(self) -> dict[str, nn.Parameter]:
        return dict(self.inner.fake_score_network.named_parameters())

    def state(self) -> dict[str, Tensor]:
        path = {f"path.{point}.{name}": value for point, kept in self.path.items() for name, value in kept.items()}
        return {**path, **{f"inner.{name}": value for name, value in self.inner.state().items()}}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.path, self._target_point = {}, 0
        inner: dict[str, Tensor] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "inner":
                inner[rest] = value
            else:
                point, _, weight = rest.partition(".")
                self.path.setdefault(int(point), {})[weight] = value.cpu()
        self.inner.load_state(inner)
