"""The engine's thread: it loads what always stays, draws a first picture, and then makes call after call until its end."""

import logging
import queue
import threading

import torch

from service.engine.admission import Admission, Loader, Wait
from service.engine.base import DrawRequest, EngineError
from service.engine.costs import Costs
from service.engine.gate import Gate
from service.engine.line import Line
from service.engine.loop import DrawingLoop
from service.engine.parts import Parts, parts_of
from service.engine.pictures import Painted, Ticket
from service.engine.planner import Planner
from service.engine.residency import Residency
from service.engine.resident import Resident
from service.engine.startup import set_up
from service.engine.warming import PROMPT, warm
from service.settings import Settings
from weights.contracts import StudentManifest

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""At most, for a model that is being loaded when the engine stops."""


class EngineThread:
    """Owns the drawing loop.

    Args:
        settings: which bases there are.
        device: where it draws.
        residency: the models.
        planner: says which model draws the first picture.
        line: closed where nothing can be drawn.
        loop: the calls.
        costs: of them; measured before the engine is ready.
        gate: that of the residency; nothing is computed while it is closed.
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
        """What to take in; None is the end."""
        self._loader = Loader(planner, self._inbox.put)
        self._admission = Admission(planner, loop, self._loader.put)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.warm = False
        """Whether a first picture was drawn."""
        self.failure: str | None = None
        """Why none ever will be, or none more."""
        self.parts: dict[str, Parts] = {}
        """Of the bases that always stay, once they are loaded."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, ticket: Ticket) -> None:
        """Take a request in before the next call."""
        self._inbox.put(ticket)

    def stop(self) -> None:
        """End after the call that is being made, and wait for that; for a model that is being loaded, not for ever."""
        self._inbox.put(None)
        self._loader.stop(STOP_SECONDS)
        if self._thread.ident is not None:
            self._thread.join()
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
        log.info("ready to draw on %s", self._device)
        self._loader.start()
        try:
            while self._take_in():
                with self._gate.passing():
                    self._loop.tick()
                if self._loop.failed:
                    self._loop.failed = False
                    self._check_device()
        except Exception as error:
            log.exception("the engine is broken; only a new process can draw again")
            self._give_up(f"{type(error).__name__}: {error}")
        self._loop.clear()

    def _check_device(self) -> None:
        """After a call that failed: where nothing at all can be computed any more, no request is to blame."""
        torch.ones(1, device=self._device).sum().item()

    def _give_up(self, why: str) -> None:
        """Let nobody in, and answer everybody who waits or still comes, until the end."""
        self.failure = why
        self._line.close()
        broken = EngineError("the engine is broken, and has to be started again")
        self._loop.end(broken)
        while (come := self._inbox.get()) is not None:
            for ticket in come.tickets if isinstance(come, Wait) else [come]:
                ticket.end(broken)

    def _take_in(self) -> bool:
        """All requests that have come, at least one where there is nothing else to do; False at the end."""
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
            del come  # or an idle thread would hold a model that has left memory

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
            log.exception("the default model %r cannot draw; the others can be asked for", name)
        for each in self._settings.bases:
            base = self._residency.get(each, PROMPT).base
            warm(base, [student.model for student in students if student.base is base], self._costs)

    def _warm_up(self, model: str) -> None:
        """Draw one picture in as few steps as the model can, before anybody can ask for one."""
        info = self._residency.info(model)
        steps = min(info.schedules) if isinstance(info, StudentManifest) else 1
        answers: list[Painted | EngineError] = []
        request, place = DrawRequest(prompt=PROMPT, seeds=(0,), steps=steps), self._line.join("", 0.0)
        ticket = Ticket(request=request, model=model, place=place, send=answers.append)
        self._loop.admit(ticket, self._planner.load(request, model))
        while not ticket.over:
            self._loop.tick()
        place.leave()
        if isinstance(answers[-1], EngineError):
            raise answers[-1]
