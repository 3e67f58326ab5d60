"""What calls cost: measured, kept current, and the batch and the predictions that come of it."""

import math
from collections.abc import Iterator
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.costs import ALIKE, ENOUGH, RECENT, CostProfile, Costs, Part

BATCHES = [1, 2, 4, 8, 16]
call_seconds = st.floats(1e-4, 10)
targets = st.one_of(st.just(math.inf), st.floats(1e-4, 10))


@st.composite
def profiles(draw: st.DrawFn) -> CostProfile:
    """Any measurement, falling ones too, with any calls observed since."""
    seconds = {1: draw(call_seconds)} | draw(st.dictionaries(st.integers(2, 40), call_seconds, max_size=5))
    offered = {1} | draw(st.sets(st.integers(2, 40), max_size=6))
    profile = CostProfile(seconds, offered, draw(targets))
    for batch, taken in draw(st.lists(st.tuples(st.sampled_from(sorted(offered)), call_seconds), max_size=20)):
        profile.observe(batch, taken)
    return profile


def linear(overhead: float = 0.02, per_row: float = 0.01, target: float = math.inf) -> CostProfile:
    return CostProfile({batch: overhead + per_row * batch for batch in BATCHES}, target=target)


@given(profiles(), st.integers(1, 60), st.integers(1, 60))
def test_a_bigger_batch_never_takes_less(profile: CostProfile, a: int, b: int) -> None:
    small, big = sorted((a, b))
    assert 0 < profile.seconds(small) <= profile.seconds(big) * (1 + 1e-12)


@given(profiles(), st.integers(1, 60))
def test_the_best_batch_keeps_its_promises(profile: CostProfile, ready: int) -> None:
    rows, batch = profile.best(ready)
    seconds = profile.seconds(batch)
    assert 1 <= rows <= min(ready, batch)
    assert batch in profile.batches
    assert batch == 1 or seconds <= profile.target
    rate = rows / seconds
    for other in profile.batches:
        taken = min(ready, other)
        if other == 1 or profile.seconds(other) <= profile.target:
            assert ALIKE * taken / profile.seconds(other) <= rate * (1 + 1e-8)
            assert other >= batch or taken < rows, "a needless padding"


@given(profiles(), st.integers(1, 30), st.integers(2, 4))
def test_rows_of_one_picture_stay_together(profile: CostProfile, pictures: int, unit: int) -> None:
    if profile.batches[-1] < unit:
        with pytest.raises(ValueError, match=f"no batch holds {unit} rows"):
            profile.best(pictures * unit, unit)
        return
    rows, batch = profile.best(pictures * unit, unit)
    assert rows % unit == 0
    assert unit <= rows <= batch
    assert batch == profile.fit(unit) or profile.seconds(batch) <= profile.target


@given(st.floats(0, 1), st.floats(1e-3, 1), st.integers(1, 16))
def test_few_are_taken_at_once_where_batches_pay(overhead: float, per_row: float, ready: int) -> None:
    profile = CostProfile({batch: overhead + per_row * batch for batch in range(1, 17)})
    assert profile.best(ready) == (ready, ready)


def test_of_batches_about_as_fast_the_one_with_most_rows_is_taken() -> None:
    assert CostProfile({1: 1.0, 2: 2.1, 4: 4.3}).best(4) == (4, 4)
    assert CostProfile({1: 1.0, 2: 2.1, 4: 4.6}).best(4) == (2, 2), (
        "four rows in 4.6 s are too slow beside one a second"
    )


def test_it_pads_only_where_that_is_faster() -> None:
    assert linear(overhead=1.0).best(5) == (5, 8)
    assert linear(overhead=0.001, per_row=1.0).best(5) == (4, 4), "the fifth row would cost three more"


def test_a_call_stays_within_the_target_where_it_can() -> None:
    assert linear(target=0.1).best(100) == (8, 8)
    assert linear(target=0.02).best(100) == (1, 1), "a picture is drawn however slow the machine"
    assert linear(target=0.02).best(100, unit=2) == (2, 2)


def test_between_and_beyond_what_was_measured() -> None:
    profile = CostProfile({1: 1.0, 4: 4.0, 8: 6.0}, batches=range(1, 17))
    assert profile.seconds(3) == pytest.approx(3)
    assert profile.seconds(6) == pytest.approx(5)
    assert profile.seconds(16) == pytest.approx(12)


def test_too_few_rows_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="1 row"):
        linear().best(1, unit=2)


@pytest.mark.parametrize("seconds", [{2: 1.0}, {1: 0.0}, {1: math.inf}, {1: 1.0, 2: math.nan}])
def test_what_is_no_measurement(seconds: dict[int, float]) -> None:
    with pytest.raises(ValueError, match=r"1 must be among both|must be above 0"):
        CostProfile(seconds)


def test_measuring_takes_medians_and_discards_the_first_call() -> None:
    now = 0.0
    cold = {1: 50.0, 4: 60.0}
    # The second of three calls is an outlier.
    later: dict[int, Iterator[float]] = {1: iter([1.0, 9.0, 2.0]), 4: iter([3.0, 70.0, 4.0])}
    calls: list[int] = []

    def call(batch: int) -> None:
        nonlocal now
        calls.append(batch)
        now += cold.pop(batch, 0.0) or next(later[batch])

    profile = CostProfile.measure(call, [1, 4], repeats=3, clock=lambda: now)
    assert profile.measured == {1: 2.0, 4: 4.0}
    assert calls == [1] * 4 + [4] * 4


