"""What calls of the models cost, by batch size: measured at warm-up, kept current while serving, and what is made of it.

A bigger batch takes longer, and mostly less than in proportion. How much less depends on the machine, so it is measured;
from that come the size of the next batch (`CostProfile.best`) and what a request will take (`Costs.predict`). Pure.
"""

import math
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from itertools import accumulate
from statistics import median
from typing import NamedTuple

from service.engine.observer import Call

RECENT = 64
"""Calls that estimates are made of. A batch that was not called among them goes by how fast the others are now."""
ENOUGH = 5
"""Calls of one batch that outweigh its measurement at warm-up: two of them can be outliers without any effect."""
ALIKE = 0.9
"""Rates of which the lower is at least so much of the higher are the same: calls' times waver by more."""
TINY = 1e-9
"""Seconds of a call during which the clock did not move."""
UNKNOWN_SECONDS = 0.1
"""Of a call of one row, where nothing like it was ever measured."""


class Part(NamedTuple):
    """What has a cost of its own: models of the same architecture share it, a student and its base for instance."""

    call: Call
    architecture: str
    """Tells networks of other shapes or precision apart: see `weights.modules.architecture`."""
    shape: tuple[int, ...]
    """Of one row: a picture's latents, or a prompt's tokens."""


class CostProfile:
    """Seconds of a call by its batch size, for one `Part`.

    Reading is safe from any thread; one thread observes.

    Args:
        seconds: as measured, by batch size; 1 is among them. All are above 0.
        batches: sizes that calls are made in; the measured ones when left out.
        target: seconds that a call may take; a batch of 1 may always take longer.
    """

    def __init__(self, seconds: Mapping[int, float], batches: Iterable[int] | None = None, target: float = math.inf):
        self.measured = dict(sorted(seconds.items()))
        self.batches = sorted(set(self.measured if batches is None else batches))
        if 1 not in self.measured or self.batches[:1] != [1]:
            raise ValueError(f"measured {list(self.measured)} for batches {self.batches}: 1 must be among both")
        if any(not 0 < value < math.inf for value in self.measured.values()):
            raise ValueError(f"seconds of a call must be above 0 and finite, got {self.measured}")
        self.target = target
        # As if ENOUGH calls had taken what was measured, so that the first ones observed are outvoted if they are odd.
        self._recent: deque[tuple[int, float]] = deque([(0, 1.0)] * ENOUGH)
        self._of_batch: dict[int, list[float]] = {0: [1.0] * ENOUGH}
        self._of_all = [1.0] * ENOUGH
        """The recent calls' ratios, rising: kept in order, since medians are taken after every call."""
        self._estimated = self._estimate()
        """Seconds now by measured batch size, rising. Made by who observes, since others ask on the event loop."""

    @classmethod
    def measure(
        cls,
        call: Callable[[int], None],
        batches: Sequence[int],
        repeats: int,
        clock: Callable[[], float],
        target: float = math.inf,
    ) -> "CostProfile":
        """Time calls: for each batch size one that does not count, then the median of ``repeats``.

        A batch that fails, for want of memory say, ends it: no larger one is made from then on.

        Args:
            call: makes one call of that batch size, and returns when it is done.
            batches: sizes to measure, 1 among them.
            repeats: at least 1.
            clock: seconds, rising.
            target: see `CostProfile`.
        """
        seconds: dict[int, float] = {}
        for batch in sorted(batches):
            taken = []
            try:
                call(batch)
                for _ in range(repeats):
                    begun = clock()
                    call(batch)
                    taken.append(clock() - begun)
            except RuntimeError:  # torch's for everything that a device cannot do
                if not seconds:
                    raise
                break
            seconds[batch] = max(median(taken), TINY)
        return cls(seconds, list(seconds), target)

    def seconds(self, batch: int) -> float:
        """Of a call of this batch size now; never less than that of a smaller one.

        Between two measured sizes the line from one to the other is taken; beyond the largest, its time per row.
        """
        return _on_the_curve(self._estimated, batch)

    def best(self, ready: int, unit: int = 1) -> tuple[int, int]:
        """How many of the ready rows to take now, and the batch to pad them to: most rows per second within the target.

        Of several that are about as good (`ALIKE`), the one that takes the most rows, since each call has costs of its
        own around it; and then the one that pads least.

        Args:
            ready: rows, at least ``unit``.
            unit: rows of a picture, which stay together (two under guidance). Where pictures differ: the most; whoever
                fills the batch may then come out below the rows returned here, and asks `fit` for the batch.

        Raises:
            ValueError: fewer rows than a unit, or a unit that no batch holds.
        """
        smallest = self.fit(unit)
        if ready < unit:
            raise ValueError(f"{ready} row(s) are ready, fewer than the {unit} of one picture")
        choices = []
        for batch in self.batches:
            seconds = self.seconds(batch)
            if batch == smallest or (batch > smallest and seconds <= self.target):
                rows = min(ready, batch) // unit * unit
                choices.append((rows / seconds, rows, batch))
        fastest = max(rate for rate, _, _ in choices)
        good = [(rows, -batch) for rate, rows, batch in choices if rate >= ALIKE * fastest]
        rows, negative = max(good)
        return rows, -negative

    def fit(self, rows: int) -> int:
        """The smallest batch that holds so many rows.

        Raises:
            ValueError: none does.
        """
        place = bisect_left(self.batches, rows)
        if place == len(self.batches):
            raise ValueError(f"no batch holds {rows} rows; the largest is {self.batches[-1]}")
        return self.batches[place]

    @property
    def seconds_per_row(self) -> float:
        """In the best full batch within the target: what one more row costs a busy server."""
        return self._per_row(self._estimated)

    @property
    def measured_per_row(self) -> float:
        """The same as at warm-up, whatever has slowed calls since."""
        return self._per_row(self.measured)

    def _per_row(self, points: Mapping[int, float]) -> float:
        full = [(batch, _on_the_curve(points, batch)) for batch in self.batches]
        return min(seconds / batch for batch, seconds in full if batch == 1 or seconds <= self.target)

    def observe(self, batch: int, seconds: float) -> None:
        """A call of this batch size took so long.

        Estimates are medians of the last calls' times over the measured ones: single outliers do nothing, and what stays
        shows after a few calls. A batch that was called too seldom is taken to be as much faster or slower than at
        warm-up as the rest is: one that looked slow once is not shunned for ever.
        """
        ratio = max(seconds, TINY) / _on_the_curve(self.measured, batch)
        self._recent.append((batch, ratio))
        for ratios in (self._of_all, self._of_batch.setdefault(batch, [])):
            insort(ratios, ratio)
        if len(self._recent) > RECENT:
            oldest, gone = self._recent.popleft()
            for ratios in (self._of_all, self._of_batch[oldest]):
                del ratios[bisect_left(ratios, gone)]
        self._estimated = self._estimate()

    def scaled(self, factor: float) -> "CostProfile":
        """A profile of its own for something that costs ``factor`` times as much."""
        return CostProfile({b: s * factor for b, s in self._estimated.items()}, self.batches, self.target)

    def among(self, batches: Collection[int]) -> "CostProfile":
        """What is known now, for calls of those batch sizes alone that are among these, or else of one row."""
        if set(self.batches) <= set(batches):
            return self
        some = copy(self)
        some.batches = [batch for batch in self.batches if batch in batches] or self.batches[:1]
        return some

    def _estimate(self) -> dict[int, float]:
        common = _middle(self._of_all)
        now = []
        for batch, seconds in self.measured.items():
            own = self._of_batch.get(batch, ())
            now.append(seconds * (_middle(own) if len(own) >= ENOUGH else common))
        return dict(zip(self.measured, accumulate(now, max), strict=True))


