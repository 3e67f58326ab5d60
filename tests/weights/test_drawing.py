"""Drawing with a base, a student, and the base's first step, seen through denoisers that record what they are asked."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from weights.contracts import Diversity, StepSchedule
from weights.denoiser import Cond, Denoiser
from weights.diffusion.samplers import ImageNoise
from weights.diffusion.schedules import EDM, DiscreteVP, Schedule
from weights.drawing import CannotDraw, draw, draw_base, guided
from weights.trajectory import base_leg_times, evaluations_per_call

SHAPE = (2, 3, 3)
FOUR = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])
VP = DiscreteVP.from_betas(zero_terminal_snr=True)


class Recorder(Denoiser):
    """Answers ``gain * x_t + value + push``; keeps times, states and conditions of every call."""

    def __init__(self, value: float = 0.3, gain: float = 0.0, schedule: Schedule = VP) -> None:
        super().__init__()
        self.value, self.gain, self.schedule = value, gain, schedule
        self.times: list[float] = []
        self.states: list[Tensor] = []
        self.rows: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.times.append(round(float(t[0]), 6))
        self.states.append(x_t)
        self.rows.append(len(x_t))
        return self.gain * x_t + self.value + cond["push"].reshape(-1, 1, 1, 1)


def model(**fields: Any) -> Any:
    return SimpleNamespace(denoiser=Recorder(**fields), latent_shape=lambda: SHAPE, step_noise=lambda noise: noise)


def cond(rows: int, push: float = 0.0) -> dict[str, Tensor]:
    return {"push": torch.full((rows,), push)}


def noises(seeds: list[int], draws: int) -> list[Tensor]:
    source = ImageNoise(seeds, SHAPE)
    return [source() for _ in range(draws)]


def noised(x0: float, eps: Tensor, t: float) -> Tensor:
    time = torch.tensor(t, dtype=torch.float64)
    return (VP.alpha(time) * x0 + VP.sigma(time) * eps.double()).float()


def test_a_student_draws_at_its_times_from_its_seeds() -> None:
    student = model()
    drawing = draw(student, cond(2), None, [3, 4], FOUR)
    assert student.denoiser.times == FOUR.timesteps
    assert drawing.evaluations == 4
    expected = noises([3, 4], 4)
    torch.testing.assert_close(student.denoiser.states[0], expected[0])
    for step in (1, 2, 3):
        torch.testing.assert_close(student.denoiser.states[step], noised(0.3, expected[step], FOUR.timesteps[step]))


@pytest.mark.parametrize("diversity", [None, Diversity(), Diversity(base_steps=2, base_guidance=3.0)])
def test_a_seed_draws_the_same_in_every_batch(diversity: Diversity | None) -> None:
    student, base = model(gain=0.5), model(gain=0.2, value=-0.1)
    together = draw(student, cond(3), cond(1), [7, 8, 9], FOUR, base=base, diversity=diversity)
    alone = draw(student, cond(1), cond(1), [8], FOUR, base=base, diversity=diversity)
    assert torch.equal(together.latents[1], alone.latents[0])
    assert not torch.equal(together.latents[0], together.latents[1])


def test_guidance_doubles_the_batch_and_the_count() -> None:
    student = model()
    drawing = draw(student, cond(1, push=1.0), cond(1), [0], FOUR, guidance_scale=3.0)
    assert (drawing.evaluations, student.denoiser.rows) == (8, [2, 2, 2, 2])
    torch.testing.assert_close(drawing.latents, torch.full((1, *SHAPE), 0.3 + 3.0))


@pytest.mark.parametrize(("scale", "count"), [(0.0, 1), (0.5, 2), (1.0, 1), (7.5, 2)])
def test_what_is_counted_is_what_is_run(scale: float, count: int) -> None:
    recorder = Recorder()
    denoiser = guided(recorder, cond(1), scale)
    denoiser(torch.zeros(2, *SHAPE), torch.ones(2), cond(2))
    assert evaluations_per_call(scale) == count == sum(recorder.rows) // 2


def test_the_base_takes_the_first_step_and_the_student_the_rest() -> None:
    student, base = model(), model(value=-0.5)
    drawing = draw(student, cond(1), None, [3], FOUR, base=base, diversity=Diversity())
    assert (base.denoiser.times, student.denoiser.times) == ([1.0], [0.75, 0.5, 0.25])
    assert drawing.evaluations == 4
    eps, _, second, third = noises([3], 4)
    torch.testing.assert_close(base.denoiser.states[0], eps)
    # DDIM keeps the eps of the start: what the student takes over is the base's x_0 under the very same noise.
    torch.testing.assert_close(student.denoiser.states[0], noised(-0.5, eps, 0.75))
    # Its later steps get the noise that they get without diversity.
    torch.testing.assert_close(student.denoiser.states[1], noised(0.3, second, 0.5))
    torch.testing.assert_close(student.denoiser.states[2], noised(0.3, third, 0.25))


def test_several_guided_base_steps() -> None:
    student, base = model(), model()
    diversity = Diversity(base_steps=2, base_guidance=4.0, skip=2)
    drawing = draw(student, cond(1), cond(1), [3], FOUR, base=base, diversity=diversity)
    assert (base.denoiser.times, student.denoiser.times) == ([1.0, 0.75], [0.5, 0.25])
    assert drawing.evaluations == 2 * 2 + 2


def test_merely_skipping_runs_no_base() -> None:
    student, base = model(), model()
    drawing = draw(student, cond(1), None, [3], FOUR, base=base, diversity=Diversity(), skip_only=True)
    assert (base.denoiser.times, student.denoiser.times, drawing.evaluations) == ([], [0.75, 0.5, 0.25], 3)
    torch.testing.assert_close(student.denoiser.states[0], noises([3], 1)[0])


def test_deterministic_students_draw_no_noise_after_the_first() -> None:
    student, base = model(gain=0.5), model(value=-0.5)
    schedule = StepSchedule(timesteps=[1.0, 0.5], sampler="ddim")
    draw(student, cond(1), None, [3], schedule, base=base, diversity=Diversity())
    torch.testing.assert_close(student.denoiser.states[0], noised(-0.5, noises([3], 1)[0], 0.5))


def test_the_base_draws_at_trailing_times() -> None:
    base = model()
    drawing = draw_base(base, cond(2, push=1.0), cond(1), [1, 2], 5, 2.0)
    assert base.denoiser.times == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert drawing.evaluations == 10
    torch.testing.assert_close(drawing.latents, torch.full((2, *SHAPE), 2.3))


def test_the_start_is_scaled_where_variance_explodes() -> None:
    base = model(schedule=EDM(sigma_max=80.0))
    draw_base(base, cond(1), None, [1], 2, 1.0)
    torch.testing.assert_close(base.denoiser.states[0], noises([1], 1)[0] * (80.0**2 + 1) ** 0.5)


def test_steps_are_reported_in_order() -> None:
    student, base = model(), model(value=-0.5)
    seen: list[tuple[int, float]] = []

    def on_step(step: int, x0: Tensor) -> None:
        seen.append((step, round(float(x0.mean()), 4)))

    draw(student, cond(1), None, [3], FOUR, on_step=on_step)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    seen.clear()
    diversity = Diversity(base_steps=2, skip=1)
    draw(student, cond(1), None, [3], FOUR, base=base, diversity=diversity, on_step=on_step)
    assert seen == [(0, -0.5), (1, -0.5), (2, 0.3), (3, 0.3), (4, 0.3)]
    seen.clear()
    draw(student, cond(1), None, [3], FOUR, diversity=diversity, skip_only=True, on_step=on_step)
    assert [step for step, _ in seen] == [0, 1, 2]


def test_the_base_leg_falls_evenly() -> None:
    times = base_leg_times(StepSchedule(timesteps=[1.0, 0.4]), Diversity(base_steps=3))
    assert times == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_what_cannot_be_drawn() -> None:
    one = StepSchedule(timesteps=[1.0])
    with pytest.raises(CannotDraw, match=r"first 1 of 1 step.*use at least 2 steps"):
        draw(model(), cond(1), None, [0], one, base=model(), diversity=Diversity())
    with pytest.raises(CannotDraw, match="at least 4 steps"):
        base_leg_times(StepSchedule(timesteps=[1.0, 0.5, 0.2]), Diversity(skip=3))
    with pytest.raises(CannotDraw, match="no base was given"):
        draw(model(), cond(1), None, [0], FOUR, diversity=Diversity())
    with pytest.raises(CannotDraw, match="needs an unconditional condition"):
        draw(model(), cond(1), None, [0], FOUR, guidance_scale=2.0)
