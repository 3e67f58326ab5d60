"""Trajectories against the samplers that they write down, and the independence of a batch's rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from weights.contracts import Diversity, StepSchedule
from weights.denoiser import Cond, Denoiser
from weights.diffusion.samplers import ImageNoise, ddim_step, few_step, initial_state, sample_ode, trailing_times
from weights.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow
from weights.trajectory import (
    CannotDraw,
    Trajectory,
    TrajectoryStep,
    advance,
    base_leg_evaluations,
    base_leg_times,
    base_trajectory,
    own_schedule,
    schedule_for,
    student_trajectory,
)

SHAPE = (2, 3, 3)
SCHEDULES: list[Schedule] = [
    DiscreteVP.from_betas(zero_terminal_snr=True),
    DiscreteVP.from_betas(),
    EDM(),
    RectifiedFlow(),
    TrigFlow(),
]


class Bent(Denoiser):
    """A network that is not linear, and sees the time."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.tanh(x_t + t.reshape(-1, 1, 1, 1)) - 0.1


def follow(trajectory: Trajectory, denoiser: Denoiser, noise: ImageNoise) -> Tensor:
    x = trajectory.first_state(noise())
    for _ in range(trajectory.skipped_draws):
        noise()
    for step in trajectory.steps:
        x0 = denoiser(x, torch.full((len(x),), step.t), {})
        x = advance(x, x0, [step] * len(x), noise() if step.fresh else None)
    return x


@st.composite
def own_schedules(draw: st.DrawFn) -> dict[int, StepSchedule]:
    """A student's, of one to three counts; some with conditioning times of their own."""
    found = {}
    for count in draw(st.sets(st.integers(1, 9), min_size=1, max_size=3)):
        times = draw(falling(count))
        told = [time / 2 for time in times] if draw(st.booleans()) else None
        sampler = draw(st.sampled_from(["consistency", "ddim"]))
        found[count] = StepSchedule(timesteps=times, conditioning=told, sampler=sampler, eta=draw(st.floats(0, 1)))
    return found


@settings(max_examples=100)
@given(schedules=own_schedules())
def test_any_count_up_to_the_largest_takes_times_of_the_next_larger(schedules: dict[int, StepSchedule]) -> None:
    most = max(schedules)
    for steps in range(1, most + 1):
        larger = schedules[min(count for count in schedules if count >= steps)]
        chosen = schedule_for(schedules, steps)
        assert len(chosen.timesteps) == steps
        assert chosen.timesteps[0] == larger.timesteps[0], "pure noise"
        known = dict(zip(larger.timesteps, larger.network_times, strict=True))
        assert chosen.network_times == [known[time] for time in chosen.timesteps]
        assert (chosen.sampler, chosen.eta) == (larger.sampler, larger.eta)
        if steps in schedules:
            assert chosen == schedules[steps]
    for steps in (0, most + 1):
        with pytest.raises(CannotDraw, match=f"1 to {most}, not {steps}"):
            schedule_for(schedules, steps)


@pytest.mark.parametrize(("of", "times"), [(4, [1.0, 0.5, 0.25]), (6, [1.0, 4 / 6, 2 / 6]), (8, [1.0, 5 / 8, 2 / 8])])
def test_three_steps_are_spread_evenly_and_late_rather_than_early(of: int, times: list[float]) -> None:
    own = {of: StepSchedule(timesteps=[1 - step / of for step in range(of)])}
    assert schedule_for(own, 3).timesteps == pytest.approx(times)


def falling(count: int) -> st.SearchStrategy[list[float]]:
    times = st.lists(st.floats(0.02, 0.98), min_size=count - 1, max_size=count - 1, unique=True)
    return times.map(lambda later: [1.0, *sorted(later, reverse=True)])


@pytest.mark.parametrize("diffusion", SCHEDULES, ids=lambda each: type(each).__name__)
@settings(max_examples=20)
@given(times=st.integers(1, 5).flatmap(falling), way=st.sampled_from([("consistency", 0), ("ddim", 0), ("ddim", 0.7)]))
def test_a_students_trajectory_is_its_sampler(diffusion: Schedule, times: list[float], way: tuple[str, float]) -> None:
    schedule = StepSchedule(timesteps=times, sampler=way[0], eta=way[1])  # type: ignore[arg-type]
    denoiser = Bent(diffusion)
    noise = ImageNoise([3, 4], SHAPE)
    expected = few_step(denoiser, initial_state(noise(), diffusion, times[0]), schedule, {}, noise)
    drawn = follow(student_trajectory(diffusion, schedule), denoiser, ImageNoise([3, 4], SHAPE))
    torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize("diffusion", SCHEDULES, ids=lambda each: type(each).__name__)
