"""The line of requests between the server's event loop and the thread that draws: bounded, first come, first served."""

import math
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from service.engine.base import Drawn, DrawRequest, NotReady, Overloaded


@dataclass(eq=False, kw_only=True)
class Ticket:
    """One request in the line."""

    request: DrawRequest
    cost: int
    """Network evaluations, times pictures."""
    result: "Future[list[Drawn]]" = field(default_factory=Future)
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the result any more."""


class WaitingLine:
    """At most ``size`` tickets; any thread may call any method."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._drawing: Ticket | None = None
        self._seconds_per_evaluation: float | None = None

    def join(self, ticket: Ticket) -> None:
        """Add a ticket at the end.

        Raises:
            Overloaded: the line is full; says for how long that is likely.
            NotReady: the line is closed.
        """
        with self._changed:
            if not self._open:
                raise NotReady("the server is stopping")
            if len(self._tickets) >= self._size:
                seconds = self._retry_after()
                raise Overloaded(f"{self._size} requests are waiting already; try again in {seconds} s", seconds)
            self._tickets.append(ticket)
            self._changed.notify()

    def leave(self, ticket: Ticket) -> None:
        """Nobody waits for this ticket any more: it is dropped, or stopped where it is being drawn."""
        ticket.abandoned.set()
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)

    def next(self) -> Ticket | None:
        """The first ticket, as soon as there is one; None once the line is closed."""
        with self._changed:
            self._drawing = None
            self._changed.wait_for(lambda: self._tickets or not self._open)
            if not self._open:
                return None
            self._drawing = self._tickets.popleft()
            return self._drawing

    def close(self) -> None:
        """Refuse everybody, those who wait already too."""
        with self._changed:
            self._open = False
            for ticket in self._tickets:
                if ticket.result.set_running_or_notify_cancel():
                    ticket.result.set_exception(NotReady("the server is stopping"))
            self._tickets.clear()
            self._changed.notify_all()

    def measured(self, seconds: float, cost: int) -> None:
        """What a drawing took: keeps the mean that a full line's Retry-After comes from."""
        rate = seconds / max(cost, 1)
        with self._changed:
            known = self._seconds_per_evaluation
            self._seconds_per_evaluation = rate if known is None else 0.8 * known + 0.2 * rate

    def __len__(self) -> int:
        with self._changed:
            return len(self._tickets)

    def _retry_after(self) -> int:
        """Whole seconds until the ticket at hand, and one more, are likely done; at least 1."""
        ahead = [ticket for ticket in (self._drawing, self._tickets[0] if self._tickets else None) if ticket]
        return max(1, math.ceil((self._seconds_per_evaluation or 0.0) * sum(ticket.cost for ticket in ahead)))
