"""Turns a request and a model into a plan: all values filled in, and wrong ones refused. Pure."""

from dataclasses import asdict, dataclass

from service.engine.base import BadRequest, DrawRequest, ModelInfo
from weights.contracts import Diversity, StepSchedule, StudentManifest
from weights.trajectory import (
    CannotDraw,
    base_leg_evaluations,
    base_leg_scales,
    base_leg_start,
    base_leg_times,
    evaluations_per_call,
    schedule_for,
)

MAX_BASE_STEPS = 100
HOPELESS = 2.0
"""A request that is predicted to take more than this many times its limit is not even tried."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a request is carried out."""

    model: str
    steps: int
    guidance_scale: float
    schedule: StepSchedule | None
    """Schedule of a student; None if the base itself generates the images."""
    diversity: Diversity | None
    evaluations: int
    """Network evaluations per image."""
    embeds_guidance: bool = False
    """Whether the network takes the guidance scale as an input, and so needs no unconditional prompt."""

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional (or negative) prompt has any effect."""
        guided = self.guidance_scale != 1 and not self.embeds_guidance
        leg = [] if self.diversity is None else base_leg_scales(self.diversity)
        return guided or any(scale != 1 for scale in leg)


def plan_base(request: DrawRequest, info: ModelInfo) -> Plan:
    """The plan for a base model.

    Raises:
        BadRequest: there are too many steps, or diversity is requested, which only students have.
    """
    if request.diversity is not None:
        raise BadRequest(
            f"diversity: {info.id!r} is a base model, and only students have a base to do their first step; leave diversity "
            "out, or name a student",
            "diversity",
        )
    steps = request.steps if request.steps is not None else info.default_steps
    if not 1 <= steps <= info.max_steps:
        raise BadRequest(f"{info.id!r} supports 1 to {info.max_steps} steps, not {steps}", "steps")
    scale = request.guidance_scale if request.guidance_scale is not None else info.default_guidance
    return Plan(
        model=info.id,
        steps=steps,
        guidance_scale=scale,
        schedule=None,
        diversity=None,
        evaluations=steps if info.embeds_guidance else steps * evaluations_per_call(scale),
        embeds_guidance=info.embeds_guidance,
    )


def plan_student(request: DrawRequest, manifest: StudentManifest) -> Plan:
    """The plan for a student.

    Raises:
        BadRequest: the student supports fewer steps, or diversity would leave it none of them.
    """
    steps = request.steps if request.steps is not None else max(manifest.schedules)
    try:
        schedule = schedule_for(manifest.schedules, steps)
    except CannotDraw:
        most = max(manifest.schedules)
        raise BadRequest(f"{manifest.name!r} supports 1 to {most} step(s), not {steps}", "steps") from None
    scale = request.guidance_scale if request.guidance_scale is not None else manifest.guidance.default_scale
    embedded = manifest.guidance.embedded
    if embedded is not None and not embedded[0] <= scale <= embedded[1]:
        raise BadRequest(
            f"{manifest.name!r} was made for guidance scales from {embedded[0]:g} to {embedded[1]:g}, not {scale:g}",
            "guidance_scale",
        )
    cost = evaluations_per_call(scale) if embedded is None else 1
    diversity = _diversity(request, manifest, schedule)
    evaluations = steps * cost
    if diversity is not None:
        try:
            base_leg_times(schedule, diversity)
        except CannotDraw as error:
            raise BadRequest(f"diversity: {error}", "diversity") from None
        evaluations = (steps - diversity.skip) * cost + base_leg_evaluations(diversity)
    return Plan(
        model=manifest.name,
        steps=steps,
        guidance_scale=scale,
        schedule=schedule,
        diversity=diversity,
        evaluations=evaluations,
        embeds_guidance=embedded is not None,
    )


def _diversity(request: DrawRequest, manifest: StudentManifest, schedule: StepSchedule) -> Diversity | None:
    """The student's calibration, overridden by the values in the request; its start is always a number.

    If the request asks for a single base step, there is no room for a calibrated step without the prompt: it is left
    out.

    Raises:
        BadRequest: the request's values contradict each other.
    """
    if request.diversity is None:
        return None
    wished = {name: value for name, value in asdict(request.diversity).items() if value is not None}
    if "skip" in wished:
        wished.setdefault("until", None)  # at that step's own time, whatever the calibration says
    values = (manifest.diversity or Diversity()).model_dump() | wished
    if values["base_steps"] == 1:
        if "unprompted" not in wished:
            values["unprompted"] = 0.0
        elif values["unprompted"]:
            raise BadRequest(
                f"diversity: unprompted {values['unprompted']:g} needs base_steps of at least 2; for a single step without "
                "the prompt, set base_guidance to 0",
                "diversity",
            )
    used = Diversity(**values)
    return used.model_copy(update={"start": base_leg_start(schedule, used)})


def check_size(request: DrawRequest, model: str, size: int | None) -> None:
    """Refuse a size other than the model's, which is None if it is unknown until the model is loaded.

    Raises:
        BadRequest: the request names another size.
    """
    if size is None or request.size is None or request.size == (size, size):
        return
    width, height = request.size
    raise BadRequest(f"{model!r} generates images of {size}x{size}, not {width}x{height}", "size")


def check_time(seconds: float, limit: float) -> None:
    """Refuse a request that cannot be finished in time even by itself.

    Predictions may be wrong, so a request that would be only somewhat late is tried if no other request waits.

    Args:
        seconds: predicted time of the request's own work.
        limit: time within which it has to be finished.

    Raises:
        BadRequest: it would take more than `HOPELESS` times its limit.
    """
    if seconds > HOPELESS * limit:
        message = (
            f"the request alone would take about {seconds:.1f} s, but has only {limit:g} s (FEWSTEP_REQUEST_TIMEOUT, or "
            "the request's own limit if that is lower): ask for fewer steps or fewer images"
        )
        raise BadRequest(message, "steps")
