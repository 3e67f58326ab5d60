"""The benchmark runs and reports; what it measures is nobody's promise."""

import numpy as np
import pytest

from tests.benchmarks.bench_png import WRITERS, main, measure, pictures


def test_pictures_have_the_side_that_was_asked_for() -> None:
    (small,), (large,) = pictures(1, 64), pictures(1, 96)
    assert (small.size, large.size) == ((64, 64), (96, 96))
    difference = np.asarray(large.resize((64, 64))).astype(int) - np.asarray(small)
    assert np.abs(difference).mean() < 8, "it is the same picture"


def test_every_writer_is_timed_on_every_picture() -> None:
    found = measure(pictures(2, 64))
    assert found.keys() == WRITERS.keys()
    assert all(milliseconds > 0 and size > 100 for milliseconds, size in found.values())


def test_it_shows_both_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pictures", "1", "--side", "80"]) == 0
    told = capsys.readouterr().out
    assert "64x64" in told
    assert "80x80" in told
