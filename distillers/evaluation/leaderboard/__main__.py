"""Trains every method on the bundled teacher with one budget, measures all with one protocol, writes table and figure.

    python -m distillers.evaluation.leaderboard [--minutes 10] [--threads 1] [--only dmd2 ...] [--list] [--table-only]

Entries are discovered: distillers/recipes/emoji_*.toml. Each is trained in a separate process, after a short timed run
that determines how many iterations the budget allows. An interrupted board continues where it was: finished entries are
not repeated, and training resumes from its checkpoint. The document is rewritten after every entry. The budget is
processor time on a CPU, so that other load on the machine costs a method nothing, and wall-clock time with a GPU.

The document's figures are kept beside it in leaderboard.json. With --only, the teacher and all methods that are not
named keep their figures from there, if budget, protocol and teacher are the same.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distillers.evaluation import protocol as protocol_
from distillers.evaluation.cache import default_root
from distillers.evaluation.features import EfficientNetLite0, Unavailable, extractor
from distillers.evaluation.leaderboard import document, entries, figure
from distillers.evaluation.leaderboard.entries import Entry
from distillers.evaluation.leaderboard.measuring import Measurer, machine
from distillers.evaluation.leaderboard.records import Kept, Result, Settings, Teacher, read
from distillers.evaluation.leaderboard.training import COST, Busy, Stale, Trainee, TrainingFailed, locked
from distillers.evaluation.models import DEFAULT_BASE
from distillers.precision import device_name
from distillers.spec import RECIPES
from weights.bundled import resolve_base
from weights.store import StoreError, digest_base

PROBE_SECONDS = 60.0
KEPT = "leaderboard.json"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if an entry could not be finished, 2 if nothing could be started."""
    options = parser().parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True)
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        console.print(Text(f"error: the leaderboard needs {', '.join(missing)}: pip install 'fewstep[metrics]'", "red"))
        return 2
    previous = signal.signal(signal.SIGTERM, _stopped)
    try:
        board = Board(options, console)
        if options.list:
            Console(soft_wrap=True).print(board.listing())
            return 0
        return board.run()
    except (Unavailable, StoreError, ValueError, OSError) as error:
        console.print(Text(f"error: {error}", style="red"))
        return 2
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stopped(*_: Any) -> NoReturn:
    raise SystemExit(143)  # on the way out, a running training is asked to write a checkpoint


def parser() -> argparse.ArgumentParser:
    """The command-line parser."""
    made = argparse.ArgumentParser(
        prog="python -m distillers.evaluation.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--minutes", type=float, default=6.0, help="training budget of each method on each thread (%(default)s)"
    )
    made.add_argument("--threads", type=int, default=1, help="CPU threads of training and measuring (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="seed of every training (%(default)s)")
    made.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="train and measure only these; the others keep their results",
    )
    made.add_argument("--list", "--dry-run", action="store_true", help="list what would be done, and do nothing")
    made.add_argument("--table-only", action="store_true", help="write the document from what is finished")
    made.add_argument("--quick", action="store_true", help="measure only a small sample")
    made.add_argument(
        "--out", type=Path, default=Path("runs/leaderboard"), help="folder for the leaderboard's runs (%(default)s)"
    )
    made.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the document (%(default)s)")
    made.add_argument(
        "--cache", type=Path, default=default_root(), help="cache of what depends only on the base (%(default)s)"
    )
    made.add_argument("--base", default=DEFAULT_BASE, help="the teacher (%(default)s)")
    made.add_argument("--recipes", type=Path, default=RECIPES, help="folder with the recipes emoji_*.toml")
    made.add_argument(
        "--probe-seconds", type=float, default=PROBE_SECONDS, help="length of the timed run (%(default)s)"
    )
    made.add_argument(
        "--device",
        type=device_name,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to measure on (%(default)s)",
    )
    made.add_argument("--batch", type=int, default=64, help="images generated at a time when measuring (%(default)s)")
    return made


