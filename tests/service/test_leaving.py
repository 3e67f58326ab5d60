"""The end of a process, while threads are at work."""

import subprocess
import sys
import threading
import weakref

import pytest

from service.engine.leaving import Beside
from tests.service.jobs_help import ROOT

BEGIN = """
import atexit, threading, time
from service.engine.leaving import Beside, leave

begun = threading.Event()
atexit.register(print, "registered for the end")
beside = Beside("compiling")
"""
OWN_END = """
def work():
    begun.set()
    time.sleep(0.5)
    print("finished")

beside.put(work)
beside.put(lambda: print("begun at the end"))
begun.wait()
"""
LEFT = """
beside.put(lambda: begun.set() or threading.Event().wait())
begun.wait()
print("not flushed", end="")
leave()
"""


@pytest.mark.parametrize(
    ("how", "printed"),
    [
        (OWN_END, ["finished", "registered for the end"]),
        (LEFT, ["not flushedregistered for the end"]),
        ("del beside\nleave()\nprint('nothing to leave')", ["nothing to leave", "registered for the end"]),
    ],
    ids=["Python's own", "left", "with nothing at work"],
)
def test_the_end_of_a_process(how: str, printed: list[str]) -> None:
    """It waits for what cannot be interrupted and begins nothing more; or, where its work is done, it does not wait."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + how], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert sorted(done.stdout.splitlines()) == sorted(printed)
    assert done.stderr == ""


def test_work_beside_is_done_in_turn_whatever_fails(caplog: pytest.LogCaptureFixture) -> None:
    beside, done, over = Beside("compiling"), [], threading.Event()

    def fail() -> None:
        done.append("failed")
        raise RuntimeError("on purpose")

    beside.put(fail)
    beside.put(lambda: done.append(threading.current_thread().name))
    beside.put(over.set)
    assert over.wait(60)
    assert done == ["failed", "compiling"]
    assert "on purpose" in caplog.text


def test_its_thread_ends_with_it() -> None:
    before = threading.active_count()
    beside = Beside("compiling")
    gone = weakref.ref(beside)
    assert threading.active_count() == before + 1
    del beside
    assert (gone(), threading.active_count()) == (None, before)
