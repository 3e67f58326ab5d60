"""Calibrating a student's diversity: what is tried, what is chosen within which limits, and what is written."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from distillers.evaluation import calibrate as command
from distillers.evaluation import protocol as protocol_
from distillers.evaluation.calibrate import Limits, Trial, calibrate
from distillers.evaluation.features import EfficientNetLite0
from distillers.evaluation.measure import Distances, Quality, Spread
from distillers.evaluation.metrics import Estimate
from distillers.evaluation.subjects import Model, Subject
from tests.distillers.evaluation.test_evaluation_run import Colours, base_folder, manifest, store, tiny_protocol
from weights.contracts import Diversity, StepSchedule
from weights.families import load
from weights.store import Store

__all__ = ["base_folder", "store"]  # fixtures

SCHEDULES = {
    1: StepSchedule(timesteps=[1.0]),
    2: StepSchedule(timesteps=[1.0, 0.5]),
    4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25]),
}
LIMITS = Limits(evaluations=1, alignment=0.05, distance=0.1)


@pytest.fixture
def quick_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "extractor", lambda name, device: Colours(device))
    monkeypatch.setattr(protocol_, "load", tiny_protocol)
    monkeypatch.setattr(Subject, "latency", lambda self, prompt: 1.5)


Key = tuple[float, ...]
"""Base steps and guidance; the time without the prompt where there is one; start (0: the own) and until, if one is set."""


def key_of(diversity: Diversity) -> Key:
    times: Key = (diversity.unprompted,) if diversity.unprompted else ()
    if diversity.start or diversity.until:
        times = (diversity.start or 0.0, diversity.until or 0.0)
    return (diversity.base_steps, diversity.base_guidance, *times)


class Scripted:
    """An evaluation whose figures are given by `key_of` the calibration (None for the student alone)."""

    def __init__(self, base: Model, gains: dict[Key, float], quality: dict[Key, Any]) -> None:
        self.base, self.gains, self.qualities = base, gains, quality
        self.drawn: list[tuple[int, Any]] = []

    def spread(self, subject: Subject) -> Spread:
        diversity = subject.diversity
        evaluations, gain = subject.steps, 1.0
        if diversity is not None:
            cost = 1 if diversity.base_guidance in (0, 1) else 2
            evaluations += diversity.base_steps * cost - diversity.skip
            gain = self.gains[key_of(diversity)]
        one = Estimate(10 * gain, (9 * gain, 11 * gain))
        return Spread(
            subject=subject, distance=one, vendi=one, evaluations=evaluations, milliseconds=1.0, shown=torch.zeros(0)
        )

    def quality(self, subject: Subject) -> Quality:
        diversity = subject.diversity
        key = None if diversity is None else key_of(diversity)
        self.drawn.append((subject.steps, key))
        alignment, distance = (1.0, 1.0) if key is None else self.qualities.get(key, (1.0, 1.0))
        distances = Distances(
            kernel_distance=Estimate(distance, (distance, distance)), frechet_distance=1.0, precision=1.0, recall=1.0
        )
        return Quality(
            subject=subject,
            distances={EfficientNetLite0.name: distances},
            r_precision=Estimate(alignment, (alignment, alignment)),
            evaluations=4,
            milliseconds=1.0,
            latency=1.0,
            shown=torch.zeros(0),
        )


GAINS: dict[Key, float] = {
    (1, 0.0): 1.3, (2, 0.0): 1.5, (4, 0.0): 1.9,
    (1, 1.0): 1.1, (2, 1.0): 1.2, (4, 1.0): 1.8,
    (1, 2.0): 1.05, (2, 2.0): 1.7, (4, 2.0): 0.9,
    (2, 1.0, 1 / 32): 1.01, (2, 1.0, 1 / 16): 1.02, (2, 1.0, 1 / 8): 1.03,
    (1, 1.0, 0.9, 0.0): 1.04, (2, 1.0, 0.9, 0.0): 1.06,
    (1, 1.0, 0.0, 0.75): 1.07, (1, 1.0, 0.0, 0.6): 1.08, (1, 1.0, 0.9, 0.75): 1.09, (1, 1.0, 0.9, 0.6): 1.12,
}  # fmt: skip
COST = {key: key[0] * (2 if key[1] == 2 else 1) - (0 if key[3:] and key[3] else 1) for key in GAINS}
"""Evaluations beyond the student's own: a guided step takes two, and the student is spared one unless it takes all."""
BEFORE = {key for key in GAINS if len(key) == 4 and key[3]}
"""Those that leave all of the steps to the student."""


