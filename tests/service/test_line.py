"""The line: bounded in seconds, fair between clients, honest about when to come again."""

import threading
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.base import BadRequest, NotReady, Overloaded
from service.engine.line import Line, Place
from service.engine.plan import check_time
from service.engine.step_engine import StepEngine
from tests.service.conftest import TinyBase
from tests.service.engine_help import Harness, request

BOUND = 10.0


def full(line: Line, client: str, pieces: int = 10) -> list[Place]:
    return [line.join(client, BOUND / pieces) for _ in range(pieces)]


def begun(line: Line, client: str) -> Place:
    place = line.join(client, 1.0)
    place.begin()
    return place


def refused(line: Line, client: str, seconds: float, deadline: float | None = None) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        line.join(client, seconds, deadline)
    return caught.value


def test_it_is_bounded_in_seconds_of_work() -> None:
    line = Line(BOUND)
    places = full(line, "a")
    assert (line.seconds, len(line)) == (pytest.approx(BOUND), 10)
    assert refused(line, "a", 0.5).retry_after == 1
    assert refused(line, "a", 5.5).retry_after == 6
    places[0].progress(0.4)
    line.join("a", 0.5)
    places[1].leave()
    line.join("a", 1.0)
    assert len(line) == 11


def test_an_empty_line_admits_a_request_of_any_size() -> None:
    line = Line(BOUND)
    place = line.join("a", 10 * BOUND, deadline_seconds=1.0)
    assert refused(line, "a", 1.0).retry_after == 91
    assert refused(line, "b", 2 * BOUND).retry_after == 100, "which does not fit before the line is empty"
    line.join("b", 1.0)
    place.leave()
    assert line.seconds == pytest.approx(1.0)


def test_what_cannot_be_in_time_by_itself_is_refused_with_what_to_change() -> None:
    for seconds in (1.0, 15.0, 30.0):
        check_time(seconds, 15.0)
    with pytest.raises(
        BadRequest, match=r"about 32\.0 s, but has only 15 s \(FEWSTEP_REQUEST_TIMEOUT.*fewer steps"
    ) as caught:
        check_time(32.0, 15.0)
    assert caught.value.param == "steps"


def test_the_engine_refuses_what_has_no_chance(tiny_base: TinyBase, tmp_path: Path) -> None:
    harness = Harness(tiny_base, tmp_path)
    harness.publish()

    async def scenario(engine: StepEngine) -> None:
        assert len(await engine.generate(request(seconds=60.0))) == 1  # and from here on the model is known
        with pytest.raises(BadRequest, match=r"would take about .* s, but has only 0\.001 s"):
            await engine.generate(request(seeds=tuple(range(50)), seconds=0.001))
        assert engine.load().pictures == 0

    harness.run(scenario)


def test_when_to_come_again_is_when_there_is_room() -> None:
    line = Line(BOUND)
    places = full(line, "a")
    seconds = refused(line, "a", 3.0).retry_after
    places[0].progress(0)
    assert seconds == 3
    for place in places[:3]:
        place.leave()
    line.join("a", 3.0)


def test_no_client_can_shut_another_out() -> None:
    line = Line(BOUND)
    full(line, "a")
    line.join("b", 4.0)
    refused(line, "a", 0.1)
    line.join("b", 2.0)
    refused(line, "b", 0.1)
    line.join("c", 3.0)
    assert refused(line, "d", 2.0).retry_after == 1, "but there is an end to it, at twice the bound"


def test_a_request_that_would_time_out_anyway_is_refused() -> None:
    line = Line(BOUND)
    full(line, "a")
    assert refused(line, "b", 3.0, deadline=5.5).retry_after == 1
    line.join("b", 3.0, deadline_seconds=6.5)  # a's work delays it by no more than its own
    other = Line(100.0)
    full(other, "a")
    assert refused(other, "a", 1.0, deadline=3.5).retry_after == 8
    assert "would be done in about 11.0 s, but has only 3.5 s" in str(refused(other, "a", 1.0, deadline=3.5))


def test_one_picture_is_not_behind_anothers_hundred() -> None:
    line = Line(1000.0)
    hundred = line.join("a", 100.0)
    hundred.begin()
    ranks = hundred.orders(100)
    assert ranks[0] == hundred.order
    assert ranks == sorted(ranks)
    hundred.progress(90.0)  # ten are drawn
    one = line.join("b", 1.0)
    later = line.join("a", 1.0)
    assert ranks[9] < one.order < ranks[11]
    assert later.order > ranks[-1], "a client's own requests keep their order"


def test_who_was_idle_has_nothing_saved_up() -> None:
    line = Line(1000.0)
    ranks = [begun(line, "a") for _ in range(20)]
    line.join("b", 1.0).leave()
    for place in ranks[:10]:
        place.progress(0)
        place.leave()
    orders = [line.join("b", 1.0).order for _ in range(3)]
    assert ranks[10].order <= orders[0] < ranks[11].order < orders[1] < ranks[12].order < orders[2]


