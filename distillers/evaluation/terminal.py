"""What the evaluation's commands share on a terminal: progress, and the options that say where and how to work."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distillers.evaluation.cache import default_root
from distillers.evaluation.measure import Track


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options for the work itself."""
    parser.add_argument("--base", help="bundled base, pipeline folder or hub id; the students' own when left out")
    parser.add_argument("--store", type=Path, help="the model store's folder; only bundled students when left out")
    parser.add_argument(
        "--cache", type=Path, default=default_root(), help="folder of what belongs to bases (%(default)s)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of pictures and captions as training reads it (the bundled emoji when left out): captions with "
        '"split": "held_out" are asked for, and the other pictures are the real set',
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice when left out")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at a time (%(default)s)")


def check_batch(batch: int) -> None:
    """Refuse batches of nothing.

    Raises:
        ValueError: it is below 1.
    """
    if batch < 1:
        raise ValueError(f"--batch {batch}: want at least 1 picture at a time")


def make_console() -> Console:
    """Standard output; a file or a pipe has no width to keep to."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


@contextmanager
def tracking(console: Console) -> Iterator[Track]:
    """Progress of one stage at a time: a bar on a terminal, a line a stage in a log."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def track(title: str, total: int) -> Callable[[int], None]:
            if not console.is_terminal:
                console.print(f"{title}: {total}", markup=False, highlight=False)
            for done in progress.task_ids:  # there are dozens of stages
                progress.remove_task(done)
            task = progress.add_task(title, total=total)
            return lambda count: progress.update(task, advance=count)

        yield track