def test_a_clock_that_stands_still_breaks_nothing() -> None:
    profile = CostProfile.measure(lambda _batch: None, [1, 2], repeats=1, clock=lambda: 0.0)
    profile.observe(2, 0.0)
    assert profile.best(2) == (2, 2)


@given(st.lists(st.tuples(st.sampled_from(BATCHES), st.floats(0.5, 2)), min_size=1, max_size=3 * RECENT))
def test_estimates_are_medians_of_the_last_calls(calls: list[tuple[int, float]]) -> None:
    profile = linear()
    for batch, ratio in calls:
        profile.observe(batch, ratio * profile.measured[batch])
    recent = ([(0, 1.0)] * ENOUGH + calls)[-RECENT:]
    common, expected = median(ratio for _, ratio in recent), 0.0
    for batch, measured in profile.measured.items():
        own = [ratio for each, ratio in recent if each == batch]
        expected = max(expected, measured * (median(own) if len(own) >= ENOUGH else common))
        assert profile.seconds(batch) == pytest.approx(expected)


def test_whoever_asks_estimates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop asks at every request, and the engine's thread observes."""
    profile = linear()
    for _ in range(2 * ENOUGH):
        profile.observe(4, 3 * profile.measured[4])
    monkeypatch.setattr(CostProfile, "_estimate", None)
    assert profile.seconds(4) == pytest.approx(3 * profile.measured[4])
    assert profile.seconds_per_row == pytest.approx(3 * profile.measured_per_row)
    assert profile.among([1, 4]).best(4) == (4, 4)


@given(st.lists(st.floats(1e-6, 1e6), max_size=(ENOUGH - 1) // 2), st.integers(0, ENOUGH))
def test_outliers_do_nothing(outliers: list[float], honest: int) -> None:
    profile = linear()
    for seconds in [profile.measured[4]] * honest + outliers:
        profile.observe(4, seconds)
    assert [profile.seconds(batch) for batch in BATCHES] == pytest.approx(list(profile.measured.values()))


def test_a_lasting_change_shows_in_all_batches_and_goes_again() -> None:
    profile = linear()
    for _ in range(2 * ENOUGH):
        profile.observe(4, 3 * profile.measured[4])
    assert [profile.seconds(batch) for batch in BATCHES] == pytest.approx([3 * s for s in profile.measured.values()])
    for _ in range(RECENT):
        profile.observe(2, profile.measured[2])
    assert [profile.seconds(batch) for batch in BATCHES] == pytest.approx(list(profile.measured.values()))


def test_one_batch_that_is_worse_than_measured_is_no_longer_chosen() -> None:
    profile = linear()
    assert profile.best(16) == (16, 16)
    for _ in range(ENOUGH):
        profile.observe(16, 10 * profile.measured[16])
    assert profile.best(16) == (8, 8)
    for _ in range(RECENT):
        profile.observe(8, profile.measured[8])
    assert profile.best(16) == (16, 16), "it is tried again once nobody remembers"


NETWORK = Part("network", "unet", (4, 16, 16))
DECODER = Part("decoder", "vae", (4, 16, 16))
TEXT = Part("text", "bert", (32,))


def test_a_request_is_predicted_at_full_batches() -> None:
    costs = Costs(BATCHES, target=0.1)
    for part, per_row in ((NETWORK, 0.01), (DECODER, 0.002), (TEXT, 0.001)):
        costs.put(part, {batch: per_row * (2 + batch) for batch in BATCHES})
    network, decoder, text = 0.01 * 10 / 8, 0.002 * 18 / 16, 0.001 * 18 / 16  # 16 rows of the network take too long
    work = [(NETWORK, 5 * 4), (DECODER, 5), (TEXT, 1)]
    assert costs.predict(work) == costs.least(work) == pytest.approx(20 * network + 5 * decoder + text)


def test_a_deterministic_request_is_predicted_row_by_row() -> None:
    costs = Costs(BATCHES, target=0.1)
    costs.put(NETWORK, {1: 0.02, 8: 0.04})
    for _ in range(64):
        costs.observe(NETWORK, 1, 0.03)
    assert costs.predict([(NETWORK, 20)], alone=True) == pytest.approx(20 * 0.03)
    assert costs.least([(NETWORK, 20)], alone=True) == pytest.approx(20 * 0.02), "refused requests measure nothing"


def test_a_part_that_was_never_measured() -> None:
    costs = Costs(BATCHES, target=1.0)
    assert costs.of(NETWORK).seconds(1) > 0, "even where nothing was"
    costs.put(NETWORK, {1: 0.1, 8: 0.4})
    costs.put(Part("network", "big unet", (4, 16, 16)), {1: 0.5, 8: 2.0})
    assert costs.of(NETWORK).seconds(8) == pytest.approx(0.4)
    larger = costs.of(Part("network", "unet", (4, 32, 32)))
    assert (larger.seconds(1), larger.seconds(8)) == pytest.approx((0.4, 1.6))
    assert costs.of(Part("network", "other", (4, 16, 16))).seconds(1) == pytest.approx(0.5), "rather too much"


def test_a_guess_learns_and_yields_to_a_measurement() -> None:
    costs = Costs(BATCHES, target=1.0)
    for _ in range(2 * ENOUGH):
        costs.observe(NETWORK, 1, 0.03)
    assert costs.of(NETWORK).seconds(1) == pytest.approx(0.03)
    costs.put(NETWORK, {1: 0.02})
    assert costs.of(NETWORK).seconds(1) == pytest.approx(0.02)
