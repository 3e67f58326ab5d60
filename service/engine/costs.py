"""What model calls cost by batch size: measured at warm-up, and updated while serving. Pure.

A larger batch takes longer, but mostly less than proportionally. By how much depends on the machine, so it is measured.
The size of the next batch (`CostProfile.best`) and the predicted time of a request (`Costs.predict`) follow from it.
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
"""Number of recent calls that estimates are based on. A batch size without any is scaled as the others are."""
ENOUGH = 5
"""Calls of one batch size that outweigh its measurement at warm-up; with five, two outliers do not move the median."""
ALIKE = 0.9
"""Rates count as equal if the lower is at least this fraction of the higher: call times vary by more than that."""
TINY = 1e-9
"""Seconds assumed for a call during which the clock did not advance."""
UNKNOWN_SECONDS = 0.1
"""Seconds assumed for a call of one row if nothing similar has been measured."""


class Part(NamedTuple):
    """What has a cost of its own. Models of the same architecture share it, such as a student and its base."""

    call: Call
    architecture: str
    """Distinguishes networks of different shapes or precision: see `weights.modules.architecture`."""
    shape: tuple[int, ...]
    """Shape of one row: an image's latents, or a prompt's tokens."""


class CostProfile:
    """Seconds of a call by batch size, for one `Part`.

    Reading is thread-safe; only one thread may call `observe`.

    Args:
        seconds: measured time by batch size, which must include 1. All are above 0.
        batches: batch sizes in which calls are made; None for the measured ones.
        target: longest time that a call should take; a batch of 1 may always take longer.
    """

    def __init__(self, seconds: Mapping[int, float], batches: Iterable[int] | None = None, target: float = math.inf):
        self.measured = dict(sorted(seconds.items()))
        self.batches = sorted(set(self.measured if batches is None else batches))
        if 1 not in self.measured or self.batches[:1] != [1]:
            raise ValueError(f"measured {list(self.measured)} for batches {self.batches}: 1 must be among both")
        if any(not 0 < value < math.inf for value in self.measured.values()):
            raise ValueError(f"seconds of a call must be above 0 and finite, got {self.measured}")
        self.target = target
        # Seeded as if ENOUGH calls had taken the measured time, so that a few odd first observations are outvoted.
        self._recent: deque[tuple[int, float]] = deque([(0, 1.0)] * ENOUGH)
        self._of_batch: dict[int, list[float]] = {0: [1.0] * ENOUGH}
        self._of_all = [1.0] * ENOUGH
        """Ratios of the recent calls, kept sorted, since medians are taken after every call."""
        self._estimated = self._estimate()
        """Current seconds by measured batch size, ascending; precomputed, since readers may be on the event loop."""

    @classmethod
    def measure(
        cls,
        call: Callable[[int], None],
        batches: Sequence[int],
        repeats: int,
        clock: Callable[[], float],
        target: float = math.inf,
    ) -> "CostProfile":
        """Time a call: for each batch size, one warm-up call, then the median of ``repeats``.

        A batch size that fails, for example for lack of memory, ends the measurement: no batch as large will be used.

        Args:
            call: makes one call of that batch size, and returns when it is finished.
            batches: batch sizes to measure, including 1.
            repeats: at least 1.
            clock: monotonic time in seconds.
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
            except RuntimeError:  # what torch raises for anything that a device cannot do
                if not seconds:
                    raise
                break
            seconds[batch] = max(median(taken), TINY)
        return cls(seconds, list(seconds), target)

    def seconds(self, batch: int) -> float:
        """Current seconds of a call of this batch size; never less than for a smaller one.

        Interpolated linearly between measured sizes; beyond the largest, its time per row applies.
        """
        return _on_the_curve(self._estimated, batch)

    def best(self, ready: int, unit: int = 1) -> tuple[int, int]:
        """How many of the ready rows to take now, and the batch size to pad them to.

        Maximizes rows per second within the target. Of several choices that are about equally fast (`ALIKE`), this
        takes the one with the most rows, since every call has an overhead, and then the one with the least padding.

        Args:
            ready: number of rows, at least ``unit``.
            unit: rows of one image, which stay together (two with guidance). If images differ, the fewest: the caller
                may then fill fewer rows than are returned here, and should ask `fit` for the batch size.

        Raises:
            ValueError: there are fewer rows than a unit, or no batch holds a unit.
        """
        smallest = self.fit(unit)
        if ready < unit:
            raise ValueError(f"{ready} row(s) are ready, fewer than the {unit} of one image")
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
        """The smallest batch size that holds this many rows.

        Raises:
            ValueError: there is none.
        """
        place = bisect_left(self.batches, rows)
        if place == len(self.batches):
            raise ValueError(f"no batch holds {rows} rows; the largest is {self.batches[-1]}")
        return self.batches[place]

    @property
    def seconds_per_row(self) -> float:
        """Seconds per row in the best full batch within the target: what one more row costs a busy server."""
        return self._per_row(self._estimated)

    @property
    def measured_per_row(self) -> float:
        """The same as measured at warm-up, regardless of any slowdown since."""
        return self._per_row(self.measured)

    def _per_row(self, points: Mapping[int, float]) -> float:
        full = [(batch, _on_the_curve(points, batch)) for batch in self.batches]
        return min(seconds / batch for batch, seconds in full if batch == 1 or seconds <= self.target)

    def observe(self, batch: int, seconds: float) -> None:
        """Record how long a call of this batch size took.

        Estimates are the measured times multiplied by the median ratio of recent times to measured ones: single
        outliers have no effect, and a lasting change shows after a few calls. A batch size with too few recent calls is
        assumed to have become faster or slower by the same factor as the rest, so one that once looked slow is not
        avoided for ever.
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
        """An independent profile of something that costs ``factor`` times as much."""
        return CostProfile({b: s * factor for b, s in self._estimated.items()}, self.batches, self.target)

    def among(self, batches: Collection[int]) -> "CostProfile":
        """A snapshot for calls in only those batch sizes that are among ``batches``, or of one row if none are."""
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
    """The median of sorted values."""
    half = len(rising) // 2
    return rising[half] if len(rising) % 2 else (rising[half - 1] + rising[half]) / 2


def _on_the_curve(points: Mapping[int, float], batch: int) -> float:
    """Seconds at ``batch``, interpolated or extrapolated from ``points`` (ascending, starting at 1)."""
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
    """Profiles by `Part`. Thread-safe, except that only one thread may call `observe`.

    Args:
        batches: batch sizes in which calls are made, those of the backend, including 1.
        target: longest time in seconds that a call should take (FEWSTEP_TICK_SECONDS).
    """

    def __init__(self, batches: Sequence[int], target: float) -> None:
        self.batches, self.target = list(batches), target
        self._measured: dict[Part, CostProfile] = {}
        self._guessed: dict[Part, CostProfile] = {}
        self._lock = threading.Lock()

    def put(self, part: Part, seconds: Mapping[int, float]) -> CostProfile:
        """Set what this part costs from a measurement, such as ``CostProfile.measure(...).measured``.

        Batches larger than the largest measured size will not be used.
        """
        batches = [batch for batch in self.batches if batch <= max(seconds)]
        profile = CostProfile(seconds, batches, self.target)
        with self._lock:
            self._measured[part] = profile
            self._guessed.pop(part, None)
        return profile

    def of(self, part: Part) -> CostProfile:
        """The cost profile of this part: measured, or guessed from the nearest part and observed from then on.

        For the same architecture at another shape, the cost is proportional to the size of a row. For an unknown
        architecture, the most expensive known one is assumed, since promising too much is worse.
        """
        with self._lock:
            profile = self._measured.get(part) or self._guessed.get(part)
            if profile is None:
                profile = self._guessed[part] = self._guess(part)
            return profile

    def observe(self, part: Part, batch: int, seconds: float) -> None:
        """Record how long a call of this part took; see `CostProfile.observe`."""
        self.of(part).observe(batch, seconds)

    def predict(self, work: Iterable[tuple[Part, int]], alone: bool = False) -> float:
        """Predicted seconds for numbers of rows of each part, at the throughput of full batches.

        With ``alone``, every call has one row, as for deterministic images.

        A request is (network, images times evaluations), (decoder, images) and (text encoder, prompts). If the base
        makes some of the steps, its network is listed separately.
        """
        return sum(rows * (self.of(part).seconds(1) if alone else self.of(part).seconds_per_row) for part, rows in work)

    def least(self, work: Iterable[tuple[Part, int]], alone: bool = False) -> float:
        """`predict` by the measurements of warm-up.

        Refused requests make no calls, so that current costs could stay high long after a slowdown has ended.
        """
        return sum(
            rows * (self.of(part).measured[1] if alone else self.of(part).measured_per_row) for part, rows in work
        )

    def _guess(self, part: Part) -> CostProfile:
        alike = {known: profile for known, profile in self._measured.items() if known.call == part.call}
        if not alike:
            return CostProfile({1: UNKNOWN_SECONDS}, self.batches, self.target)
        for known, profile in alike.items():
            if known.architecture == part.architecture:
                return profile.scaled(math.prod(part.shape) / math.prod(known.shape))
        return max(alike.values(), key=lambda profile: profile.seconds_per_row).scaled(1.0)
