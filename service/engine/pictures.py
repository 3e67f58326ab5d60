"""Images in progress, and the requests that they belong to: how far each one is, and what it waits for.

An image waits for its request's prompts, then for a network at each step, then for the decoder; if exact previews are
due, also for the decoder in between. Everything but `Ticket` is used only on the engine's thread.
"""

from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ParamSpec, TypeVar

import torch
from numpy import uint8
from numpy.typing import NDArray
from torch import Tensor

from service.engine.base import Drawn, DrawRequest, EngineError, Preview, StepTaken
from service.engine.costs import Costs
from service.engine.line import Order, Place
from service.engine.parts import parts_of
from service.engine.plan import Plan
from service.engine.resident import Resident
from service.engine.scheduler import Group
from service.engine.text import Prompt
from weights.contracts import Diversity, StepSchedule
from weights.denoiser import GUIDANCE, Cond, Denoiser
from weights.diffusion.samplers import ImageNoise
from weights.diffusion.schedules import Schedule
from weights.trajectory import Leg, Trajectory, TrajectoryStep, base_trajectory, student_trajectory

P = ParamSpec("P")
R = TypeVar("R")

WAYS = 256
"""Most trajectories that are cached, since clients may ask for any guidance scale."""


@dataclass(frozen=True, kw_only=True)
class Painted:
    """Decoded pixels that have not been made into an image yet."""

    pixels: NDArray[uint8]
    """``(H, W, 3)``."""
    size: int
    """Side length of the image; the pixels may be fewer."""
    tell: Callable[..., Preview | Drawn]
    """Creates the result, given the ``image``."""

    @property
    def whole(self) -> bool:
        """Whether the pixels need no scaling, which would have to be done off the event loop."""
        return self.pixels.shape[1] == self.size


