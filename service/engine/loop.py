"""The engine's thread, tick by tick: one call of a model, for whoever is ready for it, and what follows from its answer."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from service.engine import calls
from service.engine.backends.base import Growing
from service.engine.base import EngineError
from service.engine.costs import CostProfile, Costs
from service.engine.line import Order
from service.engine.observer import Call, Observer
from service.engine.pictures import ActiveRequest, Picture, Ticket
from service.engine.planner import Planner
from service.engine.preview import LinearPreview
from service.engine.resident import Resident
from service.engine.scheduler import Group, batch_of, choose
from service.engine.text import Prompt, PromptCache
from weights.denoiser import Cond
from weights.families import TextToImage
from weights.families.base import PartName
from weights.trajectory import advance

log = logging.getLogger(__name__)

Work = Prompt | Picture

PROGRAMS: dict[Call, PartName] = {"text": "text_encoder", "network": "network", "decoder": "decoder"}
"""What makes each call, where a backend has put something in a part's place."""
FAILED = "the engine failed at this request; the server's log says why"


class DrawingLoop:
    """All admitted requests, and the next call. Everything here is used on one thread, which owns torch and the models.

    Args:
        planner: plans what each request draws.
        costs: of calls; they are kept current.
        prompts: conditions that are encoded already.
        observer: told of every call.
    """

    def __init__(self, planner: Planner, costs: Costs, prompts: PromptCache, observer: Observer) -> None:
        self._planner, self._costs, self._prompts, self._observer = planner, costs, prompts, observer
        self._previews: WeakKeyDictionary[TextToImage, LinearPreview] = WeakKeyDictionary()
        self._active: list[ActiveRequest] = []
        self._wanting: dict[Prompt, list[ActiveRequest]] = {}
        """Who waits for a prompt to be encoded."""
        self.failed = False
        """Whether a call has failed that nobody else shared; whoever looks into it clears this."""
        self._last: Call | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._active)

    def admit(self, ticket: Ticket, resident: Resident) -> None:
        """Take a request in, with its model."""
        if ticket.over:
            return
        try:
            plan = self._planner.plan_with(ticket.request, ticket.model, resident)
            active = ActiveRequest(ticket, resident, plan, self._costs)
            if ticket.request.previews and not ticket.request.exact_previews:
                self.preview_of(resident.base)
        except Exception as error:  # noqa: BLE001 - a bug of ours or of a foreign model; it is logged there
            ticket.end(told(error))
            return
        for prompt in active.prompts:
            known = self._prompts.get(prompt)
            if known is not None:
                active.texts[prompt] = known
            else:
                self._wanting.setdefault(prompt, []).append(active)
        active.progressed()
        self._active.append(active)

    def tick(self) -> None:
        """Make the next call, if there is one. Whatever goes wrong ends requests, never the loop."""
        self._forget_ended()
        if not self._active:
            return
        try:
            ready = self._ready()
            works = choose(ready, self._profile, self._last)
            self._want_larger(works[0].group, ready)
            self._last = works[0].group.part.call
            with torch.inference_mode(), calls.determinism(works[0].group.alone):
                self._call(works)
        except Exception as error:  # noqa: BLE001 - a bug of ours, nobody's in particular; it is logged there
            self.end(told(error))

    def end(self, error: EngineError) -> None:
        """Give up everybody."""
        for request in self._active:
            request.ticket.end(error)

    def clear(self) -> None:
        """Forget everything, for good."""
        self._active, self._wanting = [], {}
        self._prompts.clear()

    def _forget_ended(self) -> None:
        before, self._active = len(self._active), [each for each in self._active if not each.ticket.over]
        if len(self._active) < before:
            left = {p: [each for each in waiting if not each.ticket.over] for p, waiting in self._wanting.items()}
            self._wanting = {prompt: waiting for prompt, waiting in left.items() if waiting}

    def preview_of(self, base: TextToImage) -> LinearPreview:
        """The base's cheap previews, fitted when they are first asked for."""
        if base not in self._previews:
            with torch.inference_mode():
                self._previews[base] = LinearPreview.fit(base)
        return self._previews[base]

    def _ready(self) -> list[Work]:
        """All prompts and pictures that wait for a call, in the line's order."""
        ready: list[tuple[Order, Work]] = []
        wanted: dict[Prompt, Order] = {}
        for request in self._active:
            missing = request.missing
            for prompt in missing:
                wanted[prompt] = min(request.order, wanted.get(prompt, request.order))
            if not missing:
                ready += [(picture.order, picture) for picture in request.pictures]
        ready += [(order, prompt) for prompt, order in wanted.items()]
        return [work for _, work in sorted(ready, key=itemgetter(0))]

    def _profile(self, group: Group) -> CostProfile:
        """Of the group's calls, in those batch sizes that nobody need wait for."""
        profile, program = self._costs.of(group.part), _growing(group)
        return profile if program is None else profile.among(program.made)

    def _want_larger(self, group: Group, ready: Sequence[Work]) -> None:
        """Have a program made for the batch that all that is ready would take, where that is missing."""
        program, profile = _growing(group), self._costs.of(group.part)
        if program is None or group.alone or profile.among(program.made) is profile:
            return
        rows = [work.rows for work in ready if work.group == group and work.rows <= profile.batches[-1]]
        if rows:
            most, _ = profile.best(sum(rows), min(rows))
            program.want(profile.fit(most))

    def _call(self, works: Sequence[Work]) -> None:
        """The call that these share, and what follows."""
        ways: dict[Call, tuple[Callable[..., Any], Callable[..., None]]] = {
            "text": (calls.encode, self._encoded),
            "network": (calls.denoise, self._denoised),
            "decoder": (calls.decode, self._decoded),
        }
        run, take = ways[works[0].group.part.call]
        requests = {request: None for work in works for request in self._waiting(work)}
        for request in requests:
            if request.ticket.began is None:
                request.ticket.began = time.perf_counter()
        for some, answers in self._attempt(works, run):
            take(some, answers)
        for request in requests:
            request.progressed()

    def _attempt(
        self, works: Sequence[Work], run: Callable[[Sequence[Work], int], Any]
    ) -> Iterator[tuple[Sequence[Work], Any]]:
        """The call's answers; where it fails, those of its halves. A single one that fails alone is to blame."""
        try:
            answers = self._timed(works, run)
        except Exception as error:  # noqa: BLE001 - as above
            if len(works) == 1:
                failed, self.failed = told(error), True
                for request in self._waiting(works[0]):
                    request.ticket.end(failed)
                return
            log.warning(
                "a call for %d failed (%s: %s); it is tried again in halves", len(works), type(error).__name__, error
            )
        else:
            yield works, answers
            return
        # Out of the except block: the error's traceback holds the failed call's tensors.
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # a GPU that is broken for good: the halves will say so
                torch.cuda.empty_cache()
        half = len(works) // 2
        for some in (works[:half], works[half:]):
            # Without those whose request has failed by now.
            left = [work for work in some if any(not request.ticket.over for request in self._waiting(work))]
            if left:
                yield from self._attempt(left, run)

    def _timed(self, works: Sequence[Work], run: Callable[[Sequence[Work], int], Any]) -> Any:
        """The call, and what it cost."""
        group, rows = works[0].group, sum(work.rows for work in works)
        batch = batch_of(works, self._profile(group))
        started = time.perf_counter()
        answers = run(works, batch)
        counts = [min(batch, rows - start) for start in range(0, rows, batch)]
        seconds = (time.perf_counter() - started) / len(counts)
        for count in counts:
            self._costs.observe(group.part, batch, seconds)
            self._observer.called(group.part.call, group.name, count, batch, seconds)
        return answers

    def _waiting(self, work: Work) -> list[ActiveRequest]:
        """Whose work it is."""
        if isinstance(work, Picture):
            return [work.request]
        return self._wanting.get(work, [])

    def _encoded(self, prompts: Sequence[Prompt], conds: list[Cond]) -> None:
        for prompt, cond in zip(prompts, conds, strict=True):
            for request in self._wanting.pop(prompt, []):
                request.texts[prompt] = cond
            self._prompts.put(prompt, cond)

    def _denoised(self, pictures: Sequence[Picture], x0: Tensor) -> None:
        steps = [picture.next_step for picture in pictures]
        x_t = torch.stack([picture.x for picture in pictures])
        noise = None
        if any(step.fresh for step in steps):
            pairs = zip(pictures, steps, x0, strict=True)
            noise = torch.stack([p.noise()[0] if step.fresh else torch.zeros_like(row) for p, step, row in pairs])
        for picture, x_s, seen in zip(pictures, advance(x_t, x0, steps, noise), x0, strict=True):
            if picture.advance(x_s, seen):
                shown = self.preview_of(picture.request.resident.base)(seen.unsqueeze(0))
                picture.request.show(picture, calls.to_pixels(shown)[0])

    def _decoded(self, pictures: Sequence[Picture], pixels: Any) -> None:
        now = time.perf_counter()
        for picture, own in zip(pictures, pixels, strict=True):
            if picture.shown is not None:
                picture.shown = None
                picture.request.show(picture, own)
            else:
                picture.request.done(picture, own, now)


def _growing(group: Group) -> Growing | None:
    """What runs the group's calls, if it is made for more batch sizes while it is drawn with."""
    program = cast(TextToImage, group.model).programs.get(PROGRAMS[group.part.call])
    return program if isinstance(program, Growing) else None


def told(error: Exception) -> EngineError:
    """What the client is told: an error of ours as it is; the rest is for the log."""
    if isinstance(error, EngineError):
        return error
    log.error("drawing failed", exc_info=error)
    failed = EngineError(FAILED)
    failed.__cause__ = error
    return failed
