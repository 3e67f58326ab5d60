"""Writes an evaluation's figures into the manifests of the students that it measured, and so into ``/v1/models``.

The keys are flat and begin with ``evaluation/``: what was measured with (``extractor``, ``protocol``, ``measured``),
then by number of steps, such as ``evaluation/4_steps/kernel_distance``, and the same of the teacher, since figures say
little without it. The other keys of ``metrics``, which training wrote, stay. An ``_interval`` is half of the 95% one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weights.contracts import StudentManifest
from weights.store import Forbidden, Store, StoreError

PREFIX = "evaluation/"
LEG = "base first step"


def check_recordable(store: Store, names: Sequence[str], quick: bool, data: Path | None) -> None:
    """Checks, before hours of measuring, that the figures can be recorded.

    Raises:
        ValueError: they would not be comparable with other students', or there is no student.
        StoreError: a student cannot be modified; see `Store.check_amendable`.
    """
    if quick:
        raise ValueError("--quick measures only a small sample: leave it out to use --record")
    if data is not None:
        raise ValueError(
            f"--data {data}: only figures of the protocol's own data are recorded, so that those of all students can be "
            "compared: leave out --data, or --record (the report holds the figures)"
        )
    if not names:
        raise ValueError("--record: no student is measured, and a base has no manifest: name a student")
    try:
        for name in names:
            store.check_amendable(name)
    except Forbidden as error:
        raise Forbidden(f"{error}; or name others, or leave out --record (the report holds the figures)") from error


def record(store: Store, students: Sequence[StudentManifest], results: Mapping[str, Any]) -> None:
    """Records each student's figures, one student after another, each atomically.

    Args:
        store: where the students were read.
        students: their manifests, as they were when they were measured.
        results: the evaluation, as in its ``metrics.json``.

    Raises:
        StoreError: a student was changed since it was measured, or cannot be written.
    """
    for manifest in students:
        if store.manifest(manifest.name) != manifest:
            raise StoreError(
                f"student {manifest.name!r} was changed while it was measured, so its figures are not recorded: evaluate it "
                "again, which takes only as long as what has changed"
            )
        kept = {key: value for key, value in manifest.metrics.items() if not key.startswith(PREFIX)}
        store.amend(manifest.model_copy(update={"metrics": kept | figures(results, manifest.name)}))


def figures(results: Mapping[str, Any], name: str) -> dict[str, float | int | str]:
    """The keys of one student, from an evaluation as in its ``metrics.json``.

    Raises:
        ValueError: the evaluation did not measure the student.
    """
    extractor = results["extractor"]
    found: dict[str, float | int | str] = {
        "extractor": extractor,
        "protocol": results["protocol"]["digest"],
        "measured": results["finished"],
    }
    teacher = results["quality"][0]["subject"]
    rows = [(row, _quality(row, extractor)) for row in results["quality"]]
    rows += [(row, _estimate("diversity", row["distance"])) for row in results["diversity"]]
    for row, measured in rows:
        subject = row["subject"]
        if subject == teacher:
            place = "teacher"
        elif subject["model"] == name:
            place = _place(subject)
        else:
            continue
        found |= {f"{place}/{key}": value for key, value in {**measured, "evaluations": row["evaluations"]}.items()}
    if all(key.startswith("teacher/") for key in found if "/" in key):
        models = sorted({row["subject"]["model"] for row, _ in rows})
        raise ValueError(f"student {name!r} was not measured: this evaluation is of {', '.join(models)}")
    return {PREFIX + key: value for key, value in found.items()}


def without_leg(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics without those that a new calibration of the base's first steps makes untrue."""
    return {key: value for key, value in metrics.items() if not (key.startswith(PREFIX) and _slug(LEG) in key)}


def _place(subject: Mapping[str, Any]) -> str:
    steps = f"{subject['steps']}_step" + ("s" if subject["steps"] != 1 else "")
    return steps if subject["leg"] == "plain" else f"{steps}_{_slug(subject['leg'])}"


def _slug(words: str) -> str:
    return words.replace(" ", "_")


def _quality(row: Mapping[str, Any], extractor: str) -> dict[str, float]:
    kernel = _estimate("kernel_distance", row["distances"][extractor]["kernel_distance"])
    return kernel | _estimate("r_precision", row["r_precision"])


def _estimate(name: str, found: Mapping[str, float | None]) -> dict[str, float]:
    """A figure and its interval to six decimals, or nothing if either is infinite (a single group of images)."""
    value, high = found["value"], found["high"]
    if value is None or high is None:
        return {}
    return {name: round(value, 6), f"{name}_interval": round(high - value, 6)}
