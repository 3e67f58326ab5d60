"""Time adds up over blocks, each kind on its own, and only inside them."""

from collections.abc import Iterator

import pytest

from distillers import stopwatch
from distillers.stopwatch import Stopwatch


def test_only_what_passes_inside_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(*times: float) -> Iterator[float]:
        return iter(times)

    wall, processor = clock(10.0, 14.0, 100.0, 101.0), clock(1.0, 1.5, 2.0, 2.25)
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: next(wall))
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: next(processor))
    watch = Stopwatch(2.0, 0.5)
    with watch:
        pass
    assert (watch.seconds, watch.processor_seconds) == (6.0, 1.0)
    with pytest.raises(ValueError, match="inside"), watch:
        raise ValueError("inside")
    assert (watch.seconds, watch.processor_seconds) == (7.0, 1.25)
