"""DMD2: its settings, its cadence, where its gradients go, what it costs, and that it finds the teacher's distribution."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import distillers.methods.dmd2 as module
import distillers.methods.few_step as few_step
import distillers.methods.score_distillation as family
from distillers import pairs
from distillers.methods.base import Setup, Step, Turn, TurnLoss, Workspace
from distillers.methods.dmd2 import DMD2, DMD2Config
from distillers.seeds import generator_of, seed_of
from tests.distillers.mixtures import distances, fitted, mixture_setup, step_of, trainer_of
from weights.contracts import StepSchedule
from weights.denoiser import Cond, Denoiser

B = 6
STUDENT = Turn(name="student", trains=("student",))
CRITIC = Turn(name="critic", trains=("fake_score", "heads"))
ONE = {1: StepSchedule(timesteps=[1.0])}
FOUR = {4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])}


class Counting(Denoiser):
    """Counts the rows that a denoiser evaluates, and remembers the times."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner, self.schedule = inner, inner.schedule
        self.rows: Counter[str] = Counter()
        self.times: list[Tensor] = []

    def _seen(self, kind: str, t: Tensor) -> None:
        self.rows[kind] += len(t)
        self.times.append(t)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self._seen("full" if torch.is_grad_enabled() else "full without graph", t)
        return self.inner(x_t, t, cond)

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        self._seen("with features", t)
        return self.inner.with_features(x_t, t, cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        self._seen("features", t)
        return self.inner.features(x_t, t, cond)


class Counted:
    """A method whose three networks count."""

    def __init__(self, setup: Setup | None = None, **config: Any) -> None:
        self.setup = setup or mixture_setup()
        self.method = DMD2(DMD2Config(**config), self.setup)
        self.student = self.method.student.denoiser = Counting(self.method.student.denoiser)
        self.fake_score = Counting(self.method.fake_score)
        self.teacher = Counting(self.method.teacher)
        if self.method.heads is not None:
            self.method.critic = self.fake_score if self.method.critic is self.method.fake_score else self.teacher
        self.method.fake_score, self.method.teacher = self.fake_score, self.teacher

    def step(self, iteration: int = 0, scratch: dict[str, Any] | None = None, name: str = "") -> Step:
        return step_of(self.setup, B, iteration, name, scratch)

    def take(self, turn: Turn, step: Step | None = None) -> TurnLoss:
        return self.method.loss(turn, step or self.step(name=turn.name))

    @property
    def seen(self) -> dict[str, dict[str, int]]:
        parts = {"student": self.student, "fake_score": self.fake_score, "teacher": self.teacher}
        return {name: dict(part.rows) for name, part in parts.items() if part.rows}


def teacher_with_features() -> Setup:
    setup = mixture_setup()
    start = fitted("line", setup.base.denoiser.schedule, "v")
    teacher = start.with_network(copy.deepcopy(start.network))
    teacher.network.requires_grad_(False)
    return replace(setup, base=teacher)


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dm_times", (0.5, 0.2)),
        ("score_times", (0.0, 1.0)),
        ("guidance_interval", (-0.1, 1.0)),
        ("student_betas", (0.0, 1.0)),
        ("step_weights", {3: 1.0}),
        ("step_weights", {1: 0.0}),
        ("student_every", 0),
        ("gan_features", "student"),
        ("score_weighting", "noise"),
        ("guidance", 2.0),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        DMD2Config.model_validate({field: value})
    assert field in str(error.value)


def test_a_schedule_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValidationError, match="2 has 1 timesteps"):
        DMD2Config(schedules={2: StepSchedule(timesteps=[1.0])})


def test_regression_wants_a_one_step_schedule() -> None:
    with pytest.raises(ValidationError, match="regression_iterations"):
        DMD2Config(schedules=FOUR, regression_iterations=10)


def test_the_config_survives_json() -> None:
    config = DMD2Config(schedules=FOUR, step_weights={4: 2.0}, guidance_interval=(0.1, 0.9))
    assert DMD2Config.model_validate_json(config.model_dump_json()) == config


