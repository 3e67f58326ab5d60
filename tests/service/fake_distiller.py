"""A stand-in for ``python -m distillers`` that starts in milliseconds: same arguments, events and signals, no training.

Its job's ``config`` says how it behaves: ``steps`` to count to, ``delay`` seconds a step, ``fail_at`` a step, ``deaf``
to SIGTERM, ``child``: start a process of its own, ``report``: file that gets a line per start with the process ids,
``refuse``: fail with this for a reason, told by an event alone, ``log_every``: as the trainer's, whose last step is
always told.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def check() -> int:
    jobs = json.load(sys.stdin)
    for index, job in enumerate(jobs):
        errors = []
        if job["method"] == "crash":
            print("the check crashed", file=sys.stderr)
            return 3
        if job["method"] != "fake":
            errors.append({"param": "method", "message": f"no method {job['method']!r}: use 'fake'"})
        config = job.setdefault("config", {})
        if config.get("steps", 1) < 1:
            errors.append({"param": "config.steps", "message": "must be at least 1"})
        config.setdefault("steps", 5)
        if errors:
            print(json.dumps({"ok": False, "index": index, "errors": errors}))
            return 1
    print(json.dumps({"ok": True, "jobs": jobs}))
    return 0


class Run:
    def __init__(self, spec: Path, folder: Path, store: Path) -> None:
        self.store = store
        self.job: dict[str, Any] = json.loads(spec.read_text())
        self.config = self.job["config"]
        self.folder = folder
        self.state = folder / "state.json"
        self.asked_to_stop = False

    def emit(self, **event: Any) -> None:
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"at": datetime.now(UTC).isoformat(), **event}) + "\n")

    def save(self, step: int) -> None:
        temporary = self.state.with_suffix(".new")
        temporary.write_text(json.dumps({"step": step}))
        temporary.replace(self.state)

    def run(self) -> int:
        if self.config.get("deaf"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked_to_stop", True))
        pids = [os.getpid()]
        if self.config.get("child"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
            pids.append(child.pid)
        if "report" in self.config:
            with Path(self.config["report"]).open("a") as file:
                file.write(json.dumps({"pids": pids, "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}) + "\n")
        steps = self.config.get("steps", 5)
        first = json.loads(self.state.read_text())["step"] if self.state.exists() else 0
        if "refuse" in self.config:
            self.emit(kind="failed", step=first, message=self.config["refuse"])
            return 1
        self.emit(kind="started", step=first, iterations=steps, resumed_from=first)
        for step in range(first + 1, steps + 1):
            time.sleep(self.config.get("delay", 0.0))
            if step == self.config.get("fail_at") and not first:
                print("Traceback: the loss is not finite", file=sys.stderr)
                return 1
            self.save(step)
            if step % self.config.get("log_every", 1) == 0:
                self.emit(kind="progress", step=step, iterations=steps, metrics={"loss": 1 / step}, seconds_left=None)
            if self.asked_to_stop:
                return 143
        self.store.mkdir(parents=True, exist_ok=True)
        (self.store / f"{self.job['student']}.drawable").touch()
        self.emit(kind="finished", step=steps, student=self.job["student"], seconds=0.5, metrics={"kid": 0.1})
        return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["check", "-"]:
        sys.exit(check())
    arguments = dict(zip(sys.argv[2:-1:2], sys.argv[3:-1:2], strict=True))
    assert (set(arguments), sys.argv[-1]) == ({"--folder", "--store"}, "--resume"), sys.argv
    sys.exit(Run(Path(sys.argv[1]), Path(arguments["--folder"]), Path(arguments["--store"])).run())
