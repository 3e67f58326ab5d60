"""The leaderboard: who takes part, how long each trains, what is resumed and refused, and what the document says."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import distillers.__main__ as job_command
from distillers.evaluation import protocol as protocol_
from distillers.evaluation.leaderboard import __main__ as command
from distillers.evaluation.leaderboard import bars, document, entries, figure
from distillers.evaluation.leaderboard import training as training_
from distillers.evaluation.leaderboard.records import Kept, Machine, Result, Row, Settings, Teacher, Training, read
from distillers.evaluation.leaderboard.training import Busy, Trainee, locked
from distillers.evaluation.metrics import Estimate, ratio
from distillers.evaluation.subjects import Subject
from distillers.evaluation.watch import Watched, watched
from distillers.events import now
from tests.distillers.evaluation.test_evaluation_run import Colours, tiny_protocol
from tests.helpers import picture_folder, tiny_pipeline
from weights.events import Finished

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

MACHINE = Machine(processor="a processor", cores="2", threads="1", torch="2.13", finished="2026-01-02 10:00 UTC")
SETTINGS = Settings(
    minutes=10,
    by="processor",
    threads=1,
    seed=0,
    base="base",
    base_sha256="0" * 64,
    protocol="1" * 64,
    quick=False,
    batch=64,
)


def figure_of(value: float) -> Estimate:
    return Estimate(value, (0.95 * value, 1.05 * value))


def row(
    steps: int,
    kernel: float,
    alignment: float = 0.2,
    diversity: float | None = 18.0,
    *,
    guided: bool = False,
    apart: bool = True,
) -> Row:
    return Row(
        steps=steps,
        evaluations=steps * (2 if guided else 1),
        milliseconds=1.0,
        kernel_distance=figure_of(kernel),
        captions_apart=apart,
        frechet_distance=1000 * kernel,
        r_precision=figure_of(alignment),
        diversity=None if diversity is None else figure_of(diversity),
    )


def teacher() -> Teacher:
    rows = [row(50, 0.1, guided=True), row(1, 0.3, guided=True), row(2, 0.2, guided=True), row(4, 0.15, guided=True)]
    return Teacher(
        name="base",
        guidance=3.0,
        rows=[*rows, row(16, 0.11, diversity=None, guided=True)],
        untrained=[row(1, 0.32), row(4, 0.12)],
        floor_kernel_distance=figure_of(0.001),
        real_r_precision=figure_of(0.5),
        machine=MACHINE,
    )


def result(name: str, rows: Sequence[Row] = (), failure: str | None = None, seconds: float = 600) -> Result:
    training = Training(iterations=300, seconds=seconds, clock_seconds=900, pictures=32, peak_bytes=2**30, attempts=1)
    return Result(
        name=name,
        method="dmd2",
        student=f"board-{name}",
        recipe_sha256="2" * 64,
        training=None if failure else training,
        rows=list(rows),
        failure=failure,
        machine=MACHINE,
    )


GOOD = result("good", [row(1, 0.08), row(2, 0.07), row(4, 0.05)])


class TestBars:
    def test_all_hold_for_a_good_method(self) -> None:
        found = bars.bars(teacher(), [GOOD])
        assert len(found) == 3 + 2 + 2
        assert all(bar.holds for bar in found)
        best = next(bar for bar in found if bar.bound == "at most 0.6")
        assert best.measured == ratio(figure_of(0.05), figure_of(0.1)) and best.who == "good, 4 steps"

    @pytest.mark.parametrize(
        ("bad", "broken"),
        [
            (row(2, 0.21), "every method's kernel distance at 2 steps, relative to the teacher's"),
            (
                row(1, 0.29, alignment=0.1),
                "every method's R-precision at any number of steps, relative to the teacher's at 50 steps",
            ),
            (
                row(1, 0.29, diversity=16.0),
                "every method's diversity at any number of steps, relative to the teacher's at 50 steps",
            ),
        ],
    )
    def test_one_bad_row_breaks_its_bar_alone(self, bad: Row, broken: str) -> None:
        assert [bar.what for bar in bars.bars(teacher(), [GOOD, result("bad", [bad])]) if not bar.holds] == [broken]

    def test_the_best_must_be_good_enough(self) -> None:
        weak = result("weak", [row(1, 0.095), row(2, 0.08), row(4, 0.061)])
        assert {bar.bound for bar in bars.bars(teacher(), [weak]) if not bar.holds} == {"at most 0.6", "at most 0.9"}
        assert all(bar.holds for bar in bars.bars(teacher(), [weak, GOOD]))

    def test_a_method_that_failed_breaks_what_every_method_must_hold(self) -> None:
        found = bars.bars(teacher(), [GOOD, result("none", failure="diverged")])
        assert {bar.bound for bar in found if bar.holds} == {"at most 0.6", "at most 0.9"}
        assert all("not trained: none" in bar.who for bar in found if not bar.holds)

    def test_without_results_nothing_is_decided(self) -> None:
        assert bars.bars(teacher(), []) == []


class TestDocument:
    def text(self, results: list[Result], **changes: Any) -> str:
        settings = SETTINGS.model_copy(update=changes)
        return document.markdown(settings, tiny_protocol(), teacher(), results, [("late", "it goes on from | another")])

    def test_each_method_is_compared_with_its_own_control(self) -> None:
        moved = GOOD.model_copy(update={"control": [row(1, 0.16), row(4, 0.10)]})
        at = {line.split("|")[2]: line for line in self.text([moved]).splitlines() if line.startswith("| **good**")}
        expected = ratio(figure_of(0.05), figure_of(0.10))
        assert f"| 0.33 ✓ | 0.50 ± {expected.high - expected.value:.2f} | 50 |" in at[" 4 "]
        assert "| 0.50 ± " in at[" 1 "]
        assert "| 0.35 ✓ |  |" in at[" 2 "], "the control was not measured there"

    def test_it_says_everything(self) -> None:
        text = self.text([result("worse", [row(1, 0.31), row(4, 0.2, alignment=0.1)], seconds=300), GOOD])
        lines = text.splitlines()
        at = {line.split("|")[1].strip() + line.split("|")[2]: line for line in lines if line.count("|") == 13}
        assert "10 minutes of training on 1 thread" in text and "processor time" in text
        assert "a processor, 2 cores" in text and "2026-01-02" in text
        assert "0.050 ± 0.005 | 0.50 | 0.33 ✓ |  | 50 | 0.200" in at["**good** 4 "]
        assert "1.33 ✗" in at["**worse** 4 "] and "| 0.50 ✗ |" in at["**worse** 4 "]
        assert "1.03 ✗" in at["**worse** 1 "]
        assert "1.20 | 0.80 ✓" in at["untrained 4 "] and "1.07 ✗" in at["untrained 1 "] and "is the control" in text
        assert "✓" not in at["`base` 50 "] and "✗" not in at["`base` 50 "]
        order = [text.index(f"| **{name}** | 4") for name in ("good", "worse")]
        assert order == sorted(order)
        assert "| 300 | 32 | 1.00 | 5.0 \\* | 15.0 | 1,024 |" in text and "more than 10% off the budget" in text
        assert "| 300 | 32 | 2.00 | 10.0 | 15.0 | 1,024 |" in text
        assert "`late`: it goes on from" in text
        assert "![" in text and "(leaderboard.png)" in text

    def test_tables_are_whole(self) -> None:
        text = self.text([GOOD, result("none", failure="the loss | is\nnan")])
        tables = [block for block in text.split("\n\n") if block.startswith("|")]
        assert len(tables) == 3
        for table in tables:
            widths = {line.replace("\\|", "").count("|") for line in table.splitlines()}
            assert len(widths) == 1, table
        assert "failed: the loss \\| is nan" in text

    def test_rows_of_the_old_estimator_are_told_from_others(self) -> None:
        old, said = result("old", [row(4, 0.06, apart=False)]), "about 0.001 too high"
        assert said not in self.text([GOOD, result("none", failure="x")])
        text = self.text([GOOD, old])
        assert "Kernel distances of all rows but `base`, `good` are from before" in text and said in text

    def test_a_quick_sample_is_called_one(self) -> None:
        assert "too large to compare" in self.text([GOOD], quick=True)
        assert "too large to compare" not in self.text([GOOD])

    def test_failures_rank_last_and_few_steps_by_their_largest(self) -> None:
        single = result("single", [row(1, 0.06)])
        ranked = document.ranking([result("none", failure="x"), single, GOOD])
        assert [each.name for each in ranked] == ["good", "single", "none"]

    def test_the_figure_takes_many_methods(self, tmp_path: Path) -> None:
        many = [result(f"method-{number}", [row(1, 0.1 + number / 100), row(4, 0.05)]) for number in range(24)]
        path = figure.plot(tmp_path / "deep" / "board.png", SETTINGS, teacher(), [*many, result("none", failure="x")])
        assert path.read_bytes().startswith(b"\x89PNG")


def test_records_come_back_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert read(Result, path) is None
    GOOD.write(path)
    assert read(Result, path) == GOOD
    assert list(tmp_path.iterdir()) == [path]
    path.write_text('{"name": 1}')
    with pytest.raises(ValueError, match=r"result\.json is not a result file of this version; delete it"):
        read(Result, path)


class TestWatch:
    def run(self, folder: Path, code: str) -> Watched:
        return watched([sys.executable, "-c", code], folder / "report", folder / "log", environment=dict(os.environ))

    def test_status_output_and_own_memory(self, tmp_path: Path) -> None:
        ended = self.run(tmp_path, "print('hello'); raise SystemExit(3)")
        assert ended.status == 3 and ended.seconds > 0
        assert (tmp_path / "log").read_text() == "hello\n"
        # This process holds torch, the command does not: its figure is not ours.
        assert 2**20 < ended.peak_bytes < 100 * 2**20
        assert self.run(tmp_path, "x = bytearray(150 * 2**20)").peak_bytes > 150 * 2**20

    def test_interrupted_it_ends_the_command_and_waits(self, tmp_path: Path) -> None:
        code = (
            "import signal, sys, time, pathlib\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            "def end(*_):\n    (here / 'saved').touch()\n    sys.exit(143)\n"
            "signal.signal(signal.SIGTERM, end)\n"
            "(here / 'ready').touch()\n"
            "time.sleep(60)\n"
        )
        outer = (
            "import os, pathlib, signal, sys, threading, time\n"
            "from distillers.evaluation.watch import watched\n"
            f"here, code = pathlib.Path({str(tmp_path)!r}), {code!r}\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            "watched([sys.executable, '-c', code], here / 'report', here / 'log', environment=dict(os.environ))\n"
        )
        process = subprocess.Popen([sys.executable, "-c", outer])
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
        assert (tmp_path / "saved").exists()


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    with locked(tmp_path / "x") as descriptor:
        with pytest.raises(Busy, match="another process is training"), locked(tmp_path / "x"):
            pass
        # What inherits the lock keeps it.
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    try:
        with pytest.raises(Busy), locked(tmp_path / "x"):
            pass
    finally:
        child.kill()
        child.wait()
    with locked(tmp_path / "x"):
        pass


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and pictures; a good recipe, one that diverges, and two that cannot be compared."""
    folder = tmp_path_factory.mktemp("board")
    base, pictures = tiny_pipeline(folder / "tiny-base"), picture_folder(folder / "pictures")
    (base / "fewstep.json").write_text(json.dumps({"default_steps": 3, "default_guidance": 2.0}))
    head = 'student = "x"\nmethod = "consistency"\n'
    tail = f'[data]\nsource = "{pictures}"\n[train]\nmax_minutes = 1\nbatch_size = 4\niterations = 7\nseed = 3\n'
    own = f'base = "{base}"\n'
    (folder / "emoji_good.toml").write_text(head + own + tail)
    # From the first iteration on: on a busy machine no second one may fit into the board's minutes.
    (folder / "emoji_wild.toml").write_text(head + own + tail + "[config]\nguidance_scale = 3e38\n")
    (folder / "emoji_later.toml").write_text(head + own + 'start = "x"\n' + tail)
    (folder / "emoji_other.toml").write_text(head + 'base = "emoji-base"\n' + tail)
    (folder / "sd_good.toml").write_text(head + tail)
    return folder


