"""The benchmark runs and reports; what it measures is nobody's promise."""

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.bench_network import Timing, main, measure
from tests.helpers import tiny_pipeline


def test_every_call_but_the_first_is_timed() -> None:
    seen: list[int] = []
    times = measure(lambda: seen.append(1), torch.device("cpu"), seconds=0, fewest=5)
    assert len(times) == 5
    assert len(seen) == 6


def test_a_batch_shares_its_time() -> None:
    assert Timing(backend="torch", what="x", batch=4, median=8, fastest=7, slowest=9, calls=3).per_picture == 2


def test_it_times_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_pipeline(tmp_path / "base")
    out = tmp_path / "deep" / "bench.json"
    arguments = ["--base", str(base), "--out", str(out), "--seconds", "0", "--batches", "1", "2", "--base-steps", "2"]
    assert main([*arguments, "--threads", "1", "--cache", str(tmp_path / "cache")]) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["base"] == str(base)
    kinds = {(row["backend"], row["batch"]) for row in report["milliseconds"]}
    assert kinds == {("torch", 1), ("torch", 2), ("openvino", 1), ("openvino", 2)}
    whats = {row["what"] for row in report["milliseconds"]}
    assert {"network, one call", "decoder", "text encoder", "whole draw, 4 steps"} <= whats
    assert all(0 < row["fastest"] <= row["median"] <= row["slowest"] for row in report["milliseconds"])
    assert "network, one call" in capsys.readouterr().out


def test_without_a_model_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base", str(tmp_path / "nothing"), "--out", str(tmp_path / "bench.json")]) == 2
    assert "nothing to time" in capsys.readouterr().err
    assert not (tmp_path / "bench.json").exists()
