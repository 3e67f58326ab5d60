"""Jobs over parts: every student is what its part's job alone would make, and the whole is one job to whoever watches."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import distillers.__main__ as command
from distillers.checkpoint import load_checkpoint
from distillers.corpus import load_corpus
from distillers.events import Reporter, now
from distillers.job import STOPPED, JobRun
from distillers.merging import MergedEvents
from distillers.multi import MultiRun
from distillers.partition import FILE
from distillers.spec import BadSpec, check_spec, fingerprint
from distillers.trainer import Trainer
from tests.distillers.jobs import events, job_inputs, job_spec
from weights.contracts import DataSpec, TrainSpec
from weights.events import Failed, Finished, Progress, Saved, Started
from weights.families.stable_diffusion import StableDiffusion
from weights.store import Store
from weights.students import route_prompts

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return job_spec(
        job_inputs(tmp_path_factory.mktemp("inputs"), count=8),
        "msd",
        partition={"students": 2},
        train={"sample_every": 2, "checkpoint_every": 1},
        config={"student_every": 1, "student_lr": 1e-2, "warmup": 0, "schedules": {"1": {"timesteps": [1.0]}}},
        licence="CC0-1.0",
    )


def published(store: Store, name: str) -> dict[str, Tensor]:
    return load_file(store.open(name).path / WEIGHTS)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def whole(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A whole job, run in this process: its store and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    store = Store(folder / "store")
    assert MultiRun(raw, folder / "run", store).run(resume=False) == 0
    return store, folder / "run"


def test_each_part_is_published_and_a_router_over_them(raw: dict[str, Any], whole: tuple[Store, Path]) -> None:
    store, folder = whole
    assert store.names() == ["msd", "msd-0", "msd-1"]
    routed, first = store.manifest("msd"), store.manifest("msd-0")
    assert routed.router is not None and routed.router.students == ["msd-0", "msd-1"] and routed.files == {}
    assert (routed.schedules, routed.guidance, routed.base) == (first.schedules, first.guidance, first.base)
    assert routed.metrics["iterations"] == 4 and routed.metrics["router"]["train"] == 1.0
    assert routed.job is not None and routed.job.partition is not None and routed.job.partition.part is None
    assert first.job is not None and first.job.partition is not None and first.job.partition.part == 0
    assert not same(published(store, "msd-0"), published(store, "msd-1"))
    base = StableDiffusion.load(raw["base"])
    captions = load_corpus(DataSpec(source=raw["data"]["source"]), 32).captions
    labels = load_checkpoint(folder / FILE)[0]["labels"]
    assert route_prompts(routed.router, base, captions) == labels.tolist()
    assert sorted(path.name for path in folder.iterdir()) == [
        "cache", "events.jsonl", "job.json", "part-0", "part-1", FILE, "prepared",
    ]  # fmt: skip


def test_the_events_are_those_of_one_job(whole: tuple[Store, Path]) -> None:
    _, folder = whole
    found = events(folder)
    assert [event.kind for event in found].count("started") == 1
    prepared = found[: [event.kind for event in found].index("started")]
    assert {name for event in prepared for name in event.metrics} == {
        "preparation/embedding prompts", "part-0/preparation/encoding pictures",
    }  # fmt: skip
    started = found[len(prepared)]
    assert (started.step, started.iterations) == (0, 4)
    steps = [event.step for event in found]
    assert steps == sorted(steps)
    progress = [event for event in found if event.kind == "progress"]
    assert {event.iterations for event in progress} == {4}
    progress = progress[len(prepared) :]
    assert {name.split("/")[0] for event in progress for name in event.metrics} == {"part-0", "part-1"}
    saved = [event.path for event in found if event.kind in ("checkpoint", "samples")]
    assert {path.split("/")[0] for path in saved} == {"part-0", "part-1"}
    assert all((folder / path).is_file() for path in saved)
    assert (found[-1].kind, found[-1].student, found[-1].step) == ("finished", "msd", 4)
    assert [event.kind for event in found].count("finished") == 1
    assert events(folder / "part-1")[-1].student == "msd-1", "a part's own file has its own events"


def test_a_part_is_the_job_that_trains_it_alone(raw: dict[str, Any], whole: tuple[Store, Path], tmp_path: Path) -> None:
    alone = raw | {"student": "alone", "partition": {"students": 2, "part": 1}}
    store = Store(tmp_path / "store")
    path = tmp_path / "alone.json"
    path.write_text(json.dumps(alone))
    assert command.main([str(path), "--folder", str(tmp_path / "run"), "--store", str(store.root)]) == 0
    assert store.names() == ["alone"]
    assert same(published(store, "alone"), published(whole[0], "msd-1"))


def test_parallel_parts_end_in_the_same_weights(raw: dict[str, Any], whole: tuple[Store, Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    parallel = raw | {"partition": {"students": 2, "order": "parallel"}}
    assert MultiRun(parallel, tmp_path / "run", store).run(resume=False) == 0
    for name in ("msd-0", "msd-1"):
        assert same(published(store, name), published(whole[0], name))
    assert store.manifest("msd").router == whole[0].manifest("msd").router
    found = events(tmp_path / "run")
    assert [event.kind for event in found if event.kind in ("started", "finished")] == ["started", "finished"]
    assert max(event.step for event in found) == found[-1].step == 4


def test_a_stopped_job_goes_on_in_its_second_part(
    raw: dict[str, Any], whole: tuple[Store, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate, done = Trainer._iterate, []

    def stopped_at_third(self: Trainer) -> None:
        iterate(self)
        done.append(self.folder.name)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_iterate", stopped_at_third)
    store = Store(tmp_path / "store")
    assert MultiRun(raw, tmp_path / "run", store).run(resume=False) == STOPPED
    assert done == ["part-0", "part-0", "part-1"] and store.names() == ["msd-0"]
    before = store.open("msd-0")
    assert MultiRun(raw, tmp_path / "run", store).run(resume=False) == 1
    assert "'msd-0' is already published" in events(tmp_path / "run")[-1].message
    assert MultiRun(raw, tmp_path / "run", store).run(resume=True) == 0
    assert done[3:] == ["part-1"] and store.open("msd-0") == before
    assert [event.step for event in events(tmp_path / "run") if event.kind == "started"] == [0, 3]
    assert same(published(store, "msd-1"), published(whole[0], "msd-1"))
    assert MultiRun(raw, tmp_path / "run", store).run(resume=True) == 0
    assert len(done) == 4 and events(tmp_path / "run")[-1].kind == "finished", "all was done before"


def test_a_refused_job_leaves_the_specs_of_the_folder_and_of_its_parts(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Trainer) -> None:
        iterate(self)
        os.kill(os.getpid(), signal.SIGTERM)

    def specs() -> list[str]:
        return [path.read_text() for path in sorted((tmp_path / "run").rglob("job.json"))]

    def refused(change: dict[str, Any], resume: bool) -> str:
        store = Store(tmp_path / "store")
        assert MultiRun(raw | change, tmp_path / "run", store).run(resume) == 1
        return str(events(tmp_path / "run")[-1].message)

    iterate = Trainer._iterate
    with monkeypatch.context() as stopping:
        stopping.setattr(Trainer, "_iterate", stopped)
        assert MultiRun(raw, tmp_path / "run", Store(tmp_path / "store")).run(resume=False) == STOPPED
    before = specs()
    assert len(before) == 2
    other = {"config": raw["config"] | {"student_lr": 1e-3}}
    assert "config.student_lr (0.01 -> 0.001)" in refused(other, resume=True)
    assert "run holds a job's checkpoints: use --resume" in refused(other, resume=False)
    assert "other partition settings" in refused({"partition": {"students": 2, "seed": 1}}, resume=True)
    shutil.rmtree(tmp_path / "run" / "part-0" / "checkpoints")
    assert "other partition settings" in refused({"partition": {"students": 2, "seed": 1}}, resume=False)
    assert specs() == before
    fewer = raw | {"train": raw["train"] | {"iterations": 1}}
    assert MultiRun(fewer, tmp_path / "run", Store(tmp_path / "store")).run(resume=True) == 0
    assert [json.loads(each)["train"]["iterations"] for each in specs()] == [1, 1, 1]


def test_a_parallel_part_is_given_its_spec_beside_the_one_that_it_has(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the part itself knows whether it accepts the new one."""
    given: list[dict[str, Any]] = []

    def launched(command_line: list[str], **_: Any) -> subprocess.Popen[str]:
        given.append(json.loads(Path(command_line[3]).read_text()))
        return start([sys.executable, "-c", "raise SystemExit(1)"], stdout=subprocess.PIPE, text=True)

    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", launched)
    (tmp_path / "run" / "part-1").mkdir(parents=True)
    (tmp_path / "run" / "part-1" / "job.json").write_text("{}")
    job = raw | {"partition": {"students": 2, "order": "parallel"}}
    assert MultiRun(job, tmp_path / "run", Store(tmp_path / "store")).run(resume=True) == 1
    assert [each["partition"]["part"] for each in given] == [0, 1]
    assert (tmp_path / "run" / "part-1" / "job.json").read_text() == "{}"
    assert not list((tmp_path / "run").rglob(".job.json"))