def test_pictures_are_needed_for_the_gan_and_without_backward_simulation() -> None:
    assert DMD2.needs_pictures(DMD2Config()) is not None
    assert DMD2.needs_pictures(DMD2Config(gan_weight=0.0)) is None
    assert DMD2.needs_pictures(DMD2Config(gan_weight=0.0, backward_simulation=False)) is not None
    assert DMD2.needs_pictures(DMD2Config(gan_weight=0.0, backward_simulation=False, schedules=ONE)) is None


# Cadence and optimizers


def test_two_time_scales() -> None:
    method = DMD2(DMD2Config(student_every=3), mixture_setup())
    names = [[turn.name for turn in method.turns(iteration)] for iteration in range(6)]
    assert names == [["critic"], ["critic"], ["student", "critic"]] * 2
    assert method.turns(0)[0].trains == ("fake_score", "heads")


def test_without_a_gan_there_is_no_head() -> None:
    method = DMD2(DMD2Config(gan_weight=0.0), mixture_setup())
    assert set(method.trained()) == {"student", "fake_score"}
    assert method.turns(0)[0].trains == ("fake_score",)


def test_regression_comes_first_with_its_own_learning_rate() -> None:
    method = DMD2(DMD2Config(regression_iterations=2, regression_lr=3e-5, student_every=2), mixture_setup())
    assert method.turns(1) == [Turn(name="regression", trains=("student",), lr=3e-5)]
    assert [turn.name for turn in method.turns(2)] == ["critic"]
    assert [turn.name for turn in method.turns(3)] == ["student", "critic"]


def test_after_the_regression_the_student_has_a_new_optimizer_and_a_rising_rate(tmp_path: Path) -> None:
    config = DMD2Config(
        regression_iterations=3, regression_pairs=8, regression_steps=1, regression_lr=1e-3, student_lr=1e-4,
        student_every=1, warmup=2, gan_weight=0.0,
    )  # fmt: skip
    setup = mixture_setup()
    method = DMD2(config, setup)
    method.prepare(workspace(tmp_path))
    trainer = trainer_of(method, setup, tmp_path / "run", batch_size=4)
    rates, updates = [], []
    for iteration in range(6):
        trainer.iteration = iteration
        trainer._iterate()
        optimizer = trainer.networks["student"].optimizer
        rates.append(optimizer.param_groups[0]["lr"])
        updates.append({int(state["step"]) for state in optimizer.state.values()})
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-5, 1e-4, 1e-4])
    assert updates == [{1}, {2}, {3}, {1}, {2}, {3}]
    fake = trainer.networks["fake_score"]
    assert fake.optimizer.param_groups[0]["lr"] == config.fake_score_lr and fake.updates == 3


def test_every_network_has_its_own_optimizer_settings() -> None:
    config = DMD2Config(
        student_lr=1e-6,
        fake_score_lr=2e-6,
        student_betas=(0.0, 0.9),
        critic_betas=(0.5, 0.8),
        weight_decay=0.2,
        warmup=7,
    )
    trained = DMD2(config, mixture_setup()).trained()
    assert {name: (each.optimizer.lr, each.optimizer.betas) for name, each in trained.items()} == {
        "student": (1e-6, (0.0, 0.9)),
        "fake_score": (2e-6, (0.5, 0.8)),
        "heads": (2e-6, (0.5, 0.8)),
    }
    assert {(each.optimizer.weight_decay, each.optimizer.warmup) for each in trained.values()} == {(0.2, 7)}
    assert [name for name, each in trained.items() if each.average] == ["student"]
    other = DMD2(DMD2Config(head_lr=5e-4, optimizer="muon"), mixture_setup()).trained()
    assert other["heads"].optimizer.lr == 5e-4
    assert {each.optimizer.kind for each in other.values()} == {"muon"}
    assert {each.optimizer.kind for each in trained.values()} == {"adamw"}


