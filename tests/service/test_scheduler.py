"""Which call comes next: properties that hold whatever is ready."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.costs import CostProfile, Part
from service.engine.observer import Call
from service.engine.scheduler import Group, batch_of, choose

PARTS = [
    Part("text", "t", ()),
    Part("network", "n", (4, 8, 8)),
    Part("network", "n", (4, 16, 16)),
    Part("decoder", "d", ()),
]


@dataclass(eq=False)
class Piece:
    """A picture that still needs these calls."""

    todo: list[tuple[Group, int]]

    @property
    def group(self) -> Group:
        return self.todo[0][0]

    @property
    def rows(self) -> int:
        return self.todo[0][1]


def groups() -> st.SearchStrategy[Group]:
    return st.builds(Group, st.sampled_from(PARTS), st.integers(0, 1), st.booleans(), st.just("model"))


def pieces() -> st.SearchStrategy[Piece]:
    call = st.tuples(groups(), st.integers(1, 2))
    return st.builds(Piece, st.lists(call, min_size=1, max_size=5))


def profiles() -> st.SearchStrategy[CostProfile]:
    """Any batches from 1, any cost that a batch may have, any target."""
    sizes = st.sets(st.integers(2, 9), max_size=4).map(lambda more: [1, *sorted(more)])
    seconds = sizes.flatmap(
        lambda batches: st.lists(st.floats(1e-3, 10), min_size=len(batches), max_size=len(batches)).map(
            lambda costs: dict(zip(batches, costs, strict=True))
        )
    )
    return st.builds(CostProfile, seconds, target=st.one_of(st.just(math.inf), st.floats(1e-3, 10)))


def always(profile: CostProfile) -> Callable[[Group], CostProfile]:
    return lambda _group: profile


def is_end(piece: Piece) -> bool:
    return piece.group.part.call != "network"


@settings(max_examples=300)
@given(
    ready=st.lists(pieces(), min_size=1, max_size=12),
    profile=profiles(),
    after=st.sampled_from([None, "text", "network", "decoder"]),
)
def test_a_call_is_one_that_its_pictures_share_and_hold(
    ready: list[Piece], profile: CostProfile, after: Call | None
) -> None:
    chosen = choose(ready, always(profile), after)
    first = chosen[0]
    assert first is next(each for each in ready if is_end(each) == is_end(first)), "the first is never passed over"
    assert len({id(each) for each in chosen}) == len(chosen), "nobody is in a call twice"
    places = [ready.index(each) for each in chosen]
    assert places == sorted(places)
    assert {each.group for each in chosen} == {first.group}
    rows, batch = sum(each.rows for each in chosen), batch_of(chosen, profile)
    assert batch in profile.batches
    assert rows <= batch or len(chosen) == 1, "only a picture that fits nowhere is more than one batch"
    if first.group.alone:
        assert (len(chosen), batch) == (1, 1)


@settings(max_examples=100)
@given(ready=st.lists(pieces(), min_size=1, max_size=12), largest=st.integers(2, 9))
def test_a_batch_is_as_full_as_is_best(ready: list[Piece], largest: int) -> None:
    """Where bigger batches cost nothing, nobody who fits is left out."""
    profile = CostProfile(dict.fromkeys(range(1, largest + 1), 1.0))
    chosen = choose(ready, always(profile))
    free = largest - sum(each.rows for each in chosen)
    left = [each for each in ready if each.group == chosen[0].group and each not in chosen]
    assert chosen[0].group.alone or all(each.rows > free for each in left)


def test_ends_and_networks_take_turns() -> None:
    text, network, _, decoder = (Group(part, 0, False, "model") for part in PARTS)
    steps, done, new = Piece([(network, 1)]), Piece([(decoder, 1)]), Piece([(text, 1)])
    profile = always(CostProfile({1: 1.0}))
    assert choose([steps, done, new], profile, "network") == [done]
    assert choose([steps, new, done], profile, "network") == [new]
    assert choose([new, done, steps], profile, "text") == [steps]
    assert choose([new, done, steps], profile, "decoder") == [steps]
    assert choose([new, done], profile, "decoder") == [new]
    assert choose([steps], profile, "network") == [steps]


@settings(max_examples=100)
@given(arrivals=st.lists(st.tuples(st.integers(0, 30), pieces()), min_size=1, max_size=12), profile=profiles())
def test_nobody_starves(arrivals: list[tuple[int, Piece]], profile: CostProfile) -> None:
    """Of any two calls one is for a picture or for somebody before it, whatever comes later: who comes joins at once."""
    order = sorted(arrivals, key=lambda arrival: arrival[0])
    calls = {id(piece): len(piece.todo) for _, piece in order}
    coming, waiting = list(order), list[Piece]()
    done: dict[int, int] = {}
    tick, last = 0, None
    while coming or waiting:
        waiting += [piece for at, piece in coming if at <= tick]
        coming = [(at, piece) for at, piece in coming if at > tick]
        tick += 1
        chosen = choose(waiting, always(profile), last) if waiting else []
        last = chosen[0].group.part.call if chosen else last
        for piece in chosen:
            piece.todo.pop(0)
            if not piece.todo:
                done[id(piece)] = tick
        waiting = [piece for piece in waiting if piece.todo]
    for place, (at, piece) in enumerate(order):
        before = sum(calls[id(earlier)] for _, earlier in order[:place])
        assert done[id(piece)] <= at + 2 * (before + calls[id(piece)])