def test_a_bases_trajectory_is_ddim(diffusion: Schedule) -> None:
    denoiser, noise = Bent(diffusion), ImageNoise([3], SHAPE)
    expected = sample_ode(denoiser, initial_state(noise(), diffusion), trailing_times(7), {})
    trajectory = base_trajectory(diffusion, 7, 1.0)
    torch.testing.assert_close(follow(trajectory, denoiser, ImageNoise([3], SHAPE)), expected)
    assert not any(step.fresh for step in trajectory.steps)


def test_what_a_picture_costs_is_told_before_it_is_drawn() -> None:
    diffusion, four = SCHEDULES[0], StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])
    assert base_trajectory(diffusion, 5, 3.0).evaluations == 10
    assert base_trajectory(diffusion, 5, 3.0, tells_guidance=True).evaluations == 5
    assert student_trajectory(diffusion, four).evaluations == 4
    assert student_trajectory(diffusion, four, 2.0, diversity=Diversity(base_steps=2)).evaluations == 8
    guided = Diversity(base_steps=2, base_guidance=3.0)
    assert student_trajectory(diffusion, four, diversity=guided).evaluations == 2 * 2 + 3
    assert student_trajectory(diffusion, four, diversity=guided, skip_only=True).evaluations == 3


@pytest.mark.parametrize(
    ("diversity", "times", "scales"),
    [
        (Diversity(base_steps=2, unprompted=0.125), [1.0, 0.875, 0.5], [0.0, 1.0]),
        (Diversity(base_steps=3, base_guidance=3.0, unprompted=0.25), [1.0, 0.75, 0.625, 0.5], [0.0, 3.0, 3.0]),
        (Diversity(base_steps=2, base_guidance=0.0), [1.0, 0.75, 0.5], [0.0, 0.0]),
    ],
)
def test_the_bases_first_step_can_go_without_the_prompt(
    diversity: Diversity, times: list[float], scales: list[float]
) -> None:
    diffusion, two = SCHEDULES[0], StepSchedule(timesteps=[1.0, 0.5])
    assert base_leg_times(two, diversity) == pytest.approx(times)
    trajectory = student_trajectory(diffusion, two, diversity=diversity)
    *leg, own = trajectory.steps
    assert [step.t for step in leg] == pytest.approx(times[:-1])
    assert [step.guidance_scale for step in leg] == scales
    assert [step.leg for step in trajectory.steps] == ["base"] * len(scales) + ["student"]
    assert base_leg_evaluations(diversity) == trajectory.evaluations - own.evaluations


def test_a_leg_of_one_step_has_no_room_for_one_without_the_prompt() -> None:
    with pytest.raises(ValidationError, match=r"unprompted: 0\.5 needs base_steps of at least 2"):
        Diversity(base_steps=1, unprompted=0.5)


@pytest.mark.parametrize(("first", "fits"), [(0.24, True), (0.25, False), (0.6, False)])
def test_the_prompt_is_told_before_the_student_takes_over(first: float, fits: bool) -> None:
    four, diversity = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25]), Diversity(base_steps=2, unprompted=first)
    if fits:
        assert base_leg_times(four, diversity) == pytest.approx([1.0, 0.76, 0.75])
        return
    with pytest.raises(CannotDraw, match=r"4 step\(s\) the student takes over at 0\.75: set unprompted below 0\.25"):
        base_leg_times(four, diversity)


@pytest.mark.parametrize(
    ("first", "diversity", "times"),
    [
        (1.0, Diversity(), [1.0, 0.5]),
        (0.96, Diversity(), [0.96, 0.5]),
        (0.96, Diversity(start=1.0), [1.0, 0.5]),
        (1.0, Diversity(start=0.9, base_steps=2), [0.9, 0.7, 0.5]),
        (0.96, Diversity(base_steps=3, unprompted=0.06), [0.96, 0.9, 0.7, 0.5]),
    ],
)
def test_the_base_starts_where_the_student_would_unless_it_is_told_otherwise(
    first: float, diversity: Diversity, times: list[float]
) -> None:
    diffusion, two = SCHEDULES[0], StepSchedule(timesteps=[first, 0.5])
    assert base_leg_times(two, diversity) == pytest.approx(times)
    trajectory = student_trajectory(diffusion, two, diversity=diversity)
    assert [step.t for step in trajectory.steps] == pytest.approx(times)
    noise = torch.ones(1, 1)
    assert torch.equal(trajectory.first_state(noise), initial_state(noise, diffusion, times[0]))