class Board:
    """The board in its folder: settings.json, teacher.json, and one folder per entry with its result.json."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console, self.work = options, console, options.out
        whole = protocol_.load()
        self.protocol = whole.quick() if options.quick else whole
        self.entries = entries.find(options.recipes, options.base)
        self.chosen = entries.chosen(self.entries, options.only)
        self.settings = self._settings()
        self.kept = self._kept()
        self._measurer: Measurer | None = None

    def _settings(self) -> Settings:
        """The settings that all rows have in common, from the options; they must match those the folder was begun with."""
        options = self.options
        wanted = Settings(
            minutes=options.minutes,
            by="clock" if torch.cuda.is_available() else "processor",
            threads=options.threads,
            seed=options.seed,
            base=options.base,
            base_sha256=digest_base(resolve_base(options.base)),
            protocol=self.protocol.digest,
            quick=options.quick,
            batch=options.batch,
        )
        known = read(Settings, self.work / "settings.json")
        if known is not None and known != wanted:
            old, new = known.model_dump(), wanted.model_dump()
            others = ", ".join(f"{key} {old[key]} (now {new[key]})" for key in old if old[key] != new[key])
            raise ValueError(
                f"{self.work} holds a leaderboard with other settings: {others}. Use those, or another --out"
            )
        return wanted

    def _kept(self) -> Kept | None:
        """The board kept in the documents' folder, if its figures are comparable with this board's."""
        known = read(Kept, self.options.docs / KEPT)
        return known if known is not None and known.settings == self.settings else None

    def run(self) -> int:
        """Trains, measures and writes; returns the exit status."""
        status = 0
        if not self.options.table_only:
            torch.set_num_threads(self.settings.threads)
            self.settings.write(self.work / "settings.json")
            for number, entry in enumerate(self.chosen, 1):
                self._say(f"{entry.name} ({number} of {len(self.chosen)})")
                try:
                    failure = self._finish(entry).failure
                except (Busy, Stale, ChildProcessError) as error:
                    failure = str(error)
                if failure:
                    self.console.print(Text(f"{entry.name}: {failure}", style="red"))
                    status = 1
                self.write()
        self.write()
        return status

    def _finish(self, entry: Entry) -> Result:
        """The entry's result, produced if it does not exist yet."""
        path = self._folder(entry) / "result.json"
        trainee = Trainee(entry, self._folder(entry), self.settings, self.work, self.options.probe_seconds)
        trainee.probe()  # raises Stale for files of another version of the recipe
        known = read(Result, path)
        if known is not None and known.failure is None:
            return known if known.control else self._with_control(known).write(path)
        about = {
            "name": entry.name,
            "method": entry.job.method,
            "student": entry.student,
            "recipe_sha256": entry.sha256,
        }
        with locked(self._folder(entry)) as lock:
            try:
                training = trainee.train(lock)
            except TrainingFailed as error:
                failed = Result(**about, failure=str(error), machine=machine(self.options.device))
                return failed.write(path)
            self._say(
                f"{entry.name}: {training.iterations} iterations in {training.seconds / 60:.1f} minutes; measuring"
            )
            measurer = self.measurer
            self.teacher(measure=True)  # first, since all others are compared with it
            rows = measurer.student(entry.student)
            done = Result(**about, training=training, rows=rows, machine=machine(self.options.device))
            return self._with_control(done).write(path)

    def _with_control(self, result: Result) -> Result:
        return result.model_copy(update={"control": self.measurer.control(result.student)})

    @property
    def measurer(self) -> Measurer:
        """Loaded on first use, so that training has all the memory until then."""
        if self._measurer is None:
            options = self.options
            self._measurer = Measurer(
                self.protocol,
                (self.chosen[0].job.family, options.base),
                self.work / "store",
                extractor(EfficientNetLite0.name, options.device),
                (options.cache, self.work / "evaluation"),
                self._track,
                device=options.device,
                batch=options.batch,
            )
        return self._measurer

    def teacher(self, *, measure: bool) -> Teacher | None:
        """The teacher's figures; None if they are not known and not to be measured."""
        path = self.work / "teacher.json"
        known = read(Teacher, path)
        if known is None and self.kept is not None and (self.options.only or not measure):
            known = self.kept.teacher
        if known is not None or not measure:
            return known
        return self.measurer.teacher().write(path)

    def results(self) -> list[Result]:
        """Results of all entries that have one for the current version of their recipe, whatever was selected."""
        return [known for entry in self.entries if (known := self._result(entry)) is not None]

    def _result(self, entry: Entry) -> Result | None:
        """The entry's result for this version of its recipe, from the board's folder or else as kept."""
        kept = [] if self.kept is None else [result for result in self.kept.results if result.name == entry.name]
        known = [read(Result, self._folder(entry) / "result.json"), *kept]
        return next((r for r in known if r is not None and r.recipe_sha256 == entry.sha256), None)

    def write(self) -> None:
        """Writes the document and the figure from the results so far."""
        teacher, results = self.teacher(measure=False), self.results()
        if teacher is None:
            self._say(f"nothing has been measured in {self.work} yet, so no document is written")
            return
        docs = self.options.docs
        figure.plot(docs / document.FIGURE, self.settings, teacher, results)
        there = {result.name for result in results}
        left_out = [(e.name, e.left_out or "not finished yet") for e in self.entries if e.name not in there]
        text = document.markdown(self.settings, self.protocol, teacher, results, left_out)
        (docs / "leaderboard.md").write_text(text, encoding="utf-8")
        Kept(settings=self.settings, teacher=teacher, results=results).write(docs / KEPT)
        self._say(f"{len(results)} methods: {docs / 'leaderboard.md'}")

    def listing(self) -> Table:
        """A table of what would be done."""
        table = Table("entry", "method", "state", title=f"{self.settings.minutes:g} minutes each, in {self.work}")
        for entry in self.entries:
            table.add_row(entry.name, entry.job.method, Text(self._state(entry)))
        return table

    def _state(self, entry: Entry) -> str:
        if entry.left_out is not None:
            return f"left out: {entry.left_out}"
        if entry not in self.chosen:
            return "not selected" if self._result(entry) is None else "not selected, keeps its result"
        folder = self._folder(entry)
        result = read(Result, folder / "result.json")
        if result is not None and result.recipe_sha256 != entry.sha256:
            return f"the recipe has changed since: delete {folder} to train it again"
        if result is not None:
            return f"failed, will be tried again: {result.failure}" if result.failure else "finished"
        if (folder / "training.json").is_file():
            return "trained, to be measured"
        return "started, will be continued" if (folder / COST).is_file() else "to be trained"

    def _folder(self, entry: Entry) -> Path:
        return self.work / entry.name

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _track(self, title: str, total: int) -> Callable[[int], None]:
        self._say(f"  {title}: {total}")
        return lambda count: None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
