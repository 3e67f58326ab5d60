"""Recording an evaluation's figures in manifests: which keys, what they replace, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from distillers.evaluation import __main__ as command
from distillers.evaluation.record import figures, record, without_leg
from tests.distillers.evaluation.test_evaluation_run import base_folder, store
from weights.contracts import Diversity
from weights.store import Store, StoreError

__all__ = ["base_folder", "store"]  # fixtures


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.25, "high": value + 0.25}


def row(model: str, steps: int, leg: str, value: float) -> dict[str, Any]:
    subject = {"model": model, "steps": steps, "leg": leg, "weights": "x", "guidance_scale": 1.0}
    return {"subject": subject, "evaluations": steps}


def quality(model: str, steps: int, leg: str, value: float) -> dict[str, Any]:
    distances = {"lite": {"kernel_distance": estimate(value)}, "other": {"kernel_distance": estimate(99.0)}}
    return {**row(model, steps, leg, value), "distances": distances, "r_precision": estimate(value / 2)}


def spread(model: str, steps: int, leg: str, value: float) -> dict[str, Any]:
    return {**row(model, steps, leg, value), "distance": estimate(value)}


def results(student: str = "tiny-student", **changes: Any) -> dict[str, Any]:
    made = {
        "finished": "2026-11-28 01:23 UTC",
        "protocol": {"digest": "f00"},
        "extractor": "lite",
        "quality": [
            quality("base", 50, "plain", 1.0),
            quality("base", 4, "plain", 2.0),
            quality(student, 1, "plain", 3.0),
            quality(student, 4, "base first step", 4.0),
            quality("another", 4, "plain", 5.0),
        ],
        "diversity": [spread("base", 50, "plain", 20.0), spread(student, 4, "first step skipped", 21.0)],
    }
    return made | changes


EXPECTED = {
    "evaluation/extractor": "lite",
    "evaluation/protocol": "f00",
    "evaluation/measured": "2026-11-28 01:23 UTC",
    "evaluation/teacher/kernel_distance": 1.0,
    "evaluation/teacher/kernel_distance_interval": 0.25,
    "evaluation/teacher/r_precision": 0.5,
    "evaluation/teacher/r_precision_interval": 0.25,
    "evaluation/teacher/diversity": 20.0,
    "evaluation/teacher/diversity_interval": 0.25,
    "evaluation/teacher/evaluations": 50,
    "evaluation/1_step/kernel_distance": 3.0,
    "evaluation/1_step/kernel_distance_interval": 0.25,
    "evaluation/1_step/r_precision": 1.5,
    "evaluation/1_step/r_precision_interval": 0.25,
    "evaluation/1_step/evaluations": 1,
    "evaluation/4_steps_base_first_step/kernel_distance": 4.0,
    "evaluation/4_steps_base_first_step/kernel_distance_interval": 0.25,
    "evaluation/4_steps_base_first_step/r_precision": 2.0,
    "evaluation/4_steps_base_first_step/r_precision_interval": 0.25,
    "evaluation/4_steps_base_first_step/evaluations": 4,
    "evaluation/4_steps_first_step_skipped/diversity": 21.0,
    "evaluation/4_steps_first_step_skipped/diversity_interval": 0.25,
    "evaluation/4_steps_first_step_skipped/evaluations": 4,
}


def test_the_keys_are_flat_and_of_the_student_and_its_teacher() -> None:
    assert figures(results(), "tiny-student") == EXPECTED
    with pytest.raises(
        ValueError, match="'nobody' was not measured: this evaluation is of another, base, tiny-student"
    ):
        figures(results(), "nobody")


def test_an_infinite_interval_is_left_out() -> None:
    endless = quality("tiny-student", 4, "plain", 2.0)
    endless["r_precision"] |= {"high": None}
    found = figures(results(quality=[quality("base", 50, "plain", 1.0), endless]), "tiny-student")
    assert "evaluation/4_steps/kernel_distance" in found and "evaluation/4_steps/r_precision" not in found


def test_a_new_calibration_makes_only_the_leg_untrue() -> None:
    left = without_leg({"iterations": 3, **EXPECTED})
    assert set(EXPECTED) - set(left) == {key for key in EXPECTED if "4_steps_base_first_step" in key}
    assert left["iterations"] == 3


def test_what_was_recorded_before_is_replaced_and_what_training_wrote_stays(store: Path, tmp_path: Path) -> None:
    place, source = Store(tmp_path), Store(store).open("tiny-student")
    metrics = {"iterations": 7, "evaluation/2_steps/kernel_distance": 9.0}
    manifest = place.publish(source.manifest.model_copy(update={"metrics": metrics}), source.path)
    record(place, [manifest], results())
    recorded = place.open("tiny-student").manifest
    assert recorded == manifest.model_copy(update={"metrics": {"iterations": 7, **EXPECTED}})

    place.amend(recorded.model_copy(update={"diversity": Diversity(base_steps=2)}))
    with pytest.raises(StoreError, match="'tiny-student' was changed while it was measured"):
        record(place, [recorded], results())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["tiny-student", "--quick"], "--quick measures only a small sample: leave it out to use --record"),
        (
            ["tiny-student", "--data", "pictures"],
            "--data pictures: only figures of the protocol's own data are recorded",
        ),
        (["emoji-average"], "'emoji-average' is bundled with the code and read-only"),
        (["emoji-base"], "a base has no manifest: name a student"),
    ],
)
def test_what_could_not_be_recorded_is_refused_before_it_is_measured(
    given: list[str], says: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "evaluate", lambda *_: pytest.fail("it measured"))
    assert command.main([*given, "--store", str(store), "--out", str(tmp_path), "--record"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
