"""Jobs of two processes, as torchrun starts them: one student, whose gradients are everybody's, and one report."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from distillers import processes
from distillers.checkpoint import load_checkpoint
from distillers.processes import Interrupted, Tick, main_first
from tests.distillers.jobs import events, job_inputs, job_spec
from weights.store import Store

ROOT = Path(__file__).resolve().parents[2]
POISONED = """
import sys
import torch
from distillers.__main__ import main
from distillers.methods.dmd2 import DMD2
from distillers.processes import place

loss_of = DMD2.loss


def poisoned(self, turn, step):
    found = loss_of(self, turn, step)
    if step.iteration == 2 and place()[0] == 1:
        found.loss.data.fill_(float("nan"))
        found.loss.register_hook(lambda gradient: gradient * float("nan"))
    return found


DMD2.loss = poisoned
sys.exit(main(sys.argv[1:]))
"""


TELLING = """
import sys
from distillers.__main__ import main
from distillers.pairs import TeacherPairs
from distillers.processes import place

make = TeacherPairs._make_shard


def told(self, path, pairs, *arguments):
    path.with_suffix(f".by-{place()[0]}").touch()
    make(self, path, pairs, *arguments)


TeacherPairs._make_shard = told
sys.exit(main(sys.argv[1:]))
"""
STOPPING = TELLING.replace("import sys", "import os, signal, sys").replace(
    "    make(", "    os.kill(os.getpid(), signal.SIGTERM) if place()[0] else None\n    make("
)
CACHING = """
import sys
from distillers import data
from distillers.__main__ import main
from distillers.processes import place

write, encode = data._write_conditions, data.Feed._write_latents


def written(folder, *arguments):
    (folder.parent / f"conditions.by-{place()[0]}").touch()
    write(folder, *arguments)


def encoded(self, path, tick):
    path.with_name(f"latents.by-{place()[0]}").touch()
    encode(self, path, tick)