@pytest.mark.parametrize("adapters", [False, True])
def test_the_fake_score_takes_adapters_only_where_asked(adapters: bool) -> None:
    setup, asked = mixture_setup(), []

    def new_network(flag: bool) -> Any:
        asked.append(flag)
        return setup.new_network(flag)

    DMD2(DMD2Config(fake_score_lora=adapters), replace(setup, new_network=new_network))
    assert asked == [adapters]


def test_the_manifest_gets_schedules_and_guidance() -> None:
    method = DMD2(DMD2Config(schedules=FOUR, guidance_scale=3.0), mixture_setup())
    assert method.schedules() == FOUR
    assert (method.guidance().trained_scale, method.guidance().default_scale) == (3.0, 1.0)


# Gradients


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
@pytest.mark.parametrize("share_times", [False, True])
def test_a_loss_touches_only_its_turns_networks(features: Any, share_times: bool, tmp_path: Path) -> None:
    setup = teacher_with_features()
    config = DMD2Config(gan_features=features, share_times=share_times, schedules=FOUR, r1_weight=1.0)
    method = DMD2(config, setup)
    trainer = trainer_of(method, setup, tmp_path, batch_size=B)
    counted = Counted(setup)
    for turn in (STUDENT, CRITIC):
        trainer._only(turn)
        method.loss(turn, counted.step(name=turn.name)).loss.backward()
        for name, network in trainer.networks.items():
            touched = {key: weight.grad is not None for key, weight in network.weights.items()}
            expected = name in turn.trains
            # A weight that no output depends on (an unused embedding) still has a gradient, of zeros.
            assert set(touched.values()) == {expected}, (turn.name, name, touched)
            for weight in network.weights.values():
                weight.grad = None
        assert all(weight.grad is None for weight in setup.base.network.parameters())


def test_the_critics_loss_never_reaches_the_student_even_unguarded() -> None:
    counted = Counted()
    counted.take(CRITIC).loss.backward()
    assert all(weight.grad is None for weight in counted.method.student.network.parameters())


def test_only_the_drawn_step_of_a_rollout_has_a_graph() -> None:
    counted = Counted(schedules=FOUR, gan_weight=0.0)
    for iteration in range(12):
        counted.student.rows.clear()
        counted.take(STUDENT, counted.step(iteration))
        assert counted.student.rows["full"] == B
        assert counted.student.rows["full without graph"] in (0, B, 2 * B, 3 * B)


# What each switch does, and what a turn costs

FULL, QUIET = "full", "full without graph"
COSTS: list[tuple[dict[str, Any], dict[str, dict[str, int]], dict[str, dict[str, int]]]] = [
    (
        {"gan_weight": 0.0, "guidance_scale": 1.0},
        {"student": {FULL: B}, "fake_score": {QUIET: B}, "teacher": {QUIET: B}},
        {"student": {QUIET: B}, "fake_score": {FULL: B}},
    ),
    (
        {"gan_weight": 0.0, "guidance_scale": 2.0},
        {"student": {FULL: B}, "fake_score": {QUIET: B}, "teacher": {QUIET: 2 * B}},
        {"student": {QUIET: B}, "fake_score": {FULL: B}},
    ),
    (
        {"guidance_scale": 2.0},
        {"student": {FULL: B}, "fake_score": {QUIET: B, "features": B}, "teacher": {QUIET: 2 * B}},
        {"student": {QUIET: B}, "fake_score": {FULL: B, "features": 2 * B}},
    ),
    (
        {"guidance_scale": 2.0, "share_times": True},
        {"student": {FULL: B}, "fake_score": {"with features": B}, "teacher": {QUIET: 2 * B}},
        {"student": {QUIET: B}, "fake_score": {"with features": B, "features": B}},
    ),
    (
        {"guidance_scale": 2.0, "share_times": True, "r1_weight": 1.0},
        {"student": {FULL: B}, "fake_score": {"with features": B}, "teacher": {QUIET: 2 * B}},
        {"student": {QUIET: B}, "fake_score": {"with features": B, "features": 2 * B}},
    ),
]


