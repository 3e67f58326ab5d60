"""Reporting of a job: JSON lines on standard output and in events.jsonl, TensorBoard scalars, a progress bar."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from weights.events import AnyEvent, Failed, Finished, Saved, Started
from weights.events import Progress as ProgressEvent


def now() -> datetime:
    return datetime.now(UTC)


class Reporter:
    """Reports of one job. With ``main=False`` (the other processes of a distributed job), nothing is written."""

    def __init__(self, folder: Path, *, main: bool = True) -> None:
        """
        Args:
            folder: the job's folder; events are appended to its events.jsonl.
            main: whether this process is the one that reports.
        """
        self.folder = folder
        self.main = main
        self.on_terminal = main and sys.stdout.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._board: SummaryWriter | None = None
        self._told: tuple[str, int] | None = None  # what was last reported as being prepared, and its percentage

    def __enter__(self) -> Self:
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.on_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()

    def board(self, purge_step: int | None = None) -> SummaryWriter:
        """The TensorBoard writer, for the folder tensorboard/; steps from ``purge_step`` on are overwritten."""
        if self._board is None:
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step)
        return self._board

    def resumed(self, step: int) -> None:
        """Called before anything else when a job goes on after this step: TensorBoard forgets what was beyond it."""
        if self.main:
            self.board(purge_step=step + 1)

    def emit(self, event: AnyEvent) -> None:
        """Writes an event to the file, and to standard output or the progress bar."""
        if not self.main:
            return
        self.append(event)
        if not self.on_terminal:
            print(event.model_dump_json(), flush=True)
            return
        match event:
            case ProgressEvent():
                note = "  ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in event.metrics.items())
                self.tick("training", event.step, event.iterations, note[:80])
            case Saved():
                self._print(f"{event.kind} {event.path}")
            case Started():
                self.tick("training", event.step, event.iterations)
            case Finished():
                self._print(f"published {event.student} after {event.seconds:.0f} s")
            case Failed():
                self._print(f"[red]failed:[/red] {escape(event.message)}")

    def append(self, event: AnyEvent) -> None:
        """Writes the event's line to the file, after ending one that a full disk or a kill has cut short."""
        with (self.folder / "events.jsonl").open("ab+") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - 1))
            cut = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * cut + event.model_dump_json().encode() + b"\n")

    def tick(self, what: str, done: int, total: int, note: str = "") -> None:
        """Updates the progress bar, if there is one."""
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task(what, total=total, note=note)
        self._bar.update(self._task, description=what, completed=done, total=total, note=note)

    def preparing(self, what: str, done: int, total: int, *, step: int, iterations: int) -> None:
        """Reports progress before the first iteration: updates the bar, and emits an event for every percent.

        Args:
            what: is being prepared, such as "encoding captions"; the event's metric is ``preparation/`` plus this, in
                [0, 1].
            done: number of items done.
            total: number of items.
            step: the iteration that training will continue from, as far as known.
            iterations: of the whole job.
        """
        news = (what, 100 * done // total)
        if news != self._told:
            self._told = news
            share = {f"preparation/{what}": done / total}
            self.emit(ProgressEvent(at=now(), step=step, iterations=iterations, metrics=share))
        self.tick(what, done, total)  # after the event, whose update of the bar shows less

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        """Writes TensorBoard scalars."""
        if self.main:
            for name, value in metrics.items():
                self.board().add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """Writes a TensorBoard image, ``(3, H, W)`` uint8."""
        if self.main:
            self.board().add_image(name, picture, step)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