def test_a_name_that_was_taken_meanwhile_is_refused_before_a_resumed_job_goes_on(
    raw: dict[str, Any], whole: tuple[Store, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    store = Store(tmp_path / "store")
    with monkeypatch.context() as stopping:
        stopping.setattr(Trainer, "_iterate", stopped)
        assert MultiRun(raw, tmp_path / "run", store).run(resume=False) == STOPPED
    shutil.copytree(whole[0].root / "msd-1", store.root / "msd-1")  # which another job has published
    (tmp_path / "run" / "part-1").mkdir()
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it trained"))
    assert MultiRun(raw, tmp_path / "run", store).run(resume=True) == 1
    assert "'msd-1' is already published" in events(tmp_path / "run")[-1].message


CHILD = """
import json, signal, sys, time
from datetime import UTC, datetime
part, behaviour = sys.argv[1:]
def say(**event): print(json.dumps({"at": datetime.now(UTC).isoformat(), **event}), flush=True)
def stop(*_):
    say(kind="checkpoint", step=7, path="checkpoints/x")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("a library's remark", flush=True)
say(kind="started", step=0, iterations=9)
say(kind="progress", step=3, iterations=9, metrics={"loss": 0.5})
if behaviour == "fails":
    say(kind="failed", step=3, message="the loss is nan")
    sys.exit(1)
if behaviour == "dies":
    signal.raise_signal(signal.SIGKILL)
time.sleep(600)
"""


def launch_instead(monkeypatch: pytest.MonkeyPatch, behaviours: list[str]) -> list[subprocess.Popen[str]]:
    """Parts are small processes that say what a job would; the list fills with them."""
    launched: list[subprocess.Popen[str]] = []

    def launch(self: MultiRun, part: int, resume: bool) -> subprocess.Popen[str]:
        command_line = [sys.executable, "-c", CHILD, str(part), behaviours[part]]
        launched.append(subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True))
        return launched[-1]

    monkeypatch.setattr(MultiRun, "_launch", launch)
    return launched


def test_sigterm_reaches_every_parallel_part(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launch_instead(monkeypatch, ["waits", "waits"])
    take, reported = MergedEvents.take, set()

    def stop_when_both_work(self: MergedEvents, part: int, event: Any) -> None:
        take(self, part, event)
        if event.kind == "progress":
            reported.add(part)
            if reported == {0, 1}:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MergedEvents, "take", stop_when_both_work)
    job = raw | {"partition": {"students": 2, "order": "parallel"}}
    store = Store(tmp_path / "store")
    assert MultiRun(job, tmp_path / "run", store).run(resume=False) == STOPPED
    assert [process.returncode for process in launched] == [143, 143]
    found = events(tmp_path / "run")
    assert {event.path for event in found[-2:]} == {"part-0/checkpoints/x", "part-1/checkpoints/x"}
    assert store.names() == [] and "failed" not in {event.kind for event in found}


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [("fails", "part 1: the loss is nan"), ("dies", "part 1: its process was killed by signal 9")],
)
def test_a_parallel_part_that_fails_stops_the_others(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, says: str
) -> None:
    launched = launch_instead(monkeypatch, ["waits", behaviour])
    job = raw | {"partition": {"students": 2, "order": "parallel"}}
    assert MultiRun(job, tmp_path / "run", Store(tmp_path / "store")).run(resume=False) == 1
    assert launched[0].returncode in (143, -signal.SIGTERM)
    last = events(tmp_path / "run")[-1]
    assert (last.kind, last.message) == ("failed", says)


