"""The ticks of the engine's thread: one model call each, for everything that is ready for it, and what follows."""

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
"""The part that makes each call, to look up what a backend has replaced it with."""
FAILED = "the engine failed on this request; the server's log says why"


class DrawingLoop:
    """All admitted requests, and the next call. Used only on one thread, which owns torch and the models.

    Args:
        planner: plans each request.
        costs: costs of calls, updated here.
        prompts: cache of encoded prompts.
        observer: notified of every call.
    """

    def __init__(self, planner: Planner, costs: Costs, prompts: PromptCache, observer: Observer) -> None:
        self._planner, self._costs, self._prompts, self._observer = planner, costs, prompts, observer
        self._previews: WeakKeyDictionary[TextToImage, LinearPreview] = WeakKeyDictionary()
        self._active: list[ActiveRequest] = []
        self._wanting: dict[Prompt, list[ActiveRequest]] = {}
        """Requests that wait for a prompt to be encoded."""
        self.failed = False
        """Whether a call for a single item has failed; the engine's thread clears this when it checks the device."""
        self._last: Call | None = None

    @property
    def busy(self) -> bool:
        """Whether there are any requests."""
        return bool(self._active)

    def admit(self, ticket: Ticket, resident: Resident) -> None:
        """Add a request, together with its model."""
        if ticket.over:
            return
        try:
            plan = self._planner.plan_with(ticket.request, ticket.model, resident)
            active = ActiveRequest(ticket, resident, plan, self._costs)
            if ticket.request.previews and not ticket.request.exact_previews:
                self.preview_of(resident.base)
        except Exception as error:  # noqa: BLE001 - a bug of ours or of a foreign model; `told` logs it
            ticket.end(ticket.within(told, error))
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
        except Exception as error:  # noqa: BLE001 - a bug of ours, not of any one request; `told` logs it
            self.end(told(error))

    def end(self, error: EngineError) -> None:
        """End every request with this error."""
        for request in self._active:
            request.ticket.end(error)

    def clear(self) -> None:
        """Release everything, permanently."""
        self._active, self._wanting = [], {}
        self._prompts.clear()

    def _forget_ended(self) -> None:
        before, self._active = len(self._active), [each for each in self._active if not each.ticket.over]
        if len(self._active) < before:
            left = {p: [each for each in waiting if not each.ticket.over] for p, waiting in self._wanting.items()}
            self._wanting = {prompt: waiting for prompt, waiting in left.items() if waiting}

    def preview_of(self, base: TextToImage) -> LinearPreview:
        """The approximate previews for a base, fitted when they are first needed."""
        if base not in self._previews:
            with torch.inference_mode():
                self._previews[base] = LinearPreview.fit(base)
        return self._previews[base]

    def _ready(self) -> list[Work]:
        """All prompts and images that wait for a call, in queue order."""
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
        """Cost profile of the group's calls, in the batch sizes that are compiled already."""
        profile, program = self._costs.of(group.part), _growing(group)
        return profile if program is None else profile.among(program.made)

    def _want_larger(self, group: Group, ready: Sequence[Work]) -> None:
        """If everything that is ready would fill a larger batch than is compiled, have that batch size compiled."""
        program, profile = _growing(group), self._costs.of(group.part)
        if program is None or group.alone or profile.among(program.made) is profile:
            return
        rows = [work.rows for work in ready if work.group == group and work.rows <= profile.batches[-1]]
        if rows:
            most, _ = profile.best(sum(rows), min(rows))
            program.want(profile.fit(most))

    def _call(self, works: Sequence[Work]) -> None:
        """Make the call that these share, and process the results."""
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
        """The results of the call; if it fails, those of its halves. An item that fails alone ends its requests."""
        try:
            answers = self._timed(works, run)
        except Exception as error:  # noqa: BLE001 - as above
            if len(works) == 1:
                waiting, self.failed = self._waiting(works[0]), True
                failed = waiting[0].ticket.within(told, error)
                for request in waiting:
                    request.ticket.end(failed)
                return
            log.warning(
                "a call for %d item(s) failed (%s: %s); retrying in halves", len(works), type(error).__name__, error
            )
        else:
            yield works, answers
            return
        # Outside the except block, since the error's traceback holds the failed call's tensors.
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # if the GPU is broken for good, the halves will fail as well
                torch.cuda.empty_cache()
        half = len(works) // 2
        for some in (works[:half], works[half:]):
            # Leave out work whose request has failed meanwhile.
            left = [work for work in some if any(not request.ticket.over for request in self._waiting(work))]
            if left:
                yield from self._attempt(left, run)

    def _timed(self, works: Sequence[Work], run: Callable[[Sequence[Work], int], Any]) -> Any:
        """Make the call, and record its cost."""
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
        """The requests that wait for this."""
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
    """The program that runs the group's calls, if it can be compiled for further batch sizes while in use."""
    program = cast(TextToImage, group.model).programs.get(PROGRAMS[group.part.call])
    return program if isinstance(program, Growing) else None


def told(error: Exception) -> EngineError:
    """The error for the client: one of the engine's own as it is; any other is logged and replaced."""
    if isinstance(error, EngineError):
        return error
    log.error("drawing failed", exc_info=error)
    failed = EngineError(FAILED)
    failed.__cause__ = error
    return failed