data._write_conditions, data.Feed._write_latents = written, encoded
sys.exit(main(sys.argv[1:]))
"""


def spec(folder: Path, method: str, iterations: int, **config: Any) -> dict[str, Any]:
    train = {"iterations": iterations, "checkpoint_every": 2}
    return job_spec(folder, "of-two", method, train=train, config={"student_lr": 1e-3, "warmup": 0, **config})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_inputs(tmp_path_factory.mktemp("two"))


def run(folder: Path, name: str, job: dict[str, Any], *more: str, module: Path | None = None) -> tuple[int, str]:
    """Exit status and standard error of the job, in two processes."""
    (folder / f"{name}.json").write_text(json.dumps(job))
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    what = ["-m", "distillers"] if module is None else [str(module)]
    places = ["--folder", str(folder / name), "--store", str(folder / "store"), *more]
    ended = subprocess.run(
        [*started, *what, str(folder / f"{name}.json"), *places],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return ended.returncode, ended.stderr


def state(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"iteration-{iteration:08d}.safetensors")[0]


def test_two_make_one_student_and_resume_to_the_same_weights(folder: Path) -> None:
    """f-distill's ratios are averaged over everybody's pictures: of each one's own, all but the first's would be lost."""
    config = {"fake_score_lr": 1e-3, "student_every": 2}
    status, errors = run(folder, "whole", spec(folder, "f_distill", 4, **config))
    assert status == 0, errors
    assert [event.kind for event in events(folder / "whole")].count("finished") == 1
    assert Store(folder / "store").names() == ["of-two"]

    short = spec(folder, "f_distill", 2, **config) | {"student": "stopped"}
    assert run(folder, "halves", short)[0] == 0
    assert (
        run(folder, "halves", short | {"train": {**short["train"], "iterations": 4}}, "--resume", "--replace")[0] == 0
    )
    whole, halves = state(folder / "whole", 4), state(folder / "halves", 4)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    ratios = next(tensor for name, tensor in whole.items() if "ratio_means" in name)
    assert not torch.equal(ratios, torch.ones_like(ratios))


def test_a_loss_that_is_nan_in_any_process_ends_the_job_with_the_reason(folder: Path) -> None:
    module = folder / "poisoned.py"
    module.write_text(POISONED)
    job = spec(folder, "dmd2", 4, gan_weight=0.0) | {"student": "poisoned"}
    status, errors = run(folder, "nan", job, module=module)
    assert status != 0
    assert "process 1: iteration 2: " in errors
    last = events(folder / "nan")[-1]
    assert last.kind == "failed" and last.message.startswith("iteration 2: the ")
    assert "is nan; last good checkpoint: iteration-00000002.safetensors" in last.message


@pytest.fixture
def of_pairs(folder: Path) -> dict[str, Any]:
    job = spec(folder, "dmd2", 2, gan_weight=0.0, regression_iterations=1, regression_pairs=130, regression_steps=1)
    return job | {"student": "of-pairs"}


def test_the_teachers_pairs_are_shared_out(folder: Path, of_pairs: dict[str, Any]) -> None:
    (folder / "telling.py").write_text(TELLING)
    status, errors = run(folder, "pairs", of_pairs, module=folder / "telling.py")
    assert status == 0, errors
    made = sorted(path.name[-len("000000-000000.by-0") :] for path in (folder / "pairs").rglob("pairs-*.by-*"))
    assert made == ["000000-000064.by-0", "000064-000128.by-1", "000128-000130.by-0"]


def test_one_that_is_stopped_while_pairs_are_made_stops_all(folder: Path, of_pairs: dict[str, Any]) -> None:
    (folder / "stopping.py").write_text(STOPPING)
    status, _ = run(folder, "stopped", of_pairs | {"student": "stopped-early"}, module=folder / "stopping.py")
    assert status != 0
    assert not [event for event in events(folder / "stopped") if event.kind == "failed"]
    assert len(list((folder / "stopped").rglob("pairs-*.safetensors"))) == 2, "what was made is kept"


def test_the_main_process_alone_fills_the_cache(folder: Path) -> None:
    (folder / "caching.py").write_text(CACHING)
    job = spec(folder, "dmd2", 1) | {"student": "cached"}
    cache = folder / "cache"
    status, errors = run(folder, "cached", job, "--cache", str(cache), module=folder / "caching.py")
    assert status == 0, errors
    assert sorted(path.name for path in cache.glob("*.by-*")) == ["conditions.by-0", "latents.by-0"]
    assert len(list(cache.glob("conditions-*"))) == len(list(cache.glob("latents-*"))) == 1
    told = {
        name for event in events(folder / "cached") for name in getattr(event, "metrics", {}) if "preparation/" in name
    }
    assert told == {"preparation/encoding captions", "preparation/encoding pictures"}


class Two:
    """Two processes of a job as threads, each with its own answer: what `main_first` gave, or raised."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.met = threading.Barrier(2, timeout=30)
        self.mine = threading.local()
        self.said: dict[int, torch.Tensor] = {}
        self.disk: list[str] = []
        self.ended: dict[int, Any] = {}
        self.failing = False
        patch.setattr(processes, "_several", lambda: True)
        patch.setattr(processes, "place", lambda: (self.mine.rank, 2))
        patch.setattr(processes, "summed", self.summed)

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        self.said[self.mine.rank] = tensor
        self.met.wait()
        total = self.said[0] + self.said[1]
        self.met.wait()
        return total

    def work(self, tick: Tick) -> str:
        if not self.disk:
            tick("making", 1, 2)
            if self.failing:
                raise ValueError("no space left")
            tick("making", 2, 2)
            self.disk.append(f"by {self.mine.rank}")
        return self.disk[0]

    def run(self, stops: dict[int, int]) -> dict[int, Any]:
        """What each process ends with; ``stops`` says which of them is to stop, at its how manieth tick."""

        def one(rank: int) -> None:
            self.mine.rank, ticks = rank, 0

            def tick(what: str, done: int, total: int) -> None:
                nonlocal ticks
                ticks += 1
                if stops.get(rank) == ticks:
                    raise Interrupted("asked")

            try:
                self.ended[rank] = main_first(self.work, tick, torch.device("cpu"))
            except Exception as error:  # noqa: BLE001 (it is what is looked at)
                self.ended[rank] = type(error)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.ended


def test_what_the_main_process_made_the_others_find(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(monkeypatch)
    assert two.run({}) == {0: "by 0", 1: "by 0"}
    assert two.disk == ["by 0"]


@pytest.mark.parametrize("stops", [{0: 1}, {0: 2}, {1: 1}, {1: 2}, {1: 3}, {0: 1, 1: 1}])
def test_whoever_is_asked_to_stop_while_the_main_process_works_stops_all(
    stops: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Two(monkeypatch).run(stops) == {0: Interrupted, 1: Interrupted}


def test_nobody_waits_for_a_main_process_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(monkeypatch)
    two.failing = True
    assert two.run({}) == {0: ValueError, 1: Interrupted}