def _middle(rising: Sequence[float]) -> float:
    """The median of values in order."""
    half = len(rising) // 2
    return rising[half] if len(rising) % 2 else (rising[half - 1] + rising[half]) / 2


def _on_the_curve(points: Mapping[int, float], batch: int) -> float:
    """Seconds at ``batch``, between or beyond ``points`` (rising, 1 the first)."""
    known = points.get(batch)
    if known is not None:
        return known
    sizes = list(points)
    place = bisect_left(sizes, batch)
    if place == len(sizes):
        return points[sizes[-1]] * batch / sizes[-1]
    low, high = sizes[place - 1], sizes[place]
    share = (batch - low) / (high - low)
    return points[low] + share * (points[high] - points[low])


class Costs:
    """Profiles by `Part`. Any thread may ask; one observes.

    Args:
        batches: sizes that calls are made in, 1 among them; those of the backend.
        target: seconds that a call may take (FEWSTEP_TICK_SECONDS).
    """

    def __init__(self, batches: Sequence[int], target: float) -> None:
        self.batches, self.target = list(batches), target
        self._measured: dict[Part, CostProfile] = {}
        self._guessed: dict[Part, CostProfile] = {}
        self._lock = threading.Lock()

    def put(self, part: Part, seconds: Mapping[int, float]) -> CostProfile:
        """Take a measurement (such as ``CostProfile.measure(...).measured``) for what this part costs.

        No batch larger than the largest measured one is made.
        """
        batches = [batch for batch in self.batches if batch <= max(seconds)]
        profile = CostProfile(seconds, batches, self.target)
        with self._lock:
            self._measured[part] = profile
            self._guessed.pop(part, None)
        return profile

    def of(self, part: Part) -> CostProfile:
        """What this part costs: guessed from the nearest one where it was not measured, and from then on observed.

        The same architecture at another shape costs in proportion to the row's size; of another architecture the most
        expensive one is taken, since it is worse to promise too much.
        """
        with self._lock:
            profile = self._measured.get(part) or self._guessed.get(part)
            if profile is None:
                profile = self._guessed[part] = self._guess(part)
            return profile

    def observe(self, part: Part, batch: int, seconds: float) -> None:
        """A call of this part took so long; see `CostProfile.observe`."""
        self.of(part).observe(batch, seconds)

    def predict(self, work: Iterable[tuple[Part, int]]) -> float:
        """Seconds of so many rows of each part, at the throughput of full batches.

        A request is (network, pictures times evaluations), (decoder, pictures) and (text encoder, prompts), with the
        base's network apart where that draws a part of the way.
        """
        return sum(rows * self.of(part).seconds_per_row for part, rows in work)

    def least(self, work: Iterable[tuple[Part, int]]) -> float:
        """`predict` as at warm-up. What is refused makes no calls, which could show that a slow time is over."""
        return sum(rows * self.of(part).measured_per_row for part, rows in work)

    def _guess(self, part: Part) -> CostProfile:
        alike = {known: profile for known, profile in self._measured.items() if known.call == part.call}
        if not alike:
            return CostProfile({1: UNKNOWN_SECONDS}, self.batches, self.target)
        for known, profile in alike.items():
            if known.architecture == part.architecture:
                return profile.scaled(math.prod(part.shape) / math.prod(known.shape))
        return max(alike.values(), key=lambda profile: profile.seconds_per_row).scaled(1.0)
