"""The queue of admitted requests: bounded by predicted work, and fair between clients. Pure and thread-safe.

The order is start-time fair queueing (Goyal, Vin & Cheng 1996, section 2). Work has a tag on a virtual clock, and the
lowest tag goes first. A client's requests get successive tags, spaced by their seconds of work; a client that was idle
starts at the current virtual time, which is how far the queue has advanced. So one image never waits behind another
client's hundred.
"""

import math
import threading

from service.engine.base import NotReady, Overloaded

Order = tuple[float, int, int]
"""Sort key of work in the queue, lowest first: tag on the virtual clock, number of the request, index of the image."""


class Place:
    """One request's place in the queue; created by `Line.join`.

    Attributes:
        client: id of the client.
        seconds: predicted work when it joined.
    """

    def __init__(self, line: "Line", client: str, seconds: float, start: float, number: int) -> None:
        self.client, self.seconds = client, seconds
        self._line, self._start, self._number = line, start, number
        self._remaining = seconds
        self._drawing = False

    @property
    def order(self) -> Order:
        """Position of the request, which is also that of its first image."""
        return self._start, self._number, 0

    def orders(self, pictures: int) -> list[Order]:
        """Positions of its images.

        They divide its seconds evenly, so that other clients' images come in between.
        """
        share = self.seconds / max(pictures, 1)
        return [(self._start + index * share, self._number, index) for index in range(pictures)]

    @property
    def remaining(self) -> float:
        """Seconds of work that are left."""
        return self._remaining

    def begin(self) -> None:
        """Mark the request as started, since its model is loaded: from now on it advances virtual time."""
        self._drawing = True

    def progress(self, remaining_seconds: float) -> None:
        """Set how much work is left. It never increases, since other requests were admitted on the strength of it."""
        with self._line._lock:
            self._remaining = min(self._remaining, max(0.0, remaining_seconds))

    def leave(self) -> None:
        """Leave the queue, finished (after ``progress(0)``) or abandoned: remaining work is not charged to the client.

        Calling it again has no effect.
        """
        self._line._leave(self)

    @property
    def _reached(self) -> float:
        """Its tag, advanced by the work done so far."""
        return self._start + self.seconds - self._remaining


class Line:
    """The queue: who is in it, and who may join.

    A request is admitted while the total work stays within the bound. Beyond that, a client that holds less than its
    fair share (the bound divided by the number of clients with work) may still join, up to the bound for itself and
    twice the bound in total, so that whoever fills the queue first cannot keep others out. An empty queue admits a
    request of any size; a client then counts with at most the bound towards that total.

    Args:
        bound_seconds: bound on the work in seconds (FEWSTEP_QUEUE_SECONDS).
    """

    def __init__(self, bound_seconds: float) -> None:
        if not 0 < bound_seconds < math.inf:
            raise ValueError(f"bound_seconds must be above 0 and finite, got {bound_seconds}")
        self._bound = bound_seconds
        self._lock = threading.Lock()
        self._places: dict[int, Place] = {}
        self._finish: dict[str, float] = {}
        """The tag up to which each client has been given work; clients that virtual time has overtaken are removed."""
        self._virtual = 0.0
        self._number = 0
        self._open = True

    def join(self, client: str, seconds: float, deadline_seconds: float | None = None) -> Place:
        """Reserve a place for a request.

        Args:
            client: id of the client; the queue is fair between clients.
            seconds: predicted work, at least 0.
            deadline_seconds: time until the request's deadline; None for no deadline.

        Raises:
            Overloaded: there is no room, or the request would miss its deadline; says when to try again.
            NotReady: the queue is closed.
            ValueError: ``seconds`` is negative or not finite.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be at least 0 and finite, got {seconds}")
        with self._lock:
            if not self._open:
                raise NotReady("the server is stopping")
            if self._places:
                held = self._held()
                self._check_room(held, client, seconds)
                self._check_deadline(held, client, seconds, deadline_seconds)
            return self._admit(client, seconds)

    @property
    def seconds(self) -> float:
        """Predicted seconds of work in the queue."""
        with self._lock:
            return sum(place.remaining for place in self._places.values())

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Refuse all further requests; those in the queue stay."""
        with self._lock:
            self._open = False

    def _held(self) -> dict[str, float]:
        """Seconds of work by client."""
        held: dict[str, float] = {}
        for place in self._places.values():
            held[place.client] = held.get(place.client, 0.0) + place.remaining
        return held

    def _check_room(self, held: dict[str, float], client: str, seconds: float) -> None:
        total = sum(held.values())
        # Never more than the total, since an empty queue has room for any request.
        missing = min(total + seconds - self._bound, total)
        if missing <= 0:
            return
        own, share = held.get(client, 0.0), self._bound / len(held.keys() | {client})
        if own < share and own + seconds <= self._bound and held.keys() - {client}:
            counted = sum(min(each, self._bound) for each in held.values())
            missing = min(missing, counted + seconds - 2 * self._bound)
        if missing > 0:
            raise _overloaded(f"about {total:.1f} s of work are already in the queue", missing)

    def _check_deadline(self, held: dict[str, float], client: str, seconds: float, deadline: float | None) -> None:
        """Refuse a request that would be late.

        Clients share the machine evenly, so each other client delays this request by at most this client's own work.
        """
        own = held.get(client, 0.0) + seconds
        end = own + sum(min(each, own) for other, each in held.items() if other != client)
        if deadline is not None and end > deadline:
            about = f"the request would be done in about {end:.1f} s, but has only {deadline:g} s"
            raise _overloaded(about, min(end - deadline, sum(held.values())))

    def _admit(self, client: str, seconds: float) -> Place:
        # Not those that still wait for a model: their tags stand still while all others advance.
        drawing = (place._reached for place in self._places.values() if place._drawing)
        reached = min(drawing, default=self._virtual)
        self._virtual = max(self._virtual, reached)
        self._finish = {name: tag for name, tag in self._finish.items() if tag > self._virtual}
        own = (place._start for place in self._places.values() if place.client == client)
        start = max(self._finish.get(client, self._virtual), *own, self._virtual)
        self._finish[client] = start + seconds
        self._number += 1
        place = Place(self, client, seconds, start, self._number)
        self._places[self._number] = place
        return place

    def _leave(self, place: Place) -> None:
        with self._lock:
            if self._places.pop(place._number, None) is None:
                return
            if not self._places:  # there is nobody left to be fair to, so the clock restarts
                self._finish.clear()
                self._virtual = 0.0
                return
            if place.client in self._finish:
                self._finish[place.client] -= place._remaining


def _overloaded(why: str, seconds: float) -> Overloaded:
    retry_after = max(1, math.ceil(seconds))
    return Overloaded(f"{why}; try again in {retry_after} s", retry_after)
