"""The benchmark counts what is there: the same bytes as by hand, and what is shared once."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.bench_memory import MODES, main, measure, size
from tests.helpers import picture_folder, tiny_pipeline
from weights.families.stable_diffusion import StableDiffusion


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    base, data = tiny_pipeline(tmp_path / "base"), picture_folder(tmp_path / "data")
    return {"base": str(base), "data": str(data), "batch": 2, "rank": 2, "iterations": 1}


def test_shared_memory_counts_once() -> None:
    weight = torch.zeros(4, 4)
    assert size([weight, weight[1:], weight.t()]) == 64
    assert size([weight, weight.clone()]) == 128


def test_each_mode_holds_what_it_should(arguments: dict[str, Any]) -> None:
    options = argparse.Namespace(**arguments, family="stable_diffusion", precision="float32", threads=1)
    base = StableDiffusion.load(arguments["base"])
    once = sum(weight.nbytes for weight in base.network.parameters())
    full, lora, lean = (measure(mode, options) for mode in MODES)
    head = full.trained * 4 - 2 * once
    assert 0 < head < once
    adapter = (lean.trained * 4 - head) / 2
    assert lora.trained == lean.trained
    assert full.weights == 3 * once + head
    assert lora.weights == 3 * once + head + 2 * adapter
    assert lean.weights == once + head + 2 * adapter
    assert full.gradients == full.weights - 2 * once, "the critic's turn trains the most: fake score and head"
    assert full.averages == once and lora.averages == lean.averages == adapter
    assert lora.gradients == lean.gradients == head + adapter and lora.moments == lean.moments
    steps = 4 * 2 * len(list(base.network.parameters()))
    assert 2 * 4 * full.trained + steps <= full.moments < 2 * 4 * full.trained + 2 * steps
    assert len({each.encoders for each in (full, lora, lean)}) == 1
    assert all(each.peak is None or each.peak > 0 for each in (full, lora, lean))


def test_each_mode_has_a_process_of_its_own(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "memory.json"
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    assert main([*words, "--out", str(out), "--modes", "lean", "--threads", "1"]) == 0
    report = json.loads(out.read_text())
    assert (report["machine"]["base"], report["machine"]["rank"]) == (arguments["base"], 2)
    (row,) = report["bytes"]
    assert row["mode"] == "lean" and row["together"] == sum(
        row[part] for part in ("weights", "gradients", "moments", "averages", "encoders")
    )
    assert "lean" in capsys.readouterr().out


def test_without_a_base_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.json"
    assert main(["--base", str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert not out.exists()


def test_a_job_that_fails_is_told_with_its_status(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.benchmarks.bench_memory.sys.executable", "false")
    assert main(["--base", arguments["base"], "--out", str(tmp_path / "memory.json")]) == 2
    assert "status 1" in capsys.readouterr().err