TWO_TOLD = StepSchedule(timesteps=[1.0, 0.5], conditioning=[0.9, 0.5])


@pytest.mark.parametrize(
    ("schedule", "diversity", "times", "told"),
    [
        (StepSchedule(timesteps=[1.0]), Diversity(skip=0, until=0.6), [0.6], [0.6]),
        (StepSchedule(timesteps=[0.96, 0.48]), Diversity(skip=0, until=0.6), [0.6, 0.3], [0.6, 0.3]),
        (
            StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25]),
            Diversity(skip=1, until=0.6),
            [0.6, 0.4, 0.2],
            [0.6, 0.4, 0.2],
        ),
        (StepSchedule(timesteps=[0.96, 0.48]), Diversity(skip=0, start=1.0), [0.96, 0.48], [0.96, 0.48]),
        (TWO_TOLD, Diversity(skip=0, until=0.6), [0.6, 0.3], [0.6, 0.3]),
        (TWO_TOLD, Diversity(), [0.5], [0.5]),
        (TWO_TOLD, None, [1.0, 0.5], [0.9, 0.5]),
    ],
)
def test_the_student_takes_over_with_all_of_its_steps_or_some(
    schedule: StepSchedule, diversity: Diversity | None, times: list[float], told: list[float]
) -> None:
    own = own_schedule(schedule, diversity)
    assert own.timesteps == pytest.approx(times)
    assert own.network_times == pytest.approx(told)
    assert (own.sampler, own.eta) == (schedule.sampler, schedule.eta)


@settings(max_examples=20)
@given(times=st.integers(1, 5).flatmap(falling), until=st.floats(0.05, 0.9))
def test_the_student_goes_on_from_what_the_base_leaves(times: list[float], until: float) -> None:
    """With `until`, the base's DDIM step and the student's sampler from there on, in the two's own code."""
    diffusion, schedule = SCHEDULES[0], StepSchedule(timesteps=times)
    trajectory = student_trajectory(diffusion, schedule, diversity=Diversity(start=0.95, skip=0, until=until))
    assert [step.leg for step in trajectory.steps] == ["base"] + ["student"] * len(times)
    denoiser, noise = Bent(diffusion), ImageNoise([3], SHAPE)
    state = initial_state(noise(), diffusion, 0.95)
    t, s = torch.tensor([0.95]), torch.tensor([until])
    state = ddim_step(state, denoiser(state, t, {}), t, s, diffusion)
    scaled = StepSchedule(timesteps=[until * time / times[0] for time in times])
    expected = few_step(denoiser, state, scaled, {}, noise)
    torch.testing.assert_close(follow(trajectory, denoiser, ImageNoise([3], SHAPE)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0.4, 0.5])
def test_the_base_starts_before_the_student_takes_over(start: float) -> None:
    with pytest.raises(CannotDraw, match=rf"starts at t = {start:g}, but with 2 .* over at 0\.5: set start above 0\.5"):
        base_leg_times(StepSchedule(timesteps=[1.0, 0.5]), Diversity(start=start))


def step(keep: float, estimate: float, fresh: float) -> TrajectoryStep:
    return TrajectoryStep(
        leg="student", t=0.5, guidance_scale=1.0, tells_guidance=False, keep=keep, estimate=estimate, fresh=fresh
    )


@settings(max_examples=30)
@given(
    weights=st.lists(st.tuples(*[st.floats(-2, 2)] * 3), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
)
def test_a_row_is_the_same_bits_in_every_batch(weights: list[tuple[float, float, float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, x0, noise = torch.randn(3, len(weights), *SHAPE, generator=generator).unbind()
    steps = [step(*each) for each in weights]
    together = advance(x, x0, steps, noise)
    for row, own in enumerate(steps):
        alone = advance(x[row : row + 1], x0[row : row + 1], [own], noise[row : row + 1])
        assert torch.equal(alone[0], together[row])
        keep, estimate, fresh = weights[row]
        expected = keep * x[row].double() + estimate * x0[row].double() + fresh * noise[row].double()
        torch.testing.assert_close(alone[0], expected.float())


def test_noise_is_asked_for_where_it_is_needed() -> None:
    x = torch.zeros(1, *SHAPE)
    assert advance(x, x + 1, [step(0.5, 0.25, 0.0)]).eq(0.25).all()
    with pytest.raises(AssertionError):
        advance(x, x, [step(0.5, 0.25, 0.1)])
