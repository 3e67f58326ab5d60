"""The line of admitted requests: bounded by the time that they will take, fair between clients. Pure; thread-safe.

Order is start-time fair queueing (Goyal, Vin & Cheng 1996, section 2): work has a tag on a virtual clock, and the lowest
tag goes first. A client's work gets tags one after another, as far apart as it takes seconds; a client that was idle starts
at the virtual time of now, which is how far the line has come. So a single picture is not behind another client's hundred.
"""

import math
import threading

from service.engine.base import NotReady, Overloaded

Order = tuple[float, int, int]
"""Compares as the line wants it, lowest first: tag on the virtual clock, number of the request, number of the picture."""


class Place:
    """One request's place; made by `Line.join`.

    Attributes:
        client: whose it is.
        seconds: of work, as predicted when it joined.
    """

    def __init__(self, line: "Line", client: str, seconds: float, start: float, number: int) -> None:
        self.client, self.seconds = client, seconds
        self._line, self._start, self._number = line, start, number
        self._remaining = seconds
        self._drawing = False

    @property
    def order(self) -> Order:
        """Where the request stands, and its first picture."""
        return self._start, self._number, 0

    def orders(self, pictures: int) -> list[Order]:
        """Where each of its pictures stands: they share its seconds, so that another client's come in between."""
        share = self.seconds / max(pictures, 1)
        return [(self._start + index * share, self._number, index) for index in range(pictures)]

    @property
    def remaining(self) -> float:
        """Seconds of work that are left."""
        return self._remaining

    def begin(self) -> None:
        """Its model is there, and it is being drawn: from now on virtual time goes by it."""
        self._drawing = True

    def progress(self, remaining_seconds: float) -> None:
        """So much is left: never more than before, since others were admitted on the strength of that."""
        with self._line._lock:
            self._remaining = min(self._remaining, max(0.0, remaining_seconds))

    def leave(self) -> None:
        """Done (after ``progress(0)``), or given up: its client is not charged for what is left. Again: nothing."""
        self._line._leave(self)

    @property
    def _reached(self) -> float:
        """Its tag, moved on by what was done."""
        return self._start + self.seconds - self._remaining


class Line:
    """Who is in, and who may come in.

    A request is admitted while the seconds of work in the line stay within the bound. Over it, a client still gets in that
    holds less than its fair share (the bound over the number of clients with work), up to the bound for itself and to twice
    the bound for all: so whoever fills the line first cannot keep the others out. An empty line admits a request of any
    size, which counts as the bound when others come after it.

    Args:
        bound_seconds: of work (FEWSTEP_QUEUE_SECONDS).
    """

    def __init__(self, bound_seconds: float) -> None:
        if not 0 < bound_seconds < math.inf:
            raise ValueError(f"bound_seconds must be above 0 and finite, got {bound_seconds}")
        self._bound = bound_seconds
        self._lock = threading.Lock()
        self._places: dict[int, Place] = {}
        self._finish: dict[str, float] = {}
        """Up to which tag each client has been given work; without those whom virtual time has overtaken."""
        self._virtual = 0.0
        self._number = 0
        self._open = True

    def join(self, client: str, seconds: float, deadline_seconds: float | None = None) -> Place:
        """A place for a request.

        Args:
            client: the line is fair between clients.
            seconds: of work, predicted, at least 0.
            deadline_seconds: from now; None for no deadline.

        Raises:
            Overloaded: there is no room, or the request would not be done by its deadline; says when to come again.
            NotReady: the line is closed.
            ValueError: these are no seconds.
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
        """Of work in the line, as predicted."""
        with self._lock:
            return sum(place.remaining for place in self._places.values())

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Let nobody in any more; those who are in stay."""
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
        missing = min(total + seconds - self._bound, total)  # the latter: an empty line has room for any request
        if missing <= 0:
            return
        own, share = held.get(client, 0.0), self._bound / len(held.keys() | {client})
        if own < share and own + seconds <= self._bound and held.keys() - {client}:
            counted = sum(min(each, self._bound) for each in held.values())
            missing = min(missing, counted + seconds - 2 * self._bound)
        if missing > 0:
            raise _overloaded(f"about {total:.1f} s of work are waiting already", missing)

    def _check_deadline(self, held: dict[str, float], client: str, seconds: float, deadline: float | None) -> None:
        """Clients share the machine evenly, so each other one delays this by no more than this client's own work."""
        own = held.get(client, 0.0) + seconds
        end = own + sum(min(each, own) for other, each in held.items() if other != client)
        if deadline is not None and end > deadline:
            about = f"the request would be done in about {end:.1f} s, and has {deadline:g} s"
            raise _overloaded(about, min(end - deadline, sum(held.values())))

    def _admit(self, client: str, seconds: float) -> Place:
        # Not those that wait for a model: they stand where they stood, while everybody else goes on.
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
            if not self._places:  # nobody is left to be fair to: the clock starts again
                self._finish.clear()
                self._virtual = 0.0
                return
            if place.client in self._finish:
                self._finish[place.client] -= place._remaining


def _overloaded(why: str, seconds: float) -> Overloaded:
    retry_after = max(1, math.ceil(seconds))
    return Overloaded(f"{why}; try again in {retry_after} s", retry_after)