@pytest.mark.parametrize(("config", "student", "critic"), COSTS)
def test_a_turn_evaluates_no_more_than_it_needs(config: dict[str, Any], student: Any, critic: Any) -> None:
    for turn, expected in ((STUDENT, student), (CRITIC, critic)):
        counted = Counted(schedules=ONE, **config)
        counted.take(turn)
        assert counted.seen == expected, turn.name


def test_the_discriminator_can_read_the_teacher() -> None:
    counted = Counted(teacher_with_features(), schedules=ONE, gan_features="teacher", guidance_scale=1.0)
    counted.take(CRITIC)
    assert counted.seen["teacher"] == {"features": 2 * B}
    assert counted.seen["fake_score"] == {"full": B}


def test_a_teacher_without_features_cannot_carry_the_head() -> None:
    with pytest.raises(TypeError, match="no inner features"):
        DMD2(DMD2Config(gan_features="teacher"), mixture_setup())


@pytest.mark.parametrize(("share", "rows"), [(True, 0), (False, B)])
def test_samples_of_the_students_turn_are_used_again(share: bool, rows: int) -> None:
    counted, scratch = Counted(schedules=ONE, share_samples=share), {}
    counted.take(STUDENT, counted.step(scratch=scratch, name="student"))
    counted.student.rows.clear()
    counted.take(CRITIC, counted.step(scratch=scratch, name="critic"))
    assert counted.student.rows[QUIET] == rows


def test_guidance_inside_an_interval_costs_only_its_rows() -> None:
    everywhere, nowhere, some = (
        Counted(schedules=ONE, gan_weight=0.0, guidance_scale=2.0, guidance_interval=interval)
        for interval in ((0.0, 1.0), (0.0, 0.0), (0.3, 0.7))
    )
    for counted in (everywhere, nowhere, some):
        counted.take(STUDENT)
    inside = int(((some.fake_score.times[0] >= 0.3) & (some.fake_score.times[0] <= 0.7)).sum())
    assert 0 < inside < B
    assert [c.teacher.rows[QUIET] for c in (everywhere, nowhere, some)] == [2 * B, B, B + inside]


def test_a_student_is_told_its_conditioning_time() -> None:
    schedule = {1: StepSchedule(timesteps=[1.0], conditioning=[0.4])}
    counted = Counted(schedules=schedule)
    counted.take(STUDENT)
    assert counted.student.times[0].tolist() == pytest.approx([0.4] * B)


