"""Jobs of two processes, as torchrun starts them: one student, whose gradients are everybody's, and one report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distillers.checkpoint import load_checkpoint
from tests.helpers import picture_folder, tiny_pipeline
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


def spec(folder: Path, method: str, iterations: int, **config: Any) -> dict[str, Any]:
    return {
        "student": "of-two",
        "method": method,
        "base": str(folder / "base"),
        "data": {"source": str(folder / "data")},
        "train": {
            "iterations": iterations, "batch_size": 2, "log_every": 1, "checkpoint_every": 2, "sample_every": 100,
            "threads": 1, "precision": "float32",
        },
        "config": {"student_lr": 1e-3, "warmup": 0, **config},
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("two")
    tiny_pipeline(made / "base")
    picture_folder(made / "data")
    return made


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


def events(folder: Path) -> list[dict[str, Any]]:
    written = folder / "events.jsonl"
    return [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []


def state(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"iteration-{iteration:08d}.safetensors")[0]


def test_two_make_one_student_and_resume_to_the_same_weights(folder: Path) -> None:
    """f-distill's ratios are averaged over everybody's pictures: of each one's own, all but the first's would be lost."""
    config = {"fake_score_lr": 1e-3, "student_every": 2}
    status, errors = run(folder, "whole", spec(folder, "f_distill", 4, **config))
    assert status == 0, errors
    assert [event["kind"] for event in events(folder / "whole")].count("finished") == 1
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
    assert last["kind"] == "failed" and last["message"].startswith("iteration 2: the ")
    assert "is nan; last good checkpoint: iteration-00000002.safetensors" in last["message"]


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
    assert not [event for event in events(folder / "stopped") if event["kind"] == "failed"]
    assert len(list((folder / "stopped").rglob("pairs-*.safetensors"))) == 2, "what was made is kept"