def test_who_waits_for_a_model_does_not_hold_the_clock() -> None:
    line = Line(1000.0)
    cold = line.join("a", 1.0)
    busy = line.join("b", 60.0)
    busy.begin()
    busy.progress(10.0)
    late = line.join("c", 1.0)
    assert late.order > (50.0, 0, 0) > cold.order, "it was idle, and has nothing saved up"
    cold.begin()
    assert line.join("d", 1.0).order > late.order, "virtual time does not go back"


def test_what_was_given_up_is_not_charged() -> None:
    line = Line(1000.0)
    line.join("a", 1.0)
    line.join("b", 100.0).leave()
    fresh, steady = line.join("b", 1.0), line.join("c", 1.0)
    assert fresh.order[0] == steady.order[0]


def test_coming_back_at_once_buys_nothing() -> None:
    """A client that asks for big pictures one at a time gets no more than one that asked for many at once."""
    line = Line(1000.0)
    first, small = line.join("big", 10.0), line.join("small", 1.0)
    line.join("small", 1.0)
    first.progress(0)
    first.leave()
    assert line.join("big", 10.0).order > small.order
    assert line.join("small", 1.0).order < line.join("big", 1.0).order


def test_a_place_is_left_once_and_work_never_grows() -> None:
    line = Line(BOUND)
    place = line.join("a", 2.0)
    line.join("b", 1.0)
    place.progress(1.5)
    place.progress(1.9)
    assert place.remaining == 1.5
    place.progress(-1)
    assert line.seconds == pytest.approx(1.0)
    place.leave()
    place.leave()
    assert len(line) == 1


def test_a_closed_line_keeps_those_who_are_in() -> None:
    line = Line(BOUND)
    place = line.join("a", 1.0)
    line.close()
    with pytest.raises(NotReady):
        line.join("a", 1.0)
    assert len(line) == 1
    place.leave()
    assert len(line) == 0


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_what_are_no_seconds(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be"):
        Line(BOUND).join("a", seconds)
    with pytest.raises(ValueError, match="bound_seconds must be"):
        Line(seconds)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 5), st.integers(1, 5)), min_size=1, max_size=40))
def test_while_clients_have_work_they_get_equal_shares(requests: list[tuple[str, float, int]]) -> None:
    """Serving the lowest order first, no client is ahead of another by more than a picture of each (SFQ's theorem 1)."""
    line = Line(1e6)
    waiting = defaultdict(list)
    for client, seconds, pictures in requests:
        place = line.join(client, seconds)
        waiting[client] += [(order, seconds / pictures) for order in place.orders(pictures)]
    largest = {client: max(seconds for _, seconds in queue) for client, queue in waiting.items()}
    served = dict.fromkeys(waiting, 0.0)
    while all(waiting.values()):
        client = min(waiting, key=lambda name: waiting[name][0])
        served[client] += waiting[client].pop(0)[1]
        for one in served:
            for other in served:
                assert served[one] - served[other] <= largest[one] + largest[other] + 1e-6


class Life(RuleBasedStateMachine):
    """Clients come, get on and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line(BOUND)
        self.places: list[Place] = []

    def held(self, client: str) -> float:
        return sum(place.remaining for place in self.places if place.client == client)

    @rule(client=st.sampled_from("abcdef"), seconds=st.floats(0.0, BOUND))
    def join(self, client: str, seconds: float) -> None:
        others = {place.client for place in self.places} - {client}
        before = self.line.seconds
        place, retry_after = None, 0
        try:
            place = self.line.join(client, seconds)
        except Overloaded as error:
            retry_after = error.retry_after
        if place is None:
            assert retry_after >= max(1, min(before, before + seconds - 2 * BOUND))
            assert before + seconds > BOUND - 1e-9
            assert self.places, "an empty line admits anybody"
            poor = self.held(client) < BOUND / 2 - 1e-9 and self.held(client) + seconds <= BOUND - 1e-9
            assert not (poor and len(others) == 1), "a single client keeps nobody out"
        else:
            mine = [each.order for each in self.places if each.client == client]
            assert all(order < place.order for order in mine), "one's own requests keep their order"
            self.places.append(place)

    @precondition(lambda self: self.places)
    @rule(data=st.data(), share=st.floats(0, 1))
    def progress(self, data: st.DataObject, share: float) -> None:
        place = data.draw(st.sampled_from(self.places))
        place.progress(place.remaining * share)

    @precondition(lambda self: self.places)
    @rule(data=st.data(), done=st.booleans())
    def leave(self, data: st.DataObject, done: bool) -> None:
        place = data.draw(st.sampled_from(self.places))
        if done:
            place.progress(0)
        place.leave()
        self.places.remove(place)

    @invariant()
    def is_bounded(self) -> None:
        total = self.line.seconds
        assert total == pytest.approx(sum(place.remaining for place in self.places))
        assert total <= 2 * BOUND + 1e-6


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=30)


def test_threads_may_come_and_go_at_once() -> None:
    line = Line(1.0)
    admitted = []

    def work(name: str) -> None:
        for _ in range(200):
            try:
                place = line.join(name, 0.3)
            except Overloaded:
                continue
            admitted.append(line.seconds)
            place.progress(0.1)
            place.leave()

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admitted
    assert max(admitted) <= 2.0 + 1e-6
    assert (len(line), line.seconds) == (0, 0)
