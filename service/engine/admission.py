"""How requests get their models: at once where those are in memory, else from a thread that loads while others are drawn."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from service.engine.base import EngineError
from service.engine.leaving import wait_at_the_end
from service.engine.loop import DrawingLoop, told
from service.engine.pictures import Ticket
from service.engine.planner import Planner
from service.engine.resident import Resident

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Wait:
    """Requests that wait for one model, in the order in which they came."""

    wants: Hashable
    tickets: list[Ticket]
    """The engine's thread appends to it at any time before the wait is back."""
    outcome: Resident | EngineError | None = None
    """None: nothing was loaded, since nobody waited any more."""
    threads: int | None = None
    """Of the CPU that torch is to use, as the backend left it on the loader's thread."""


class Loader:
    """A thread that loads models, one after another.

    Args:
        planner: loads them.
        done: takes each wait back; called on that thread.
    """

    def __init__(self, planner: Planner, done: Callable[[Wait], None]) -> None:
        self._planner, self._done = planner, done
        self._waits: queue.SimpleQueue[Wait | None] = queue.SimpleQueue()
        self._stopping = False
        self._turn = threading.Lock()
        """Held while the thread starts: one that has an identity may not be joined before `Thread.start` returns."""
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def start(self) -> None:
        """Begin, unless stopped already."""
        with self._turn:
            if not self._stopping:
                self._thread.start()

    def put(self, wait: Wait) -> None:
        """Load the model of a wait behind those that were put before."""
        self._waits.put(wait)

    def stop(self, seconds: float) -> None:
        """End after the model that is being loaded; waited for here for so many seconds, and else at Python's own end."""
        with self._turn:
            self._stopping = True
        self._waits.put(None)
        if self._thread.ident is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                log.warning("a model is still being loaded, and is given up")
                wait_at_the_end(self._thread)

    def _work(self) -> None:
        while (wait := self._waits.get()) is not None and not self._stopping:
            ticket = next((ticket for ticket in list(wait.tickets) if not ticket.over), None)
            if ticket is not None:
                wait.outcome = self._load(ticket)
                wait.threads = torch.get_num_threads()
            self._done(wait)
            del wait, ticket  # or this thread would hold a model for as long as it has nothing to do

    def _load(self, ticket: Ticket) -> Resident | EngineError:
        started = time.perf_counter()
        try:
            resident = self._planner.load(ticket.request, ticket.model)
        except Exception as error:  # noqa: BLE001 - foreign files fail in any way; it is logged there
            return told(error)
        log.info("%r was loaded in %.1f s", ticket.model, time.perf_counter() - started)
        return resident


class Admission:
    """Who waits for a model; used on the engine's thread alone.

    Requests for one model are admitted in the order in which they came: a wait that is out takes in all that want the same,
    though the model may be in memory already.

    Args:
        planner: finds models in memory.
        loop: takes in requests whose model is there.
        load: has a wait's model loaded, and the wait brought to `back`.
    """

    def __init__(self, planner: Planner, loop: DrawingLoop, load: Callable[[Wait], None]) -> None:
        self._planner, self._loop, self._load = planner, loop, load
        self._waits: dict[Hashable, Wait] = {}

    def take(self, ticket: Ticket) -> None:
        """Admit a request, or let it wait."""
        if ticket.over:
            return
        try:
            found = self._planner.find(ticket.request, ticket.model)
        except Exception as error:  # noqa: BLE001 - as above
            ticket.end(told(error))
            return
        wait = self._waits.get(found.wants)
        if wait is not None:
            wait.tickets.append(ticket)
        elif found.resident is not None:
            self._loop.admit(ticket, found.resident)
        else:
            wait = self._waits[found.wants] = Wait(wants=found.wants, tickets=[ticket])
            self._load(wait)

    def back(self, wait: Wait) -> None:
        """Admit those who have waited. It is their model, whatever has left memory meanwhile."""
        del self._waits[wait.wants]
        if wait.threads not in (None, torch.get_num_threads()):
            # The number is each thread's own; a backend that leaves a model to torch may raise it.
            torch.set_num_threads(wait.threads)
        for ticket in wait.tickets:
            match wait.outcome:
                case Resident():
                    self._loop.admit(ticket, wait.outcome)
                case EngineError():
                    ticket.end(wait.outcome)
                case None:  # the loader had nobody to load for; somebody may have come since
                    self.take(ticket)
