"""How requests get their models.

A model in memory is used at once. Any other is loaded by a thread of its own while other requests are served.
"""

import logging
import math
from collections.abc import Hashable

import torch

from service.engine.base import EngineError, Overloaded
from service.engine.loading import Loads, Wait
from service.engine.loop import DrawingLoop, told
from service.engine.pictures import Ticket
from service.engine.planner import Planner
from service.engine.residency import Found
from service.engine.resident import Resident

log = logging.getLogger(__name__)


class Admission:
    """Tracks which requests wait for a model. Used only on the engine's thread.

    Requests for one model are admitted in order of arrival: while any wait for it, every request for the same model
    joins them, even if the model has entered memory since. A republished student makes nobody wait: the version in
    memory is used until the new one is loaded.

    Args:
        planner: finds models in memory.
        loop: receives the requests whose model is in memory.
        loader: loads the models of waits, which must then be passed to `back`.
        bound_seconds: bound on the predicted seconds of loading. A client that has no model to be loaded may exceed it,
            up to twice the bound, so that others cannot keep it out.
    """

    def __init__(self, planner: Planner, loop: DrawingLoop, loader: Loads, bound_seconds: float) -> None:
        self._planner, self._loop, self._loader, self._bound = planner, loop, loader, bound_seconds
        self._waits: dict[Hashable, Wait] = {}
        self._unusable: dict[Hashable, Hashable] = {}
        """Republished versions that could not be loaded, and are not tried again."""

    def take(self, ticket: Ticket) -> None:
        """Admit a request, or make it wait for its model; end it if too many models are to be loaded already."""
        if ticket.over:
            return
        try:
            found = self._planner.find(ticket.request, ticket.model)
        except Exception as error:  # noqa: BLE001 - foreign files can raise anything; `told` logs it
            ticket.end(ticket.within(told, error))
            return
        wait = self._waits.get(found.wants)
        if found.resident is not None and (wait is None or not wait.tickets):
            self._loop.admit(ticket, found.resident)
            if wait is None:
                self._renew(found, ticket)
        elif wait is not None:
            wait.tickets.append(ticket)
        elif (refusal := self._no_room(ticket)) is not None:
            ticket.end(refusal)
        else:
            self._start(Wait(wants=found.wants, tickets=[ticket]))

    def back(self, wait: Wait) -> None:
        """Admit the requests of a finished wait, with the model loaded for them even if it has been evicted since."""
        del self._waits[wait.wants]
        if wait.threads not in (None, torch.get_num_threads()):
            # The number is per thread, and a backend that falls back to torch for a part raises it.
            torch.set_num_threads(wait.threads)
        if wait.renews is not None and isinstance(wait.outcome, EngineError):
            self._unusable[wait.wants] = wait.version
            log.error("republished %r cannot be loaded; the version in memory is kept", wait.renews.model)
        for ticket in wait.tickets:
            match wait.outcome:
                case Resident():
                    self._loop.admit(ticket, wait.outcome)
                case EngineError():
                    ticket.end(wait.outcome)
                case None:  # the loader found no live request, but one may have joined since
                    self.take(ticket)

    def _start(self, wait: Wait) -> None:
        self._waits[wait.wants] = wait
        self._loader.put(wait)

    def _renew(self, found: Found, ticket: Ticket) -> None:
        """Have a newer version loaded, unless that has failed before."""
        if found.newer is not None and self._unusable.get(found.wants) != found.newer:
            self._unusable.pop(found.wants, None)
            self._start(Wait(wants=found.wants, tickets=[], renews=ticket, version=found.newer))

    def _no_room(self, ticket: Ticket) -> Overloaded | None:
        """Why no further model can be loaded for this request; None if it can."""
        seconds, own = self._loader.ahead(ticket.request.client)
        bound = self._bound if own else 2 * self._bound
        if seconds <= bound:
            return None
        again = max(1, math.ceil(seconds - bound))
        why = f"{ticket.model!r} is not in memory, and loading those that others wait for takes about {seconds:.1f} s"
        return Overloaded(f"{why}; try again in {again} s", again)