@pytest.mark.parametrize(
    ("quality", "limits", "chosen"),
    [
        ({}, LIMITS, (2, 0.0)),
        ({(2, 0.0): (0.9, 1.0)}, LIMITS, (1, 0.0)),
        ({(2, 0.0): (0.96, 1.0)}, LIMITS, (2, 0.0)),
        ({(2, 0.0): (1.0, 1.2), (1, 0.0): (0.94, 1.0)}, LIMITS, (2, 1.0)),
        ({}, dataclasses.replace(LIMITS, evaluations=3), (4, 0.0)),
        ({}, dataclasses.replace(LIMITS, evaluations=0), (1, 0.0)),
        (dict.fromkeys(GAINS, (0.5, 1.0)), LIMITS, None),
        (dict.fromkeys([key for key in GAINS if len(key) == 2], (0.5, 1.0)), LIMITS, (1, 1.0, 0.9, 0.6)),
        (dict.fromkeys([key for key in GAINS if key not in BEFORE], (1.0, 1.2)), LIMITS, (1, 1.0, 0.9, 0.6)),
        (dict.fromkeys([key for key in GAINS if len(key) != 3], (0.5, 1.0)), LIMITS, (2, 1.0, 1 / 8)),
    ],
)
def test_the_most_diverse_within_the_limits_is_chosen(
    base_folder: Path, quality: dict[Key, Any], limits: Limits, chosen: Key | None
) -> None:
    pipeline = load("stable_diffusion", base_folder)
    base = Model("base", pipeline)
    student = Model("student", pipeline, manifest(base_folder, schedules=SCHEDULES))
    evaluation: Any = Scripted(base, GAINS, quality)
    result = calibrate(evaluation, student, limits)
    assert (None if result.chosen is None else key_of(result.chosen)) == chosen
    tried = {(trial.steps, key_of(trial.diversity)) for trial in result.trials}
    affordable = {key for key, cost in COST.items() if cost <= limits.evaluations}
    assert tried == {(steps, key) for key in affordable for steps in ((1, 2, 4) if key in BEFORE else (2, 4))}
    if chosen is not None:
        held = {steps for steps, key in evaluation.drawn if key == chosen}
        assert held == ({1, 2, 4} if chosen in BEFORE else {2, 4}), "it is held at every step count"


