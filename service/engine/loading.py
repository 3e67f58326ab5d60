"""Loads models on a thread of their own, one at a time, while the engine's thread serves other requests."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import mean
from typing import Protocol

import torch

from service.engine.base import EngineError
from service.engine.leaving import wait_at_the_end
from service.engine.loop import told
from service.engine.pictures import Ticket
from service.engine.planner import Planner
from service.engine.resident import Resident

log = logging.getLogger(__name__)

UNKNOWN_SECONDS = 2.0
"""Seconds assumed for loading a model before the first one has been loaded."""
RECENT = 8
"""Number of recent loads that the estimate is based on."""


@dataclass(eq=False, kw_only=True)
class Wait:
    """A model to load, and the requests that wait for it, in order of arrival."""

    wants: Hashable
    tickets: list[Ticket]
    """The engine's thread may append to it until the wait is handed back."""
    renews: Ticket | None = None
    """The request that found an older version of the model in memory, and does not wait; None if there was none."""
    version: Hashable = None
    """The version in the store that replaces the older one; None if there was none."""
    outcome: Resident | EngineError | None = None
    """None: nothing was loaded, since no request was waiting any more."""
    threads: int | None = None
    """Number of CPU threads for torch, as the backend left it on the loader's thread."""

    @property
    def asks(self) -> Ticket | None:
        """The request that the model is loaded for; None if nobody wants it any more."""
        return next((ticket for ticket in list(self.tickets) if not ticket.over), self.renews)

    @property
    def client(self) -> str | None:
        """The client whose turn it is to have a model loaded."""
        ticket = self.asks
        return None if ticket is None else ticket.request.client


class Loads(Protocol):
    """What requests that need a model to be loaded deal with."""

    def put(self, wait: Wait) -> None:
        """Queue a wait whose model is to be loaded."""

    def ahead(self, client: str) -> tuple[float, bool]:
        """Predicted seconds of the loads that are queued or being made, and whether any of them is this client's."""


class Loader:
    """A thread that loads models. Clients take turns, so nobody waits behind another client's dozen models.

    Args:
        planner: loads the models.
        done: receives each wait when it is finished; called on the loader's thread.
    """

    def __init__(self, planner: Planner, done: Callable[[Wait], None]) -> None:
        self._planner, self._done = planner, done
        self._waits: list[Wait] = []
        self._current: Wait | None = None
        self._turns: dict[str | None, int] = {}
        """The number of each client's latest turn, for as long as anything is queued."""
        self._took: deque[float] = deque(maxlen=RECENT)
        self._changed = threading.Condition()
        self._stopping = False
        self._starting = threading.Lock()
        """Held while the thread starts: its `ident` is set before `Thread.start` returns, but joining must wait."""
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def start(self) -> None:
        """Start the thread, unless it was stopped already."""
        with self._starting:
            if not self._stopping:
                self._thread.start()

    def put(self, wait: Wait) -> None:
        """See `Loads.put`."""
        with self._changed:
            self._waits.append(wait)
            self._changed.notify()

    def ahead(self, client: str) -> tuple[float, bool]:
        """See `Loads.ahead`."""
        with self._changed:
            clients = [wait.client for wait in (self._current, *self._waits) if wait is not None]
            typical = mean(self._took) if self._took else UNKNOWN_SECONDS
        return typical * sum(each is not None for each in clients), client in clients

    def stop(self, seconds: float) -> None:
        """Stop after the model that is being loaded.

        Blocks for up to ``seconds``; a thread that is still loading then is waited for when the interpreter exits.
        """
        with self._starting, self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                log.warning("stopping while a model is still being loaded")
                wait_at_the_end(self._thread)

    def _work(self) -> None:
        while (wait := self._next()) is not None:
            ticket = wait.asks
            if ticket is not None:
                wait.outcome = ticket.within(self._load, ticket)
                wait.threads = torch.get_num_threads()
            with self._changed:
                self._current = None
            self._done(wait)
            del wait, ticket  # otherwise the idle thread would keep a model in memory

    def _next(self) -> Wait | None:
        """The first wait of the client whose last turn is longest ago, once there is one; None to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waits or self._stopping)
            if self._stopping:
                return None
            self._current = min(self._waits, key=lambda wait: self._turns.get(wait.client, 0))
            self._waits.remove(self._current)
            self._turns[self._current.client] = max(self._turns.values(), default=0) + 1
            if not self._waits:
                self._turns.clear()
            return self._current

    def _load(self, ticket: Ticket) -> Resident | EngineError:
        started = time.perf_counter()
        try:
            resident = self._planner.load(ticket.request, ticket.model)
        except Exception as error:  # noqa: BLE001 - foreign files can raise anything; `told` logs it
            return told(error)
        seconds = time.perf_counter() - started
        with self._changed:
            self._took.append(seconds)
        log.info("%r was loaded in %.1f s", ticket.model, seconds)
        return resident
