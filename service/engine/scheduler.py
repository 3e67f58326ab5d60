"""Which call of the models comes next, and for which pictures. Pure: it knows neither torch nor time.

Everything that is ready stands in the line's order. The first one's call is made, and whoever is ready for the same call
rides along, in the same order, as far as the batch reaches. So nobody who is first ever waits for company, and no company
costs the first more than a larger batch does.

The two ends of a picture's way come before its middle. Until a prompt is encoded its pictures can ride along with nobody:
in strict order, requests would be drawn one after another. And a picture that needs its decoder alone is done by one call,
for which it would else wait while everybody before it takes all of their steps. But networks get every other call where
there is one to be made, so that nobody's wait is more than doubled by those who come later.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from service.engine.costs import Part
from service.engine.observer import Call


@dataclass(frozen=True)
class Group:
    """What has to agree for two pictures to share a call."""

    part: Part
    """Which part of a model, and the shape of a row."""
    model: Hashable
    """Whose part: the model itself, by identity."""
    alone: bool
    """Nobody shares these calls, which have one row each: the pictures are deterministic."""
    name: str = field(compare=False)
    """The model's, for people."""


class Work(Protocol):
    """A picture, or a prompt, that is ready for its next call."""

    @property
    def group(self) -> Group:
        """The call."""

    @property
    def rows(self) -> int:
        """Of the call: two for a guided step, else one."""


class Profile(Protocol):
    """What is known of a call's cost: `service.engine.costs.CostProfile`."""

    batches: list[int]

    def best(self, ready: int, unit: int = 1) -> tuple[int, int]:
        """Rows to take of the ready ones, and the batch to pad them to."""

    def fit(self, rows: int) -> int:
        """The smallest batch that holds so many rows."""


W = TypeVar("W", bound=Work)


def choose(ready: Sequence[W], profile: Callable[[Group], Profile], after: Call | None = None) -> list[W]:
    """Who takes part in the next call.

    Args:
        ready: in the line's order, at least one.
        profile: of a group's calls.
        after: what the call before was for.

    Returns:
        The first of those that are ready for a network, or of the others, and more of its group. They fit into the largest
        batch together, but for a single one that does not fit alone: see `batch_of`.
    """
    grouped = [(work, work.group) for work in ready]  # asked once: thousands may wait
    middle = next((each for each in grouped if each[1].part.call == "network"), None)
    end = next((each for each in grouped if each[1].part.call != "network"), None)
    chosen_first = end if end is not None and (middle is None or after in (None, "network")) else middle
    assert chosen_first is not None, "callers have somebody ready"
    first, group = chosen_first
    own = profile(group)
    if group.alone or first.rows > own.batches[-1]:
        return [first]
    alike = [work for work, theirs in grouped if theirs == group and work.rows <= own.batches[-1]]
    if len(alike) == 1:
        return alike
    # Rows are taken by twos where everybody brings two; where some bring one, they fill what is left.
    most, _ = own.best(sum(work.rows for work in alike), min(work.rows for work in alike))
    chosen, taken = [first], first.rows
    for work in alike[1:]:
        if taken + work.rows <= most:
            chosen.append(work)
            taken += work.rows
    return chosen


def batch_of(works: Sequence[Work], profile: Profile) -> int:
    """The batch that these take, or several of its size: deterministic ones go row by row, as does what fits into none."""
    rows = sum(work.rows for work in works)
    return 1 if works[0].group.alone or rows > profile.batches[-1] else profile.fit(rows)
