"""How requests get their models.

A model in memory is used at once. Any other is loaded by a thread of its own while other requests are served.
"""

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
    """Requests that wait for one model, in order of arrival."""

    wants: Hashable
    tickets: list[Ticket]
    """The engine's thread may append to it until the wait is handed back."""
    outcome: Resident | EngineError | None = None
    """None: nothing was loaded, since no request was waiting any more."""
    threads: int | None = None
    """Number of CPU threads for torch, as the backend left it on the loader's thread."""


class Loader:
    """A thread that loads models, one at a time.

    Args:
        planner: loads the models.
        done: receives each wait when it is finished; called on the loader's thread.
    """

    def __init__(self, planner: Planner, done: Callable[[Wait], None]) -> None:
        self._planner, self._done = planner, done
        self._waits: queue.SimpleQueue[Wait | None] = queue.SimpleQueue()
        self._stopping = False
        self._turn = threading.Lock()
        """Held while the thread starts: its `ident` is set before `Thread.start` returns, but joining must wait."""
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def start(self) -> None:
        """Start the thread, unless it was stopped already."""
        with self._turn:
            if not self._stopping:
                self._thread.start()

    def put(self, wait: Wait) -> None:
        """Queue a wait whose model is to be loaded."""
        self._waits.put(wait)

    def stop(self, seconds: float) -> None:
        """Stop after the model that is being loaded.

        Blocks for up to ``seconds``; a thread that is still loading then is waited for when the interpreter exits.
        """
        with self._turn:
            self._stopping = True
        self._waits.put(None)
        if self._thread.ident is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                log.warning("stopping while a model is still being loaded")
                wait_at_the_end(self._thread)

    def _work(self) -> None:
        while (wait := self._waits.get()) is not None and not self._stopping:
            ticket = next((ticket for ticket in list(wait.tickets) if not ticket.over), None)
            if ticket is not None:
                wait.outcome = self._load(ticket)
                wait.threads = torch.get_num_threads()
            self._done(wait)
            del wait, ticket  # otherwise the idle thread would keep a model in memory

    def _load(self, ticket: Ticket) -> Resident | EngineError:
        started = time.perf_counter()
        try:
            resident = self._planner.load(ticket.request, ticket.model)
        except Exception as error:  # noqa: BLE001 - foreign files can raise anything; `told` logs it
            return told(error)
        log.info("%r was loaded in %.1f s", ticket.model, time.perf_counter() - started)
        return resident


class Admission:
    """Tracks which requests wait for a model. Used only on the engine's thread.

    Requests for one model are admitted in order of arrival: while a wait is pending, every request for the same model
    joins it, even if the model has entered memory since.

    Args:
        planner: finds models in memory.
        loop: receives the requests whose model is in memory.
        load: starts loading the model of a wait, which must then be passed to `back`.
    """

    def __init__(self, planner: Planner, loop: DrawingLoop, load: Callable[[Wait], None]) -> None:
        self._planner, self._loop, self._load = planner, loop, load
        self._waits: dict[Hashable, Wait] = {}

    def take(self, ticket: Ticket) -> None:
        """Admit a request, or make it wait for its model."""
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
        """Admit the requests of a finished wait, with the model loaded for them even if it has been evicted since."""
        del self._waits[wait.wants]
        if wait.threads not in (None, torch.get_num_threads()):
            # The number is per thread, and a backend that falls back to torch for a part raises it.
            torch.set_num_threads(wait.threads)
        for ticket in wait.tickets:
            match wait.outcome:
                case Resident():
                    self._loop.admit(ticket, wait.outcome)
                case EngineError():
                    ticket.end(wait.outcome)
                case None:  # the loader found no live request, but one may have joined since
                    self.take(ticket)