def test_a_limit_below_every_candidate_is_refused(base_folder: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    student = Model("student", pipeline, manifest(base_folder, schedules=SCHEDULES))
    evaluation: Any = Scripted(Model("base", pipeline), GAINS, {})
    with pytest.raises(ValueError, match=r"at most -1 more network evaluation\(s\) .* raise --extra-evaluations"):
        calibrate(evaluation, student, dataclasses.replace(LIMITS, evaluations=-1))


def test_candidates_are_compared_at_the_step_counts_that_all_have(base_folder: Path) -> None:
    """At one step only some are possible, and gains there are of another size."""
    pipeline = load("stable_diffusion", base_folder)
    student = Model("student", pipeline, manifest(base_folder, schedules=SCHEDULES))

    class Singular(Scripted):
        def spread(self, subject: Subject) -> Spread:
            made = super().spread(subject)
            if subject.steps > 1 or subject.diversity is None:
                return made
            return dataclasses.replace(made, distance=Estimate(1000, (900, 1100)))

    evaluation: Any = Singular(Model("base", pipeline), GAINS, {})
    chosen = calibrate(evaluation, student, LIMITS).chosen
    assert chosen is not None and key_of(chosen) == (2, 0.0)


def test_what_fails_at_one_step_count_is_not_measured_at_others(base_folder: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    student = Model("student", pipeline, manifest(base_folder, schedules=SCHEDULES))
    evaluation: Any = Scripted(Model("base", pipeline), GAINS, {(2, 0.0): (0.9, 1.0)})
    calibrate(evaluation, student, LIMITS)
    assert [key for _, key in evaluation.drawn].count((2, 0.0)) == 1


def test_the_student_alone_is_measured_once_at_each_step_count(base_folder: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    student = Model("student", pipeline, manifest(base_folder, schedules=SCHEDULES))
    evaluation: Any = Scripted(Model("base", pipeline), GAINS, {(2, 0.0): (0.9, 1.0), (1, 0.0): (0.9, 1.0)})
    assert calibrate(evaluation, student, LIMITS).chosen is not None
    assert sorted(steps for steps, key in evaluation.drawn if key is None) == [2, 4]


def test_nothing_is_chosen_where_nothing_is_gained(base_folder: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    student = Model("student", pipeline, manifest(base_folder, schedules=SCHEDULES))
    evaluation: Any = Scripted(Model("base", pipeline), dict.fromkeys(GAINS, 0.99), {})
    assert calibrate(evaluation, student, LIMITS).chosen is None


def test_no_candidate_goes_without_the_prompt_for_all_of_the_leg(base_folder: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    eight = StepSchedule(timesteps=[1 - index / 8 for index in range(8)])
    student = Model("student", pipeline, manifest(base_folder, schedules={8: eight}))
    evaluation: Any = Scripted(Model("base", pipeline), GAINS, {})
    unprompted = {trial.diversity.unprompted for trial in calibrate(evaluation, student, LIMITS).trials}
    assert unprompted == {0, 1 / 32, 1 / 16}, "the student takes over at 7/8"


def test_a_student_of_one_step_can_only_follow_the_base(base_folder: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    single = Model("single", pipeline, manifest(base_folder, schedules={1: SCHEDULES[1]}))
    evaluation: Any = Scripted(Model("base", pipeline), GAINS, {})
    result = calibrate(evaluation, single, LIMITS)
    assert {key_of(trial.diversity) for trial in result.trials} == BEFORE
    assert result.chosen == Diversity(start=0.9, skip=0, until=0.6)


def arguments(store: Path, cache: Path, *more: str) -> list[str]:
    return ["tiny-student", "--store", str(store), "--cache", str(cache), "--device", "cpu", *more]


def test_the_command_measures_and_writes_nothing_unasked(
    store: Path, tmp_path: Path, quick_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Store(store).manifest("tiny-student")
    loose = ("--tolerance", "1", "--distance-tolerance", "1e9", "--extra-evaluations", "8")
    status = command.main(arguments(store, tmp_path, *loose))
    assert Store(store).manifest("tiny-student") == before
    shown = capsys.readouterr().out
    assert (status == 0) == ("chosen: base_steps" in shown)
    assert (status == 1) == ("nothing is chosen" in shown)
    rows = [line for line in shown.splitlines() if line.startswith("│ 4")]
    assert len(rows) == 1 + len(GAINS), "the student alone, and every candidate"
    for base_steps in (1, 2, 4):
        assert f"{3 + base_steps} ({base_steps - 1:+d})" in shown
        assert f"{3 + 2 * base_steps} ({2 * base_steps - 1:+d})" in shown


def test_the_choice_goes_into_the_manifest(
    store: Path, tmp_path: Path, quick_parts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Store(store).open("tiny-student")
    choice = Diversity(base_steps=2, base_guidance=0.0)
    measured: list[Limits] = []

    def scripted(evaluation: Any, student: Model, limits: Limits) -> Any:
        measured.append(limits)
        return command.Calibration(trials=[], chosen=choice)

    monkeypatch.setattr(command, "calibrate", scripted)
    assert command.main(arguments(store, tmp_path, "--write", "--tolerance", "0.1")) == 0
    after = Store(store).open("tiny-student")
    assert measured == [Limits(evaluations=1, alignment=0.1, distance=0.1)]
    assert after.manifest == before.manifest.model_copy(update={"diversity": choice})
    assert before.path.is_dir(), "who reads the old version goes on reading it"
    assert "base_steps 2, base_guidance 0, skip 1, unprompted 0" in capsys.readouterr().out


def test_what_could_not_be_written_is_refused_before_it_is_measured(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it measured"))
    for given, says in [
        (["emoji-average", "--store", str(tmp_path), "--write"], "bundled with the code and read-only"),
        (["emoji-average", "--write"], "without --write the choice is printed"),
        (arguments(store, tmp_path, "--write", "--quick"), "--quick measures only a small sample"),
        (["nobody", "--store", str(store)], "no student is named 'nobody'"),
        (arguments(store, tmp_path, "--batch", "0"), "give at least 1"),
    ]:
        assert command.main(given) == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_a_base_is_no_student(base_folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(base_folder), "--store", str(store)]) == 2
    assert "is a base: name a student" in " ".join(capsys.readouterr().err.split())


def test_a_trial_compares_with_the_student_alone(base_folder: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    evaluation: Any = Scripted(Model("base", pipeline), GAINS, {(1, 0.0): (0.9, 1.05)})
    student = Model("student", pipeline, manifest(base_folder, schedules=SCHEDULES))
    choice = Diversity(base_steps=1, base_guidance=0.0)
    plain = Subject(student, evaluation.base, 4)
    own = Subject(student, evaluation.base, 4, "base first step", choice)
    assert own.key != Subject(student, evaluation.base, 4, "base first step").key, "the cache tells them apart"
    trial = Trial(
        steps=4,
        diversity=choice,
        spread=evaluation.spread(own),
        plain=evaluation.spread(plain),
        quality=evaluation.quality(own),
        plain_quality=evaluation.quality(plain),
    )
    assert trial.gain.value == pytest.approx(1.3)
    assert (trial.extra, trial.alignment, trial.distance) == (0, pytest.approx(0.9), pytest.approx(0.05))
    assert not trial.keeps_quality(LIMITS)
    assert trial.keeps_quality(dataclasses.replace(LIMITS, alignment=0.11))
    assert not trial.keeps_quality(dataclasses.replace(LIMITS, alignment=0.11, distance=0.04))
