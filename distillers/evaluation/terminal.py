"""Terminal code shared by the evaluation commands: progress bars and common options."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distillers.evaluation.cache import default_root
from distillers.evaluation.measure import Track
from distillers.precision import device_name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the common options."""
    parser.add_argument("--base", help="bundled base, pipeline folder or hub id; the students' own if left out")
    parser.add_argument(
        "--store",
        type=Path,
        help="the model store's folder; if left out, with `fewstep` FEWSTEP_STORE's, and otherwise only bundled students",
    )
    parser.add_argument(
        "--cache", type=Path, default=default_root(), help="cache of what depends only on the base (%(default)s)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of images and captions, in the format of training data (the bundled emoji if left out): captions with "
        '"split": "held_out" are the prompts, and the other images are the real ones',
    )
    parser.add_argument(
        "--device",
        type=device_name,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device that generates and measures: cpu, cuda or cuda:N (%(default)s)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if left out")
    parser.add_argument("--batch", type=int, default=64, help="images generated at a time (%(default)s)")


def check_batch(batch: int) -> None:
    """Checks the batch size.

    Raises:
        ValueError: it is below 1.
    """
    if batch < 1:
        raise ValueError(f"--batch {batch}: give at least 1")


def make_console() -> Console:
    """A console on standard output; a file or pipe gets a fixed width of 160, since it has none."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


@contextmanager
def tracking(console: Console) -> Iterator[Track]:
    """Progress of one stage at a time: a bar on a terminal, one line per stage in a log."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def track(title: str, total: int) -> Callable[[int], None]:
            if not console.is_terminal:
                console.print(f"{title}: {total}", markup=False, highlight=False)
            for done in progress.task_ids:  # dozens of stages would fill the screen
                progress.remove_task(done)
            task = progress.add_task(title, total=total)
            return lambda count: progress.update(task, advance=count)

        yield track