@dataclass(eq=False, kw_only=True)
class Ticket:
    """One admitted request, shared by the event loop and the engine's thread."""

    request: DrawRequest
    model: str
    """The request's model, or the default."""
    place: Place
    send: Callable[[Painted | EngineError], None]
    """Sends a result to whoever waits for the request; thread-safe."""
    began: float | None = None
    """When its first call was made, by ``time.perf_counter``; None before."""
    left: int = field(init=False)
    """Images that are not finished."""
    over: bool = False
    """There is nothing left to do: all images are finished, the request has failed, or nobody waits for it."""
    context: Context = field(default_factory=copy_context)
    """The context in which it was admitted, which has the request's id for the log."""

    def __post_init__(self) -> None:
        self.left = len(self.request.seeds)

    def within(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function on behalf of the request: its log lines have the request's id. Thread-safe."""
        return self.context.copy().run(call, *args, **kwargs)  # a context can be entered by one thread at a time

    def end(self, error: EngineError) -> None:
        """End the request with an error, and free its place in the queue at once. Thread-safe."""
        if not self.over:
            self.over = True
            self.place.leave()
            self.send(error)


class ActiveRequest:
    """A request whose model is in memory, and its unfinished images.

    Args:
        ticket: the request, and who waits for it.
        resident: the model.
        plan: how to generate the images.
        costs: predicts the remaining work.
    """

    def __init__(self, ticket: Ticket, resident: Resident, plan: Plan, costs: Costs) -> None:
        self.ticket, self.resident, self.plan = ticket, resident, plan
        request, base = ticket.request, resident.base
        self.trajectory = _trajectory(resident, plan)
        self.groups, self.decoder, text = _groups(resident, plan, request.deterministic)
        self.cond = Prompt(base, text, request.prompt)
        self.uncond = Prompt(base, text, request.negative_prompt)
        self.texts: dict[Prompt, Cond] = {}
        self.empty = Prompt(base, text, "")
        self.prompts = tuple(dict.fromkeys(prompt for step in self.trajectory.steps for prompt in self.told(step)))
        self.preview_steps = shown_steps(len(self.trajectory.steps), request.previews)
        self.seconds_left = self._seconds_left(costs)
        orders = ticket.place.orders(len(request.seeds))
        self.order = ticket.place.order
        ticket.place.begin()
        self.pictures = [Picture(self, index, order) for index, order in enumerate(orders)]

    def told(self, step: TrajectoryStep) -> tuple[Prompt, ...]:
        """The prompts of a step's rows: the image's own, the unconditional one, or both, unconditional first."""
        if step.unprompted:
            return (self.empty,)
        if step.tells_guidance or step.guidance_scale == 1:
            return (self.cond,)
        return (self.uncond,) if step.guidance_scale == 0 else (self.uncond, self.cond)

    @property
    def missing(self) -> list[Prompt]:
        """The prompts that it waits for."""
        return [prompt for prompt in self.prompts if prompt not in self.texts]

    def progressed(self) -> None:
        """Update the queue with the remaining work."""
        self.ticket.place.progress(sum(self.seconds_left[picture.step] for picture in self.pictures))

    def done(self, picture: "Picture", pixels: NDArray[uint8], now: float) -> None:
        """Send an image that has been decoded; the last one ends the request."""
        assert self.ticket.began is not None, "nothing is decoded before the first call"
        self.pictures.remove(picture)
        self.ticket.left -= 1
        self.progressed()  # before a client that receives the image can leave the queue
        manifest = self.resident.manifest
        job = manifest.job if manifest is not None else None
        steps = self.trajectory.steps
        tell = partial(
            Drawn,
            seed=self.ticket.request.seeds[picture.index],
            model=self.plan.model,
            steps=self.plan.steps,
            guidance_scale=self.plan.guidance_scale,
            diversity=self.plan.diversity,
            evaluations=self.trajectory.evaluations,
            seconds=now - self.ticket.began,
            student=self.resident.member,
            base=manifest.base.id if manifest is not None else None,
            job=job.sha256 if job is not None else None,
            loras=self.resident.loras,
            index=picture.index,
            path=tuple(StepTaken(leg=step.leg, t=step.t, guidance_scale=step.guidance_scale) for step in steps),
        )
        self.ticket.send(Painted(pixels=pixels, size=self.resident.base.size, tell=tell))
        if not self.pictures:
            self.ticket.over = True
            self.ticket.place.leave()  # however long the client takes to read the response

    def show(self, picture: "Picture", pixels: NDArray[uint8]) -> None:
        """Send a preview of the image after its latest step."""
        tell = partial(
            Preview,
            index=picture.index,
            seed=self.ticket.request.seeds[picture.index],
            step=picture.step,
            steps=len(self.trajectory.steps),
        )
        self.ticket.send(Painted(pixels=pixels, size=self.resident.base.size, tell=tell))

    def _seconds_left(self, costs: Costs) -> list[float]:
        """Predicted seconds left for an image, by the number of steps it has made, including the final decoding."""
        alone = self.ticket.request.deterministic
        decoding = costs.predict([(self.decoder.part, 1)], alone)
        left = [decoding]
        for number, step in reversed(list(enumerate(self.trajectory.steps, 1))):
            shown = self.ticket.request.exact_previews and number in self.preview_steps
            own = costs.predict([(self.groups[step.leg].part, step.evaluations)], alone)
            left.append(left[-1] + own + shown * decoding)
        return left[::-1]


class Picture:
    """One image in progress: a `service.engine.scheduler.Work`, once its request's prompts are encoded."""

    def __init__(self, request: ActiveRequest, index: int, order: Order) -> None:
        self.request, self.index, self.order = request, index, order
        base = request.resident.base
        seeds = [request.ticket.request.seeds[index]]
        self.noise = ImageNoise(seeds, base.latent_shape(), base.device, base.step_noise)
        self.x = request.trajectory.first_state(self.noise()[0])
        """State ``(C, h, w)``; after the last step, the clean latents."""
        for _ in range(request.trajectory.skipped_draws):
            self.noise()
        self.step = 0
        """Number of steps made."""
        self.shown: Tensor | None = None
        """An x_0 ``(C, h, w)`` that waits for the decoder, to be shown as a preview."""

    @property
    def next_step(self) -> TrajectoryStep:
        """The step it waits for; an error if all steps are made."""
        return self.request.trajectory.steps[self.step]

    @property
    def decodes(self) -> bool:
        """Whether it waits for the decoder."""
        return self.shown is not None or self.step == len(self.request.trajectory.steps)

    @property
    def latents(self) -> Tensor:
        """The latents ``(C, h, w)`` that wait for the decoder."""
        return self.x if self.shown is None else self.shown

    @property
    def group(self) -> Group:
        """See `Work.group`."""
        return self.request.decoder if self.decodes else self.request.groups[self.next_step.leg]

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser of its next step."""
        request = self.request
        own = self.next_step.leg == "student" or request.plan.schedule is None
        return (request.resident.model if own else request.resident.base).denoiser

    @property
    def rows(self) -> int:
        """See `Work.rows`."""
        return 1 if self.decodes else self.next_step.evaluations

    def conditions(self) -> list[Cond]:
        """The conditions of the next step's rows; see `ActiveRequest.told`."""
        step = self.next_step
        conds = [self.request.texts[prompt] for prompt in self.request.told(step)]
        if step.tells_guidance:
            scale = torch.tensor([step.guidance_scale], device=self.x.device)
            return [{**cond, GUIDANCE: scale} for cond in conds]
        return conds

    def advance(self, x: Tensor, x0: Tensor) -> bool:
        """Move on by one step; return whether an approximate preview is due.

        Args:
            x: the new state ``(C, h, w)``.
            x0: the network's prediction, ``(C, h, w)``.
        """
        self.x = x
        self.step += 1
        if self.step not in self.request.preview_steps:
            return False
        if self.request.ticket.request.exact_previews:
            self.shown = x0
        return self.shown is None


def shown_steps(steps: int, previews: int) -> frozenset[int]:
    """The steps (from 1) after which to show a preview: evenly spread, and at most all but the last."""
    count = min(previews, steps - 1)
    return frozenset(number * steps // (count + 1) for number in range(1, count + 1))


def _trajectory(resident: Resident, plan: Plan) -> Trajectory:
    base, own = resident.base.denoiser, resident.model.denoiser
    schedule = None if plan.schedule is None else plan.schedule.model_dump_json()
    return _way(
        own.schedule,
        schedule,
        plan.steps,
        plan.guidance_scale,
        own.embeds_guidance,
        plan.diversity,
        base.embeds_guidance,
    )


@lru_cache(maxsize=WAYS)
def _way(
    diffusion: Schedule,
    schedule: str | None,
    steps: int,
    guidance_scale: float,
    tells_guidance: bool,
    diversity: Diversity | None,
    base_tells_guidance: bool,
) -> Trajectory:
    """The trajectory for these values, cached: computing one takes as long as some calls of a small network.

    ``schedule`` is a student's, as JSON, which is hashable; None for a base, which only needs ``steps``.
    """
    if schedule is None:
        return base_trajectory(diffusion, steps, guidance_scale, tells_guidance=tells_guidance)
    return student_trajectory(
        diffusion,
        StepSchedule.model_validate_json(schedule),
        guidance_scale,
        tells_guidance=tells_guidance,
        diversity=diversity,
        base_tells_guidance=base_tells_guidance,
    )


def _groups(resident: Resident, plan: Plan, alone: bool) -> tuple[dict[Leg, Group], Group, Group]:
    """The groups of each leg's network, of the decoder and of the text encoder."""
    own = Group(parts_of(resident.model).network, resident.model, alone, resident.member or plan.model)
    parts = parts_of(resident.base)
    name = resident.manifest.base.id if resident.manifest is not None else plan.model
    base, decoder, text = (
        Group(part, resident.base, alone, name) for part in (parts.network, parts.decoder, parts.text)
    )
    # A base that generates by itself may have LoRAs, and then differs from the base whose decoder it shares.
    return {"base": own if plan.schedule is None else base, "student": own}, decoder, text
