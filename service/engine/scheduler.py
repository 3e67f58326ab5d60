"""Chooses the next model call, and the images that share it. Pure: it knows neither torch nor time.

Everything that is ready is in queue order. The first item gets its call, and others that are ready for the same call
join it, in the same order, as far as the batch size allows. So the first item never waits for company, and company
costs it no more than a larger batch does.

Text encoding and decoding take precedence over networks. Until a prompt is encoded, its images cannot share any call:
in strict order, requests would be served one after another. And an image that only needs its decoder is finished by one
call, which would otherwise wait until everything before it has made all its steps. But networks get at least every
other call if one is ready, so that later requests at most double anyone's wait.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from service.engine.costs import Part
from service.engine.observer import Call


@dataclass(frozen=True)
class Group:
    """What two images must have in common to share a call."""

    part: Part
    """The part of the model, and the shape of a row."""
    model: Hashable
    """The model that the part belongs to, by identity."""
    alone: bool
    """These calls are not shared, and have one row each: the images are deterministic."""
    name: str = field(compare=False)
    """Name of the model for messages and metrics."""


class Work(Protocol):
    """An image or a prompt that is ready for its next call."""

    @property
    def group(self) -> Group:
        """The group of the call."""

    @property
    def rows(self) -> int:
        """Rows in the call: two for a guided step, else one."""


class Profile(Protocol):
    """The cost of a call: see `service.engine.costs.CostProfile`."""

    batches: list[int]

    def best(self, ready: int, unit: int = 1) -> tuple[int, int]:
        """How many of the ready rows to take, and the batch size to pad them to."""

    def fit(self, rows: int) -> int:
        """The smallest batch size that holds this many rows."""


W = TypeVar("W", bound=Work)


def choose(ready: Sequence[W], profile: Callable[[Group], Profile], after: Call | None = None) -> list[W]:
    """Choose the items for the next call.

    Args:
        ready: items in queue order, at least one.
        profile: gives the cost profile of a group.
        after: kind of the previous call.

    Returns:
        The first item that is ready for a network, or the first of the others, and more items of its group. Together
        they fit into the largest batch, except for a single item that does not fit alone: see `batch_of`.
    """
    grouped = [(work, work.group) for work in ready]  # computed once: thousands may be waiting
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
    # Rows are counted in pairs if every item has two; if some have one, these fill what is left.
    most, _ = own.best(sum(work.rows for work in alike), min(work.rows for work in alike))
    chosen, taken = [first], first.rows
    for work in alike[1:]:
        if taken + work.rows <= most:
            chosen.append(work)
            taken += work.rows
    return chosen


def batch_of(works: Sequence[Work], profile: Profile) -> int:
    """The batch size for these items.

    Deterministic items are computed row by row, as are items that do not fit into any batch.
    """
    rows = sum(work.rows for work in works)
    return 1 if works[0].group.alone or rows > profile.batches[-1] else profile.fit(rows)
