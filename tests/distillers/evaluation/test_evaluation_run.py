"""The whole command on a tiny random pipeline and a tiny protocol: what it measures, writes, resumes and refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillers.evaluation import __main__ as command
from distillers.evaluation import models, record, report
from distillers.evaluation import protocol as protocol_
from distillers.evaluation.bars import Bar
from distillers.evaluation.cache import Batch
from distillers.evaluation.features import EfficientNetLite0, Extractor
from distillers.evaluation.measure import Distances, Quality, Real
from distillers.evaluation.metrics import Estimate
from distillers.evaluation.subjects import Model, Subject, can_hand_over, coarse_subjects, specific_subjects
from tests.helpers import student_manifest, tiny_pipeline
from weights.contracts import Diversity, Router, StepSchedule, StudentManifest
from weights.families import load
from weights.store import NotFound, Store
from weights.students import WrongBase, load_student, route_prompts

COMMITTED = protocol_.load()
SCHEDULES = {1: StepSchedule(timesteps=[1.0]), 4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])}


class Colours(Extractor):
    """Quick features under the bundled extractor's name: mean colours of a 4x4 grid."""

    name, size, mean, std = EfficientNetLite0.name, 16, (0.0,) * 3, (1.0,) * 3

    def embed(self, pictures: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(1)


def tiny_protocol() -> protocol_.Protocol:
    whole = COMMITTED
    held_out = whole.held_out[:128]
    drawn = {prompt.caption for prompt in held_out}
    return dataclasses.replace(
        whole,
        held_out=held_out,
        seeds=(0,),
        coarse=("food & drink, <noto>", "animals & nature, twemoji"),
        coarse_seeds=(0, 1),
        reference=whole.reference[:32],
        floor=whole.floor[:32],
        sheet=tuple(caption for caption in whole.sheet if caption in drawn)[:3],
        fit=64,
    )


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny-base")
    (folder / "fewstep.json").write_text(json.dumps({"default_steps": 3, "default_guidance": 2.0}))
    return folder


@pytest.fixture(scope="module")
def store(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one student, the base's weights scaled a little."""
    base = load("stable_diffusion", base_folder)
    student = base.copy()
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.mul_(1.05)
    work, root = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("store")
    student.save_network(work)
    Store(root).publish(manifest(base_folder), work)
    return root


def manifest(base_folder: Path, **changes: object) -> StudentManifest:
    return student_manifest(base_folder, **({"name": "tiny-student", "schedules": SCHEDULES} | changes))


@pytest.fixture
def quick_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "extractor", lambda name, device: Colours(device))
    monkeypatch.setattr(protocol_, "load", tiny_protocol)
    monkeypatch.setattr(Subject, "latency", lambda self, prompt: 1.5)


def run(store: Path, out: Path, *more: str) -> int:
    return command.main(
        [
            "tiny-student",
            "--store",
            str(store),
            "--out",
            str(out),
            "--device",
            "cpu",
            "--cache",
            str(out / "base"),
            *more,
        ]
    )


def test_the_command_measures_writes_and_resumes(
    store: Path,
    tmp_path: Path,
    quick_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(store, tmp_path / "out") == 0
    printed, told = capsys.readouterr()
    assert "tiny-base: captions and real images are the bundled emoji's" in told.replace("\n", " ")
    assert "PASS" in printed or "MISS" in printed
    assert "report.html" in printed.replace("\n", "")
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    titles = [row["subject"]["title"] for row in figures["quality"]]
    student = "tiny-student, "
    assert titles == [
        "tiny-base, 3 steps", "tiny-base, 1 step", "tiny-base, 2 steps", "tiny-base, 4 steps",
        student + "1 step", student + "4 steps", student + "4 steps, base first step",
    ]  # fmt: skip
    assert [row["evaluations"] for row in figures["quality"]] == [6, 2, 4, 8, 1, 4, 4]  # the base is guided
    assert [row["subject"]["leg"] for row in figures["diversity"]] == [
        "plain", "plain", "plain", "base first step", "first step skipped",
    ]  # fmt: skip
    assert [row["evaluations"] for row in figures["diversity"]] == [6, 4, 1, 4, 3]
    assert figures["quality"][0]["distances"]["efficientnet-lite0"]["frechet_distance_to_teacher"] < 1e-6
    assert len(figures["bars"]) == 2 + 4 + 2
    check_report(tmp_path / "out")

    calls: list[int] = []
    draw = Subject.draw

    def counted(self: Subject, prompts: list[str], seeds: list[int]) -> Batch:
        calls.append(len(prompts))
        return draw(self, prompts, seeds)

    monkeypatch.setattr(Subject, "draw", counted)
    before = Store(store).manifest("tiny-student")
    assert run(store, tmp_path / "out", "--record") == 0
    assert calls == [1] * 12  # every set is only tried
    again = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert again["quality"] == figures["quality"]
    recorded = Store(store).open("tiny-student").manifest
    assert recorded.metrics == before.metrics | record.figures(again, "tiny-student")
    assert recorded.model_copy(update={"metrics": before.metrics}) == before


def check_report(out: Path) -> None:
    """Self-contained and escaped, with every sheet beside it as a PNG."""
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;noto&gt;" not in page  # prompts are in the pictures, never in the text
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == len(list(out.glob("*.png"))) == 1 + 1 + 5 + 7
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_names_in_the_report_are_escaped(base_folder: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    bar = Bar(hostile, hostile, Estimate(1.0, (0.9, 1.1)), 1.0, at_most=True)
    base = Model(hostile, load("stable_diffusion", base_folder))
    results = dummy_results(base, [bar])
    page = report.html(results, [])
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


def dummy_results(base: Model, bars: list[Bar]) -> report.Results:
    one = Estimate(1.0, (0.9, 1.1))
    distances = Distances(kernel_distance=one, frechet_distance=1.0, precision=0.5, recall=0.5)
    real = Real(
        floor={"x": distances}, held_out={"x": distances}, held_out_pictures=2, r_precision=one, psnr=one, penalty=1.0
    )
    quality = Quality(
        subject=Subject(base, base, 1),
        distances={"x": distances},
        r_precision=one,
        evaluations=1,
        milliseconds=1.0,
        latency=1.0,
        shown=torch.zeros(0),
    )
    return report.Results(
        protocol=tiny_protocol(),
        quick=True,
        data="emoji",
        extractor="x",
        real=real,
        qualities=[quality],
        spreads=[],
        bars=bars,
        machine={"processor": "<b>"},
        finished="now",
    )


def test_bars_pass_and_miss_on_their_side_of_the_bound() -> None:
    low = Bar("m", "distance", Estimate(0.7, ()), 0.75, at_most=True)
    high = Bar("m", "ratio", Estimate(0.9, ()), 0.95, at_most=False)
    assert (low.passed, high.passed) == (True, False)
    assert low.margin == pytest.approx(0.05)
    assert high.margin == pytest.approx(-0.05)
    assert high.as_json()["relation"] == "at least"


def test_a_one_step_student_has_no_step_to_hand_over(base_folder: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    base = Model("base", pipeline)
    single = Model("single", pipeline, manifest(base_folder, schedules={1: SCHEDULES[1]}))
    assert [s.leg for s in specific_subjects(base, [single])] == ["plain"] * 5
    assert [s.title for s in coarse_subjects(base, [single])] == ["base, 3 steps", "single, 1 step"]
    odd = Model("odd", pipeline, manifest(base_folder, schedules={3: StepSchedule(timesteps=[1.0, 0.6, 0.3])}))
    assert odd.steps == [3]
    assert coarse_subjects(base, [odd])[2].slug == "odd-3-steps-base-first-step"
    several = Model("several", pipeline, manifest(base_folder, schedules=SCHEDULES))
    drawn = [(s.steps, s.leg) for s in coarse_subjects(base, [several])[1:]]
    assert drawn == [*((steps, "plain") for steps in (4, 1)), (4, "base first step"), (4, "first step skipped")]
    before = manifest(base_folder, schedules=SCHEDULES, diversity=Diversity(skip=0, until=0.75))
    led = Model("led", pipeline, before)
    drawn = [(s.steps, s.leg) for s in coarse_subjects(base, [led])[3:]]
    assert drawn == [(4, "base first step"), (1, "base first step"), (4, "first step skipped")]
    legs = [s.steps for s in specific_subjects(base, [led]) if s.leg == "base first step"]
    assert legs == [1, 4], "what it costs is measured wherever a request may ask for it"


def test_a_subject_draws_seeds_not_batches(base_folder: Path, store: Path) -> None:
    pipeline = load("stable_diffusion", base_folder)
    folder = Store(store).open("tiny-student")
    base = Model("base", pipeline)
    student = Model("tiny-student", load_student(folder, pipeline), folder.manifest)
    between = Subject(student, base, 3, "base first step")
    assert (between.key["schedule"]["timesteps"], can_hand_over(student, 3)) == ([1.0, 0.5, 0.25], True)
    for subject in [*coarse_subjects(base, [student]), between]:
        pair = subject.draw(["red apple", "dog"], [3, 4]).pictures
        alone = subject.draw(["dog"], [4]).pictures
        assert pair.dtype == torch.uint8
        assert float((pair[1:].float() - alone.float()).abs().mean()) < 0.5
    keys = [json.dumps(subject.key, sort_keys=True) for subject in coarse_subjects(base, [student])]
    assert len(set(keys)) == 5
    assert Subject(student, base, 4).latency("dog", repeats=2) > 0


def test_a_routed_student_is_measured_with_each_prompts_own_student(
    base_folder: Path, store: Path, tmp_path: Path
) -> None:
    routed_store = Store(tmp_path / "store")
    base = load("stable_diffusion", base_folder)
    prompts = ["red apple", "blue dog", "red apple apple"]
    router = Router(centroids=base.embed_prompts(prompts[:2]).tolist(), students=["a", "b"])
    own = Store(store).open("tiny-student")
    routed_store.publish(own.manifest.model_copy(update={"name": "a"}), own.path)
    (tmp_path / "b").mkdir()
    base.save_network(tmp_path / "b")
    routed_store.publish(own.manifest.model_copy(update={"name": "b"}), tmp_path / "b")
    (tmp_path / "none").mkdir()
    routed_store.publish(own.manifest.model_copy(update={"name": "routed", "router": router}), tmp_path / "none")

    teacher, (routed, first, second) = models.load_models(["routed", "a", "b"], tmp_path / "store")
    assert len({model.weights for model in (teacher, routed, first)}) == 3
    seeds = [1, 2, 3]
    together = Subject(routed, teacher, 4).draw(prompts, seeds)
    assert together.pictures.shape == (3, 3, 32, 32) and together.evaluations == 4
    drawn = {model.name: Subject(model, teacher, 4).draw(prompts, seeds).pictures for model in (first, second)}
    chosen = [drawn[router.students[part]][row] for row, part in enumerate(route_prompts(router, base, prompts))]
    assert len(set(route_prompts(router, base, prompts))) == 2
    assert float((together.pictures.float() - torch.stack(chosen).float()).abs().mean()) < 0.5


def test_names_choose_students_and_bases(base_folder: Path, store: Path, tmp_path: Path) -> None:
    base, students = models.load_models([str(base_folder)], store)
    assert (base.name, students) == ("tiny-base", [])
    base, students = models.load_models(["tiny-student"], store)
    assert (base.name, [s.name for s in students]) == ("tiny-base", ["tiny-student"])
    with pytest.raises(NotFound, match="no student is named 'nobody'"):
        models.load_models(["nobody"], store)
    other = tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(WrongBase, match="tiny-student"):
        models.load_models(["tiny-student", str(other)], store)
    with pytest.raises(ValueError, match="an evaluation has one base"):
        models.load_models([str(base_folder), str(other)], store)


def test_errors_are_one_line_and_status_2(
    store: Path, tmp_path: Path, quick_parts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["nobody", "--store", str(store), "--out", str(tmp_path)]) == 2
    assert "no student is named 'nobody'" in " ".join(capsys.readouterr().err.split())
    assert run(store, tmp_path, "--batch", "0") == 2
    assert "give at least 1" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        run(store, tmp_path, "--device", "mps")
    assert "'mps' is an Apple GPU, which cannot compute in float64" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert run(store, tmp_path) == 2
    assert "fewstep[metrics]" in capsys.readouterr().err
