"""The engine's thread: loads the models that always stay, warms up, then makes one call after another until stopped."""

import logging
import queue
import threading

import torch

from service.engine.admission import Admission
from service.engine.base import DrawRequest, EngineError
from service.engine.costs import Costs
from service.engine.gate import Gate
from service.engine.leaving import wait_at_the_end
from service.engine.line import Line
from service.engine.loading import Loader, Wait
from service.engine.loop import DrawingLoop
from service.engine.parts import Parts, parts_of
from service.engine.pictures import Painted, Ticket
from service.engine.planner import Planner
from service.engine.residency import Residency
from service.engine.resident import Resident
from service.engine.startup import set_up
from service.engine.warming import PROMPT, warm
from service.settings import Settings

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long the call in progress, or a model that is being loaded, may delay the engine's stop."""


class EngineThread:
    """Runs the drawing loop.

    Args:
        settings: names the bases.
        device: where the models run.
        residency: the models.
        planner: names the default model.
        line: the request queue, closed when the engine cannot work.
        loop: makes the calls.
        costs: costs of calls, measured before the engine is ready.
        gate: the residency's gate; nothing is computed while it is closed.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        residency: Residency,
        planner: Planner,
        line: Line,
        loop: DrawingLoop,
        costs: Costs,
        gate: Gate,
    ) -> None:
        self._settings, self._device, self._costs = settings, device, costs
        self._residency, self._planner, self._line, self._loop = residency, planner, line, loop
        self._gate = gate
        self._inbox: queue.SimpleQueue[Ticket | Wait | None] = queue.SimpleQueue()
        """Requests and finished loads to take in; None ends the thread."""
        self._loader = Loader(planner, self._inbox.put)
        bound = min(settings.queue_seconds, settings.request_timeout)
        self._admission = Admission(planner, loop, self._loader, bound)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.warm = False
        """Whether the models are loaded and warmed up."""
        self.failure: str | None = None
        """Why the engine could not start, or cannot go on."""
        self.parts: dict[str, Parts] = {}
        """Parts of the bases that always stay in memory, once they are loaded."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, ticket: Ticket) -> None:
        """Take in a request before the next call."""
        self._inbox.put(ticket)

    def stop(self) -> None:
        """Stop after the current call, and wait for it, but only for a limited time.

        The same goes for a model that is being loaded, and for the models of the start, whose loading, converting and
        warming up can take minutes. A thread that is still busy then is waited for when the interpreter exits.
        """
        self._inbox.put(None)
        self._loader.stop(STOP_SECONDS)
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
            if self._thread.is_alive():
                log.warning("stopping while the engine is still busy")
                wait_at_the_end(self._thread)
        self._residency.clear()

    def _work(self) -> None:
        try:
            self._prepare()
        except Exception as error:
            log.exception("the engine cannot start")
            self.failure = f"{type(error).__name__}: {error}"
            self._line.close()
            return
        self.warm = True
        log.info("ready to generate images on %s", self._device)
        self._loader.start()
        try:
            while self._take_in():
                with self._gate.passing():
                    self._loop.tick()
                if self._loop.failed:
                    self._loop.failed = False
                    self._check_device()
        except Exception as error:
            log.exception("the engine is broken; restart the server")
            self._give_up(f"{type(error).__name__}: {error}")
        self._loop.clear()

    def _check_device(self) -> None:
        """After a failed call, raise if the device can compute nothing at all any more: then no request is to blame."""
        torch.ones(1, device=self._device).sum().item()

    def _give_up(self, why: str) -> None:
        """Admit no more requests, and end all that wait or still come, until the engine is stopped."""
        self.failure = why
        self._line.close()
        broken = EngineError("the engine is broken; the server must be restarted")
        self._loop.end(broken)
        while (come := self._inbox.get()) is not None:
            for ticket in come.tickets if isinstance(come, Wait) else [come]:
                ticket.end(broken)

    def _take_in(self) -> bool:
        """Take in everything that has arrived, waiting if there is nothing else to do; False if the thread must end."""
        while True:
            try:
                come = self._inbox.get(block=not self._loop.busy)
            except queue.Empty:
                return True
            if come is None:
                return False
            with self._gate.passing():
                if isinstance(come, Wait):
                    self._admission.back(come)
                else:
                    self._admission.take(come)
            del come  # otherwise the idle thread would keep a model that has left memory

    def _prepare(self) -> None:
        set_up(self._device)
        self._residency.load_bases()
        for each in self._settings.bases:
            base = self._residency.get(each, PROMPT).base
            self.parts[each] = parts_of(base)
            self._loop.preview_of(base)
        name = self._planner.default_model()
        self._residency.pin(name)
        students: list[Resident] = []
        try:
            default = self._residency.get(name, PROMPT)
            students += [default] if default.manifest is not None else []
            self._warm_up(name)
        except EngineError:
            if name in self._settings.bases:
                raise
            log.exception("the default model %r cannot generate images; other models are still available", name)
        for each in self._settings.bases:
            base = self._residency.get(each, PROMPT).base
            warm(base, [student.model for student in students if student.base is base], self._costs)

    def _warm_up(self, model: str) -> None:
        """Generate one image in one step, before any request can arrive."""
        answers: list[Painted | EngineError] = []
        request, place = DrawRequest(prompt=PROMPT, seeds=(0,), steps=1), self._line.join("", 0.0)
        ticket = Ticket(request=request, model=model, place=place, send=answers.append)
        self._loop.admit(ticket, self._planner.load(request, model))
        while not ticket.over:
            self._loop.tick()
        place.leave()
        if isinstance(answers[-1], EngineError):
            raise answers[-1]
