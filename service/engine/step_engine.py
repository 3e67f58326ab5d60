"""The engine that batches by step.

One thread owns torch and the models, and makes one call after another, each for all images that are ready for it (see
`loop`). This module is the event loop's side: it admits requests and delivers images.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image

from service.engine.aside import Aside
from service.engine.backends import Backend, make_backend
from service.engine.base import (
    BadRequest,
    Drawn,
    DrawRequest,
    EngineError,
    Load,
    ModelInfo,
    NotReady,
    Overloaded,
    Preview,
    TimedOut,
    UnknownModel,
)
from service.engine.costs import Costs
from service.engine.gate import Gate
from service.engine.line import Line
from service.engine.loop import DrawingLoop
from service.engine.memory import default_budget
from service.engine.names import check_names
from service.engine.observer import Observer, Outcome, Silence
from service.engine.parts import UNKNOWN
from service.engine.pictures import Painted, Ticket
from service.engine.plan import Plan, check_time
from service.engine.planner import Planner
from service.engine.recent import Recent
from service.engine.residency import Residency
from service.engine.startup import device_of, dtype_of, families_of_bases
from service.engine.text import PromptCache
from service.engine.thread import EngineThread
from service.settings import Settings
from weights.bundled import STUDENTS
from weights.store import Store

LOOKS = 4
"""Most requests at a time that look up a model which is not in use."""
LISTS, LIST_SECONDS = 2, 10.0
"""Most lists of all models that are made at a time, and seconds that each may take; 1 ms per student is usual."""
STOPPING = "the server is still loading its models, or is stopping"


class StepEngine:
    """`service.engine.base.Engine` on one device. Create it with `from_settings`, which checks the settings.

    Args:
        settings: bases, device, precision, limits.
        store: the students.
        bundled: folder of the bundled students; by default, the first whose base is served is the default model.
        listed: the bases of the settings, each with its family.
        backend: runs the models.
        costs: costs of calls, updated here.
        line: the request queue.
        observer: notified of every call and of every request's end.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        bundled: Path | None = None,
        *,
        listed: Mapping[str, str],
        backend: Backend,
        costs: Costs,
        line: Line,
        observer: Observer | None = None,
    ) -> None:
        self._settings = settings
        device = device_of(settings)
        dtype = dtype_of(settings, device)
        gate = Gate()
        self._recent, self._aside, self._lists = Recent(store), Aside(LOOKS), Aside(LISTS)
        self._residency = Residency(
            store,
            listed,
            device,
            dtype,
            settings.memory_bytes or default_budget(device),
            pinned=settings.pinned,
            aliases=settings.aliases,
            prepare=backend.prepare,
            gate=gate,
            recent=self._recent,
        )
        self._planner = Planner(settings, self._residency, Store(bundled).names() if bundled is not None else [])
        self._costs, self._line = costs, line
        self._observer: Observer = observer if observer is not None else Silence()
        prompts = PromptCache(settings.prompt_cache_bytes)
        loop = DrawingLoop(self._planner, costs, prompts, self._observer)
        self._thread = EngineThread(settings, device, self._residency, self._planner, line, loop, costs, gate)
        self._tickets: dict[Ticket, asyncio.TimerHandle] = {}
        """Requests that a client waits for, each with the timer that ends it at its deadline."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = True

    @classmethod
    def from_settings(cls, settings: Settings, observer: Observer | None = None) -> "StepEngine":
        """Create the engine for the settings' store and the bundled students.

        Raises:
            BadSettings: a base, the family, a named model, the device or the backend is not available.
        """
        store = Store(settings.store, STUDENTS)
        listed = families_of_bases(settings)
        check_names(settings, store)
        device = device_of(settings)
        backend = make_backend(settings, device, dtype_of(settings, device))
        batches = [batch for batch in backend.batches if batch <= settings.max_batch]
        costs, line = Costs(batches, settings.tick_seconds), Line(settings.queue_seconds)
        return cls(settings, store, STUDENTS, listed=listed, backend=backend, costs=costs, line=line, observer=observer)

    @property
    def ready(self) -> bool:
        """See `Engine.ready`."""
        return self._thread.warm and self._open

    @property
    def failure(self) -> str | None:
        """See `Engine.failure`."""
        return self._thread.failure

    async def start(self) -> None:
        """See `Engine.start`."""
        self._recent.start()
        self._thread.start()

    async def drain(self, seconds: float) -> None:
        """See `Engine.drain`."""
        self._open = False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    async def stop(self) -> None:
        """See `Engine.stop`."""
        self._open = False
        self._line.close()
        for ticket in self._tickets:
            ticket.end(NotReady("the server is stopping"))
        self._recent.stop()
        await asyncio.to_thread(self._thread.stop)

    def load(self) -> Load:
        """See `Engine.load`."""
        pictures = sum(ticket.left for ticket in self._tickets)
        return Load(pictures=pictures, seconds=self._line.seconds, resident=self._residency.bytes_by_model())

    async def models(self) -> list[ModelInfo]:
        """See `Engine.models`."""
        self._check_ready()
        limit = min(LIST_SECONDS, self._settings.request_timeout)
        try:
            return await self._lists.within(limit, self._residency.infos)
        except TimeoutError:
            message = (
                f"the model store did not respond within {limit:g} s; try again, or check what is holding up its disk"
            )
            raise TimedOut(message) from None

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        """See `Engine.generate`."""
        async with contextlib.aclosing(self.stream(replace(request, previews=0))) as answers:
            drawn = [answer async for answer in answers if isinstance(answer, Drawn)]
        seconds = max(each.seconds for each in drawn)
        return [replace(each, seconds=seconds) for each in sorted(drawn, key=lambda each: each.index)]

    async def stream(self, request: DrawRequest) -> AsyncGenerator[Preview | Drawn]:
        """See `Engine.stream`."""
        arrived = time.perf_counter()
        ticket: Ticket | None = None
        outcome: Outcome = "cancelled"
        try:
            answers: asyncio.Queue[Painted | EngineError] = asyncio.Queue()
            ticket = await self._admit(request, answers)
            left = len(request.seeds)
            while left:
                answer = await answers.get()
                if isinstance(answer, EngineError):
                    raise answer
                shown = _image(answer) if answer.whole else await asyncio.to_thread(_image, answer)
                left -= isinstance(shown, Drawn)
                outcome = "cancelled" if left else "done"
                yield shown
        except EngineError as error:
            outcome = _outcome(error)
            raise
        finally:
            now = time.perf_counter()
            began = ticket.began if ticket is not None and ticket.began is not None else now
            if ticket is not None:
                self._release(ticket)
            self._observer.ended(outcome, len(request.seeds), began - arrived, now - arrived)

    async def _admit(self, request: DrawRequest, answers: "asyncio.Queue[Painted | EngineError]") -> Ticket:
        """Reserve a place in the queue, and send the request to the engine's thread."""
        self._check_ready()
        limit = min(self._settings.request_timeout, math.inf if request.seconds is None else request.seconds)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        model, base, plan = await self._plan(request, limit)
        parts = self._thread.parts.get(base, UNKNOWN)
        work = list(parts.work(plan, request))
        if parts is not UNKNOWN:
            check_time(self._costs.least(work, request.deterministic), limit)
        seconds = self._costs.predict(work, request.deterministic)
        place = self._line.join(request.client, seconds, deadline - loop.time())

        def send(answer: Painted | EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(answers.put_nowait, answer)

        ticket = Ticket(request=request, model=model, place=place, send=send)
        late = TimedOut(f"the request took more than {limit:g} s")
        self._tickets[ticket] = loop.call_at(deadline, ticket.end, late)
        self._idle.clear()
        self._thread.put(ticket)
        return ticket

    async def _plan(self, request: DrawRequest, limit: float) -> tuple[str, str, Plan]:
        """The request's model, its base, and the plan; raises TimedOut after ``limit`` seconds."""
        # The usual case: handing it to a thread takes longer than planning.
        if self._planner.at_hand(request):
            return self._planner.plan(request)
        try:
            planned = await self._aside.within(limit, self._planner.plan, request)
        except TimeoutError:
            raise TimedOut(f"the model store did not respond within the request's {limit:g} s") from None
        self._check_ready()  # a drain may have begun in the meantime
        return planned

    def _release(self, ticket: Ticket) -> None:
        """Forget a request that nobody waits for; the engine's thread drops what is left of it before its next call."""
        ticket.over = True
        ticket.place.leave()
        self._tickets.pop(ticket).cancel()
        if not self._tickets:
            self._idle.set()

    def _check_ready(self) -> None:
        if self.failure is not None:
            raise NotReady(f"the engine has failed: {self.failure}")
        if not self.ready:
            raise NotReady(STOPPING)


def _image(painted: Painted) -> Preview | Drawn:
    """Create the image, scaled up if its pixels are fewer, and the result that contains it."""
    image = Image.fromarray(painted.pixels)
    return painted.tell(image=image if painted.whole else image.resize((painted.size, painted.size)))


def _outcome(error: EngineError) -> Outcome:
    match error:
        case TimedOut():
            return "timed_out"
        case Overloaded() | NotReady() | BadRequest() | UnknownModel():
            return "refused"
        case _:
            return "failed"