@pytest.mark.parametrize("simulated", [True, False])
def test_backward_simulation_decides_what_a_step_is_trained_on(
    simulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: Counter[str] = Counter()
    for name in ("simulate", "noised_real"):
        original = getattr(few_step, name)

        def spy(*args: Any, _original: Callable[..., Tensor] = original, _name: str = name) -> Tensor:
            called[_name] += 1
            return _original(*args)

        monkeypatch.setattr(few_step, name, spy)
    counted = Counted(schedules=FOUR, backward_simulation=simulated)
    counted.take(STUDENT)
    counted.take(CRITIC)
    assert dict(called) == {"simulate" if simulated else "noised_real": 2}


def test_step_weights_choose_the_step_count() -> None:
    counted = Counted(step_weights={1: 0.0, 2: 1.0, 4: 0.0}, gan_weight=0.0)
    for iteration in range(10):
        counted.take(STUDENT, counted.step(iteration))
    trained = {float(times[0]) for times in counted.student.times}
    assert trained == {1.0, 0.5}


def test_times_stay_in_their_intervals() -> None:
    narrow = {"dm_times": (0.4, 0.5), "score_times": (0.6, 0.7), "gan_times": (0.8, 0.9)}
    counted = Counted(schedules=ONE, **narrow)
    counted.take(STUDENT)
    matching, adversarial = counted.fake_score.times
    counted.fake_score.times.clear()
    counted.take(CRITIC)
    score, fake, real = counted.fake_score.times
    for times, (low, high) in [
        (matching, (0.4, 0.5)), (score, (0.6, 0.7)), (adversarial, (0.8, 0.9)), (fake, (0.8, 0.9)), (real, (0.8, 0.9)),
    ]:  # fmt: skip
        assert low - 1e-6 <= float(times.min()) and float(times.max()) <= high + 1e-6


@pytest.mark.parametrize(
    ("turn", "base", "changed"),
    [
        (STUDENT, {"dm_weight": 1.0}, {"dm_weight": 2.0}),
        (STUDENT, {"gan_weight": 1e-3}, {"gan_weight": 1.0}),
        (CRITIC, {"discriminator_weight": 1e-2}, {"discriminator_weight": 1.0}),
        (CRITIC, {"r1_weight": 1.0}, {"r1_weight": 1000.0}),
        (CRITIC, {"r1_weight": 1.0, "r1_noise": 0.1}, {"r1_weight": 1.0, "r1_noise": 3.0}),
        (CRITIC, {"score_weighting": "eps"}, {"score_weighting": "v"}),
        (CRITIC, {"score_weighting": "edm"}, {"score_weighting": "edm", "sigma_data": 5.0}),
        (STUDENT, {"guidance_scale": 1.0}, {"guidance_scale": 3.0}),
    ],
)
def test_a_number_changes_the_loss(turn: Turn, base: dict[str, Any], changed: dict[str, Any]) -> None:
    losses = []
    for config in (base, changed):
        torch.manual_seed(0)  # the heads' weights
        setup = mixture_setup("ring")
        counted = Counted(setup, **config)
        step = counted.step(name=turn.name)
        cond = {"label": torch.zeros(B, dtype=torch.int64)}  # a class, which guidance can tell from none
        step = replace(step, batch=replace(step.batch, cond=cond, real_cond=cond))
        losses.append(float(counted.take(turn, step).loss.detach()))
    assert abs(losses[0] - losses[1]) > 1e-6 * abs(losses[0])


# The regression stage


def workspace(folder: Path, tick: Callable[[str, int, int], None] = lambda *_: None) -> Workspace:
    folder.mkdir(exist_ok=True)
    return Workspace(
        folder=folder,
        prompts=2,
        conditions=lambda rows: {"label": rows},
        seed=lambda *parts: seed_of(0, *parts),
        tick=tick,
    )


def test_pairs_are_the_teachers_and_made_once(tmp_path: Path) -> None:
    config = {"regression_iterations": 5, "regression_pairs": 100, "regression_steps": 8, "guidance_scale": 1.0}
    first = Counted(**config)
    method = first.method
    method.prepare(workspace(tmp_path))
    assert method.pairs is not None
    noise, pictures, cond = method.pairs.draw(64, generator_of("draw"))
    means = torch.where(cond["label"] == 0, -0.5, 1.0)
    assert (pictures.flatten() - means).abs().max() < 1.0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 2
    again = DMD2(method.config, first.setup)
    again.prepare(workspace(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert again.pairs is not None
    for left, right in zip(again.pairs.draw(64, generator_of("draw")), (noise, pictures, cond), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_pairs_are_those_of_a_teacher_guided_where_the_scores_are(tmp_path: Path) -> None:
    """In one step, from t = 1: beyond the interval, the teacher is not guided, as in the losses."""
    found = []
    for name, scale, interval in (("off", 1.0, None), ("below", 4.0, (0.0, 0.9)), ("all", 4.0, (0.0, 1.0))):
        config = DMD2Config(
            regression_iterations=1,
            regression_pairs=8,
            regression_steps=1,
            guidance_scale=scale,
            guidance_interval=interval,
        )
        method = DMD2(config, mixture_setup())
        method.prepare(workspace(tmp_path))
        assert method.pairs is not None, name
        found.append(method.pairs.draw(64, generator_of("draw"))[1])
    assert torch.equal(found[0], found[1])
    assert (found[2] - found[0]).abs().min() > 0.1


def test_large_pairs_are_drawn_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures(folder: str) -> torch.Tensor:
        method = DMD2(DMD2Config(regression_iterations=1, regression_pairs=70, regression_steps=2), mixture_setup())
        (tmp_path / folder).mkdir()
        method.prepare(workspace(tmp_path / folder))
        assert method.pairs is not None
        return method.pairs.draw(70, generator_of("draw"))[1]

    whole = pictures("whole")
    monkeypatch.setattr(pairs, "LATENTS_AT_ONCE", 5)
    rows: list[int] = []
    solve = pairs.sample_ode

    def counted(teacher: Denoiser, x_t: Tensor, *rest: Any) -> Tensor:
        rows.append(len(x_t))
        return solve(teacher, x_t, *rest)

    monkeypatch.setattr(pairs, "sample_ode", counted)
    assert torch.equal(pictures("parts"), whole)
    assert max(rows) == 5 and sum(rows) == 70


def test_making_pairs_can_be_stopped_and_goes_on(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_what: str, done: int, _total: int) -> None:
        if done:
            raise Stop

    method = DMD2(DMD2Config(regression_iterations=1, regression_pairs=130, regression_steps=4), mixture_setup())
    with pytest.raises(Stop):
        method.prepare(workspace(tmp_path, stop))
    assert len(list(tmp_path.iterdir())) == 1
    method.prepare(workspace(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_making_pairs_tells_how_far_it_is_from_before_the_first_and_nothing_of_those_that_are_there(
    tmp_path: Path,
) -> None:
    method = DMD2(DMD2Config(regression_iterations=1, regression_pairs=130, regression_steps=1), mixture_setup())
    for expected in ([0, 64, 128, 130], []):
        told: list[tuple[str, int, int]] = []
        method.prepare(workspace(tmp_path, lambda *tick, told=told: told.append(tick)))
        assert told == [("drawing teacher's pictures", done, 130) for done in expected]


@pytest.mark.parametrize("huber", [0.0, 0.03])
def test_regression_lowers_its_loss(huber: float, tmp_path: Path) -> None:
    config = DMD2Config(
        regression_iterations=60, regression_pairs=128, regression_steps=8, regression_lr=1e-3, warmup=0,
        guidance_scale=1.0, regression_huber=huber,
    )  # fmt: skip
    setup = mixture_setup()
    method = DMD2(config, setup)
    method.prepare(workspace(tmp_path))
    trainer = trainer_of(method, setup, tmp_path / "run", batch_size=64)
    losses = []
    for _ in range(60):
        trainer._iterate()
        losses.append(float(trainer._sums.pop("regression/loss")))
        trainer.iteration += 1
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


# Convergence

QUICK = {
    "guidance_scale": 1.0, "student_every": 4, "student_lr": 1e-3, "fake_score_lr": 2e-3, "student_betas": (0.0, 0.99),
    "critic_betas": (0.0, 0.99), "warmup": 10, "score_weighting": "v", "dm_times": (0.15, 0.98), "schedules": ONE,
}  # fmt: skip


def distance_after(iterations: int, folder: Path, **config: Any) -> float:
    torch.manual_seed(0)
    setup = mixture_setup("ring")
    method = DMD2(DMD2Config(**{**QUICK, "gan_weight": 0.0, **config}), setup)
    return distances(method, setup, folder, iterations, list(method.schedules().values()))[1]


@pytest.mark.parametrize(
    "config",
    [
        {"schedules": ONE},
        {"schedules": FOUR},
        {"schedules": ONE, "gan_weight": 0.1, "discriminator_weight": 0.1, "share_times": True},
    ],
    ids=["one step", "four steps", "with a GAN"],
)
def test_the_student_finds_the_teachers_distribution(config: dict[str, Any], tmp_path: Path) -> None:
    """A fitted network's own samples are 0.81 (one step) and 0.6 (four) away; so near means every mode, in its share."""
    assert distance_after(300, tmp_path, **config) < 0.3


def test_with_the_wrong_sign_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.distribution_matching_gradient
    monkeypatch.setattr(module, "distribution_matching_gradient", lambda *given: -right(*given))
    assert distance_after(100, tmp_path) > 0.8


def test_without_the_fake_score_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the teacher's score: the student climbs to the modes' tops, the spread is lost."""
    right = family.denoising_loss
    monkeypatch.setattr(family, "denoising_loss", lambda *given: 0.0 * right(*given))
    assert distance_after(300, tmp_path) > 0.3
