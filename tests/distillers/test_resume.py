"""A real process, killed with SIGKILL at a random step and resumed, ends in the uninterrupted run's weights, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distillers.checkpoint import load_checkpoint
from distillers.job import JobRun
from tests.distillers.jobs import events, job_inputs, job_spec
from weights.families.stable_diffusion import LORA_FILE
from weights.store import Store

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 12


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def spec(folder: Path) -> dict[str, Any]:
    return job_spec(
        job_inputs(folder),
        "killed",
        train={"iterations": ITERATIONS, "checkpoint_every": 1},
        lora={"rank": 2, "dropout": 0.1},
        config={"student_every": 2, "student_lr": 1e-3, "fake_score_lr": 1e-3, "warmup": 5},
    )


def start(job: Path, folder: Path, store: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distillers", str(job), "--folder", str(folder), "--store", str(store), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"iteration-{ITERATIONS:08d}.safetensors")[0]


def test_killed_and_resumed_it_ends_in_the_same_weights(tmp_path: Path, one_thread: None) -> None:
    raw = spec(tmp_path)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(raw))
    kill_at = random.randint(1, ITERATIONS - 2)

    process = start(job, tmp_path / "killed", tmp_path / "store")
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["kind"] == "progress" and event["step"] == kill_at:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()

    resumed = JobRun(raw, tmp_path / "killed", Store(tmp_path / "store"))
    assert resumed.run(resume=True) == 0
    started = [event for event in events(tmp_path / "killed") if event.kind == "started"]
    assert len(started) == 2 and started[1].resumed_from >= kill_at - 1, kill_at

    straight = JobRun(raw, tmp_path / "straight", Store(tmp_path / "other"))
    assert straight.run(resume=False) == 0
    left, right = final_state(tmp_path / "killed"), final_state(tmp_path / "straight")
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])], kill_at
    # The files' bytes differ: safetensors writes a header of several entries in no fixed order.
    published = [load_file(Store(tmp_path / store).open("killed").path / LORA_FILE) for store in ("store", "other")]
    assert published[0].keys() == published[1].keys()
    assert all(torch.equal(tensor, published[1][name]) for name, tensor in published[0].items())