def test_a_failing_part_says_which_and_why(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run" / "part-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "part-1" / "checkpoints" / "iteration-00000001.safetensors").write_bytes(b"torn")
    store = Store(tmp_path / "store")
    assert MultiRun(raw, tmp_path / "run", store).run(resume=True) == 1
    found = events(tmp_path / "run")
    assert found[-1].kind == "failed" and found[-1].message.startswith("part 1: ")
    assert "is not a readable checkpoint" in found[-1].message
    assert found[-1].last_checkpoint == "part-0/checkpoints/iteration-00000002.safetensors"
    assert store.names() == ["msd-0"] and [event.kind for event in found].count("failed") == 1


# Specs


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"partition": {"students": 1}}, "partition.students", "greater than or equal to 2"),
        ({"partition": {"students": 2, "part": 2}}, "partition", "part: 2 must be below students, 2"),
        ({"partition": {"students": 2, "by": "colour"}}, "partition.by", "'kmeans' or 'groups'"),
        ({"partition": {"students": 2, "way": 1}}, "partition.way", "no such field"),
        ({"student": "x" * 63}, "student", "parts need names of their own"),
    ],
)
def test_a_bad_partition_names_the_field(raw: dict[str, Any], change: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(BadSpec) as error:
        check_spec(raw | change)
    found = {each["param"]: each["message"] for each in error.value.errors}
    assert says in found[param], found


def test_prompts_have_no_groups(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red apple\n")
    data = raw["data"] | {"prompts": str(tmp_path / "prompts.txt")}
    with pytest.raises(BadSpec, match=r"partition\.by: prompts without images have no group: use 'kmeans'"):
        check_spec(raw | {"data": data, "partition": {"students": 2, "by": "groups"}})


def test_what_a_job_publishes(raw: dict[str, Any]) -> None:
    job, _ = check_spec(raw)
    assert job.publishes == ["msd", "msd-0", "msd-1"]
    assert [part.publishes for part in job.parts] == [["msd-0"], ["msd-1"]]
    assert [check_spec(part.model_dump(mode="json"))[0] for part in job.parts] == job.parts


def test_a_fingerprint_is_a_parts_own_but_not_its_orders(raw: dict[str, Any]) -> None:
    def of(**partition: object) -> str:
        return fingerprint(check_spec(raw | {"partition": {"students": 2, **partition}})[0], "base")

    assert of(part=0) == of(part=0, order="parallel") != of(part=1)
    assert of(part=0, seed=1) != of(part=0)
    plain = {key: value for key, value in raw.items() if key != "partition"}
    job, _ = check_spec(plain)
    assert job.partition is None and fingerprint(job, "base") != of(part=0)


def test_a_routed_student_is_no_start(raw: dict[str, Any], whole: tuple[Store, Path], tmp_path: Path) -> None:
    plain = {key: value for key, value in raw.items() if key != "partition"}
    run = JobRun(plain | {"student": "later", "start": "msd"}, tmp_path / "run", whole[0])
    assert run.run(resume=False) == 1
    assert "name one of its students, msd-0, msd-1" in events(tmp_path / "run")[-1].message


def test_smaller_students_are_taught_first_and_then_distilled_each_from_its_own(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    """Two jobs with the same partition: the teacher's answers on a narrower network, then the method from there."""
    store = Store(tmp_path / "store")
    small = {"block_out_channels": [4, 8, 8]}
    first = raw | {"student": "taught", "method": "score_matching", "config": {"warmup": 0}, "network": small}
    assert MultiRun(first, tmp_path / "first", store, cache=tmp_path / "cache").run(resume=False) == 0
    second = raw | {"student": "few", "start": "taught", "train": raw["train"] | {"iterations": 1}}
    second["config"] = raw["config"] | {"student_lr": 1e-30}
    assert MultiRun(second, tmp_path / "second", store, cache=tmp_path / "cache").run(resume=False) == 0
    for part in (0, 1):
        taught, few = published(store, f"taught-{part}"), published(store, f"few-{part}")
        assert taught["conv_in.weight"].shape[0] == 4
        assert all(torch.allclose(few[name], taught[name], atol=1e-3) for name in taught)
    assert not same(published(store, "taught-0"), published(store, "taught-1"))
    run = MultiRun(second | {"student": "else", "partition": {"students": 3}}, tmp_path / "other", store)
    assert run.run(resume=False) == 1
    assert "the 2 students of 'taught' are for other parts than this job's 3" in events(tmp_path / "other")[-1].message


# Merged events


class Recorder(Reporter):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[Any] = []

    def emit(self, event: Any) -> None:
        self.seen.append(event)


def progress(step: int, left: float | None) -> Progress:
    return Progress(at=now(), step=step, iterations=10, metrics={"loss": 1.0}, seconds_left=left)


def test_events_of_parts_one_after_the_other(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    merged = MergedEvents(recorder, 3, TrainSpec(iterations=10), parallel=False)
    merged.skip(0)
    merged.take(1, Started(at=now(), step=4, iterations=10, resumed_from=4))
    merged.take(1, progress(5, 50.0))
    merged.take(1, Saved(at=now(), step=5, kind="checkpoint", path="checkpoints/x"))
    merged.take(1, Finished(at=now(), step=10, student="a", seconds=99.0))
    merged.take(2, Started(at=now(), step=0, iterations=10))
    merged.take(2, progress(1, 90.0))
    merged.take(2, Failed(at=now(), step=1, message="oh"))
    seen = recorder.seen
    assert [(each.kind, each.step) for each in seen] == [
        ("started", 14), ("progress", 15), ("checkpoint", 15), ("progress", 20), ("progress", 21),
    ]  # fmt: skip
    assert (seen[0].iterations, seen[0].resumed_from) == (30, 14)
    assert seen[1].metrics == {"part-1/loss": 1.0}
    # 50 s for five iterations are 100 s for the part that waits.
    assert [each.seconds_left for each in seen if each.kind == "progress"] == [150.0, 100.0, 90.0]
    assert seen[2].path == merged.last_checkpoint == "part-1/checkpoints/x"
    assert seen[3].metrics == {"part-1/seconds": 99.0}
    assert merged.failures == {2: "oh"}


def test_events_of_parts_at_the_same_time(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    merged = MergedEvents(recorder, 2, TrainSpec(iterations=10), parallel=True)
    for part in (0, 1):
        merged.take(part, Started(at=now(), step=0, iterations=10))
    merged.take(0, progress(5, 50.0))
    merged.take(1, progress(2, None))
    merged.take(1, progress(3, 70.0))
    assert [(each.kind, each.step) for each in recorder.seen] == [
        ("started", 0), ("progress", 5), ("progress", 7), ("progress", 8),
    ]  # fmt: skip
    assert [each.seconds_left for each in recorder.seen[1:]] == [50.0, 50.0, 70.0]