class TestEntries:
    def test_recipes_are_found_and_unfair_ones_left_out_with_a_reason(self, recipes: Path) -> None:
        found = {entry.name: entry for entry in entries.find(recipes, str(recipes / "tiny-base"))}
        assert sorted(found) == ["good", "later", "other", "wild"]
        assert "continues from the student x" in (found["later"].left_out or "")
        assert "its base is emoji-base" in (found["other"].left_out or "")
        assert [entry.name for entry in entries.chosen(list(found.values()), [])] == ["good", "wild"]
        assert [entry.name for entry in entries.chosen(list(found.values()), ["emoji_good"])] == ["good"]
        with pytest.raises(ValueError, match="no recipe emoji_none: use one of good, later, other, wild"):
            entries.chosen(list(found.values()), ["none"])
        with pytest.raises(ValueError, match="later cannot be on the leaderboard: it continues from"):
            entries.chosen(list(found.values()), ["later"])

    def test_a_recipe_that_is_guided_by_a_student_is_left_out(self, recipes: Path, tmp_path: Path) -> None:
        text = (recipes / "emoji_good.toml").read_text()
        (tmp_path / "emoji_guided.toml").write_text(text + '[guide]\nstudent = "worse"\n')
        (guided,) = entries.find(tmp_path, str(recipes / "tiny-base"))
        assert guided.left_out == "it is guided by the student worse, whose training the budget does not count"

    def test_the_committed_recipes_are_entries(self) -> None:
        found = entries.find(command.RECIPES, "emoji-base")
        assert {"dmd2", "consistency"} <= {entry.name for entry in found if entry.left_out is None}

    def test_the_budget_replaces_the_recipe_s_own_and_all_else_stays(self, recipes: Path) -> None:
        entry = next(each for each in entries.find(recipes, str(recipes / "tiny-base")) if each.name == "good")
        spec = entry.spec(iterations=50, threads=2, seed=1, every=10)
        train = spec["train"]
        assert (train["iterations"], train["threads"], train["seed"], train["max_minutes"]) == (50, 2, 1, None)
        assert train["batch_size"] == 4 and spec["data"] == entry.raw["data"]
        assert entry.raw["train"]["iterations"] == 7

    @pytest.mark.parametrize(
        ("name", "field", "value"),
        [
            ("disback", "degradation_iterations", 20),
            ("scm", "tangent_warmup", 10),
            ("tscd", "stages", [{"segments": 8, "iterations": 25}, {"segments": 4, "iterations": 33}]),
        ],
    )
    def test_phases_keep_their_share(self, name: str, field: str, value: Any) -> None:
        entry = next(each for each in entries.find(command.RECIPES, "emoji-base") if each.name == name)
        iterations = 200
        found = entry.spec(iterations=iterations, threads=1, seed=0, every=10)["config"][field]
        assert (found[:2] if isinstance(found, list) else found) == value
        probe = entry.spec(iterations=10**6, threads=1, seed=0, every=10, minutes=1.0)["config"][field]
        assert probe in (0, 4) or probe[0]["iterations"] == 1

    def test_several_students_share_one_budget(self) -> None:
        entry = next(each for each in entries.find(command.RECIPES, "emoji-base") if each.name == "msd")
        train = entry.spec(iterations=400, threads=1, seed=0, every=10)["train"]
        assert (train["iterations"], train["sample_every"]) == (100, 100)
        assert entry.spec(iterations=400, threads=1, seed=0, every=10, minutes=1.0)["train"]["max_minutes"] == 0.25

    def test_a_folder_without_recipes_is_no_board(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has no recipes emoji_"):
            entries.find(tmp_path, "emoji-base")


class Runs:
    """Stands in for the processes that train: the same commands, run here."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.stop: str | None = None

    def __call__(self, run: list[str], report: Path, log: Path, **_: Any) -> Watched:
        job = Path(run[3])
        self.jobs.append(f"{job.parent.name} {job.stem}")
        if self.stop == job.stem:
            raise KeyboardInterrupt
        return Watched(job_command.main(run[3:]), 2.0, 1.0, 123 * 2**20)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(training_, "watched", made)
    monkeypatch.setattr(training_, "OFF", float("inf"))  # in so short runs time is too coarse to be held to
    monkeypatch.setattr(command, "extractor", lambda name, device: Colours(device))
    monkeypatch.setattr(protocol_, "load", tiny_protocol)
    monkeypatch.setattr(Subject, "latency", lambda self, prompt: 1.5)
    return made


SECONDS = 1.2
"""Of training: many times what an iteration takes, even the first of a process on a busy machine."""


def board(recipes: Path, out: Path, *more: str) -> int:
    fixed = ["--recipes", str(recipes), "--base", str(recipes / "tiny-base"), "--device", "cpu", "--out", str(out)]
    fixed += ["--docs", str(out / "docs"), "--cache", str(recipes / "evaluation"), "--probe-seconds", "0.2"]
    return command.main([*fixed, "--minutes", f"{SECONDS / 60}", *more])


def test_the_board_trains_measures_and_goes_on(
    recipes: Path, tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    out, docs = tmp_path / "out", tmp_path / "out" / "docs"
    runs.stop = "job"
    with pytest.raises(KeyboardInterrupt):
        board(recipes, out)
    assert runs.jobs == ["good probe", "good job"]
    assert not docs.exists()
    assert board(recipes, out, "--list") == 0
    listed = capsys.readouterr().out
    assert (
        "started, will be continued" in listed
        and "to be trained" in listed
        and "left out: its base is emoji-base" in listed
    )

    runs.jobs, runs.stop = [], None
    assert board(recipes, out) == 1  # the wild one fails, the good one does not care
    assert runs.jobs[:2] == ["good job", "wild probe"]
    good, wild = (read(Result, out / name / "result.json") for name in ("good", "wild"))
    assert good is not None and wild is not None and good.training is not None
    probe = json.loads((out / "good" / training_.COST).read_text())
    assert good.training.iterations == probe["iterations"] == int(SECONDS / probe["seconds_per_iteration"])
    assert good.training.peak_bytes == 123 * 2**20 and good.training.pictures == 4
    assert [r.steps for r in good.rows] == [1, 2, 4] and [r.evaluations for r in good.rows] == [1, 2, 4]
    assert all(r.diversity is not None for r in good.rows)
    assert (wild.failure is not None and "is nan" in wild.failure) or "is inf" in (wild.failure or "")
    assert not (out / "good" / "job" / "checkpoints").exists() and not (out / "good" / "probe").exists()
    text = (docs / "leaderboard.md").read_text()
    assert "**good**" in text and "failed: iteration" in text and "`later`: it continues" in text
    known = read(Teacher, out / "teacher.json")
    assert known is not None and [r.steps for r in known.rows] == [3, 1, 2]  # full first; 4 is more than that
    assert [(r.steps, r.evaluations) for r in known.untrained] == [(1, 1), (2, 2), (4, 4)]  # as a student draws
    alike = [row.kernel_distance for row in known.untrained]
    assert [row.kernel_distance for row in good.control] == alike, "the recipe has the usual times"

    runs.jobs = []
    good.model_copy(update={"control": []}).write(out / "good" / "result.json")  # as before there was a control
    assert board(recipes, out, "--only", "good") == 0
    completed = read(Result, out / "good" / "result.json")
    assert completed is not None and [row.kernel_distance for row in completed.control] == alike and runs.jobs == []
    good.write(out / "good" / "result.json")
    (docs / "leaderboard.md").unlink()
    assert board(recipes, out, "--table-only") == 0
    assert (docs / "leaderboard.md").read_text() == text and runs.jobs == []
    assert board(recipes, out, "--only", "good") == 0
    assert runs.jobs == []
    check_refusals(recipes, out, runs, capsys)
    assert board(recipes, out, "--table-only") == 0
    check_one_anew(recipes, docs, tmp_path / "anew", runs)


def check_one_anew(recipes: Path, docs: Path, out: Path, runs: Runs) -> None:
    """In another folder one method is made again; the teacher and the others stand as they are kept beside the document."""
    before = read(Kept, docs / command.KEPT)
    assert before is not None and [each.name for each in before.results] == ["good", "wild"]
    assert board(recipes, out, "--docs", str(docs), "--only", "good") == 0
    assert runs.jobs == ["good probe", "good job"]
    after = read(Kept, docs / command.KEPT)
    assert after is not None and not (out / "teacher.json").exists()
    assert (after.settings, after.teacher, after.results[1]) == (before.settings, before.teacher, before.results[1])
    assert after.results[0] == read(Result, out / "good" / "result.json") != before.results[0]
    assert "failed: iteration" in (docs / "leaderboard.md").read_text()

    # Of another budget they say nothing.
    other = out.with_name("other")
    assert board(recipes, other, "--docs", str(docs), "--minutes", "0.01", "--table-only") == 0
    assert read(Kept, docs / command.KEPT) == after


def check_refusals(recipes: Path, out: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures of two budgets, or of two versions of a recipe, never meet in a table."""

    def error(*more: str) -> str:
        capsys.readouterr()
        assert board(recipes, out, *more) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "holds a leaderboard with other settings: seed 0 (now 5)" in error("--seed", "5")
    assert "no recipe emoji_none" in error("--only", "none")
    recipe = recipes / "emoji_good.toml"
    before = recipe.read_text()
    try:
        recipe.write_text(before.replace("batch_size = 4", "batch_size = 5"))
        assert board(recipes, out, "--only", "good") == 1
        assert "the recipe of good has changed since: delete" in " ".join(capsys.readouterr().err.split())
        text = (out / "docs" / "leaderboard.md").read_text()
        assert "**good**" not in text and "`good`: not finished yet" in text
    finally:
        recipe.write_text(before)
    assert runs.jobs == []


def test_a_budget_too_small_for_an_iteration_is_a_failure_with_the_numbers(
    recipes: Path, tmp_path: Path, runs: Runs
) -> None:
    assert board(recipes, tmp_path, "--only", "good", "--minutes", "0.000001") == 1
    failed = read(Result, tmp_path / "good" / "result.json")
    assert failed is not None and "which is more than the budget of 1e-06 minutes" in (failed.failure or "")
    assert runs.jobs == ["good probe"]


def test_a_board_stopped_while_it_probes_goes_on(recipes: Path, tmp_path: Path, runs: Runs) -> None:
    runs.stop = "probe"
    with pytest.raises(KeyboardInterrupt):
        board(recipes, tmp_path, "--only", "good")
    runs.stop = "job"
    with pytest.raises(KeyboardInterrupt):
        board(recipes, tmp_path, "--only", "good")
    assert runs.jobs == ["good probe", "good probe", "good job"]


class Clockwork(Trainee):
    """Trains nothing, and takes as long as it is told: 1 s an iteration while probed, ``cost`` when trained."""

    cost = 1.0
    preparation = 0.0

    def _run(self, name: str, spec: dict[str, Any], descriptor: int, store: Path | None = None) -> Finished:
        (self.folder / name / "checkpoints").mkdir(parents=True)
        if name == "job":
            with self._attempts.open("a") as file:
                file.write(json.dumps({"status": 0, "seconds": 1, "processor_seconds": 1, "peak_bytes": 1}) + "\n")
        count = 60 if name == "probe" else spec["train"]["iterations"]
        spent = count * (1.0 if name == "probe" else self.cost)
        metrics = {
            "iterations": count,
            "training_seconds": 3 * spent,
            "processor_seconds": spent,
            "preparation_seconds": 3 * self.preparation,
            "preparation_processor_seconds": self.preparation,
        }
        return Finished(at=now(), step=count, student="x", seconds=3 * spent, metrics=metrics)


class TestBudget:
    def trainee(self, recipes: Path, folder: Path, **changes: Any) -> Clockwork:
        entry = next(each for each in entries.find(recipes, str(recipes / "tiny-base")) if each.name == "good")
        made = Clockwork(entry, folder, SETTINGS.model_copy(update=changes), folder, 60.0)
        folder.mkdir(exist_ok=True)
        return made

    def test_iterations_follow_from_minutes_of_the_processor_and_preparation_counts(
        self, recipes: Path, tmp_path: Path
    ) -> None:
        trainee = self.trainee(recipes, tmp_path / "x")
        trainee.preparation = 120.0
        made = trainee.train(0)
        assert (made.iterations, made.seconds, made.clock_seconds, made.attempts) == (480, 600.0, 1800.0, 1)
        assert trainee.train(0) == made
        threads = self.trainee(recipes, tmp_path / "threads", threads=2).train(0)
        assert (threads.iterations, threads.seconds) == (1200, 600.0)
        clock = self.trainee(recipes, tmp_path / "clock", by="clock").train(0)
        assert (clock.iterations, clock.seconds) == (200, 600.0)

    def test_a_training_that_misses_the_budget_is_done_once_more(self, recipes: Path, tmp_path: Path) -> None:
        trainee = self.trainee(recipes, tmp_path / "x")
        trainee.cost = 1.5
        made = trainee.train(0)
        assert (made.iterations, made.seconds, made.attempts) == (400, 600.0, 1)
        plan = trainee.probe()
        assert plan is not None and plan.corrected and plan.seconds_per_iteration == 1.5
        near = self.trainee(recipes, tmp_path / "near")
        near.cost = 1.05
        assert near.train(0).iterations == 600
