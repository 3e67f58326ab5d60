"""Times training, method by method, and what of that time is not the network evaluations that the method asks for.

    python -m tests.benchmarks.bench_train [--only dmd2 ...] [--batch 32] [--iterations 20] [--threads N] [--cache DIR]

Every recipe emoji_*.toml is built as a job and driven by the trainer itself, in a process of its own. A first round of its
iterations counts what each evaluates, by kind (see `evaluations`). The second round times the very same iterations (their
random numbers follow from their numbers), and beside each, repeated bare, its evaluations and its optimizer steps (clipping,
step, average). Neighbours in time share the machine's mood; with one thread on a CPU their time is the processor's, which
other work takes little from. A method with phases is seen in its first one.

    evaluations    bare, an iteration's; their kinds and numbers stand beside
    updates        bare, an iteration's
    overhead       median of iteration / evaluations - 1: everything else, updates among it
    beside updates median of iteration / (evaluations + updates) - 1

Data is read from a cache of encoded captions and pictures, which the first run fills (minutes). Peak memory is the process's
largest resident memory over the first round; on a GPU what torch allocated there. Prints a table and writes JSON.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from distillers.data import Feed
from distillers.evaluation.watch import watched
from distillers.job import JobRun
from distillers.precision import fast_kernels
from distillers.spec import RECIPES, read_spec
from distillers.trainer import Trainer
from tests.benchmarks.bench_network import finish, machine
from tests.benchmarks.evaluations import Kind, Recorder, repeat
from weights.store import Store

PREFIX = "emoji_"
TARGET = 0.1
"""What an iteration may take beyond its evaluations, as a share of them."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method's figures; times are in milliseconds an iteration."""

    recipe: str
    method: str
    precision: str
    batch: int
    iterations: int
    by: str
    """Whose time it is: the processor's, with one thread on a CPU, or the clock's."""
    iteration: float
    """Mean, since iterations differ."""
    evaluations: float
    """Mean of the bare evaluations."""
    updates: float
    """Mean of the bare optimizer steps."""
    overhead: float
    """Median over iterations of iteration / evaluations - 1."""
    overhead_beside_updates: float
    """Median over iterations of iteration / (evaluations + updates) - 1."""
    peak_bytes: int
    counts: dict[str, float]
    """Evaluations an iteration, in batches, by network and kind."""

    @property
    def pictures_per_second(self) -> float:
        return 1000 * self.batch / self.iteration


def job(recipe: Path, base: str | None, batch: int, threads: int | None) -> dict[str, Any]:
    """The recipe at this batch size, from the base's own weights, without an end by the clock."""
    raw = read_spec(str(recipe))
    train = {**raw.get("train", {}), "batch_size": batch, "gradient_accumulation": 1}
    train |= {"max_minutes": None, "threads": threads}
    return {**raw, "train": train, "start": None, **({"base": base} if base else {})}


def names(trainer: Trainer, teacher: nn.Module) -> dict[nn.Module, str]:
    """The trained networks and the teacher, with all that is in them."""
    found = dict.fromkeys(teacher.modules(), "teacher")
    for name, network in trainer.networks.items():
        found |= dict.fromkeys(network.module.modules(), name)
    return found


class Bench:
    """One method at one batch size, ready to be timed."""

    def __init__(self, trainer: Trainer, teacher: nn.Module) -> None:
        self.trainer, self.device = trainer, trainer.accelerator.device
        self.recorder = Recorder(names(trainer, teacher))
        # A thread's work takes the processor as long on a busy machine as on an idle one, or nearly.
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        self.by: Literal["processor", "clock"] = "processor" if alone else "clock"
        self.passes: list[list[list[Kind]]] = []
        """Of every iteration, of every pass through a loss, what was evaluated."""

    def count(self, iterations: int) -> None:
        """Runs the iterations and records their evaluations; also what warms everything up."""
        with self.recorder.watching():
            for number in range(iterations):
                self._iterate(number)
                self.passes.append(self.recorder.taken())

    def pairs(self) -> list[tuple[float, float, float]]:
        """Milliseconds of each iteration, of its evaluations and of its updates, taken one after the other.

        Iteration and evaluations take turns at being first, so that neither gains where the machine gets slower or faster.
        """
        self._evaluate(self.passes[0])
        found = []
        for number, passes in enumerate(self.passes):
            calls = [partial(self._iterate, number), partial(self._evaluate, passes)]
            order = (0, 1) if number % 2 == 0 else (1, 0)
            taken = {which: self._time(calls[which]) for which in order}
            self._give_gradients()
            found.append((taken[0], taken[1], self._time(partial(self._update, number))))
            self._drop_gradients()
        return found

    def counts(self) -> dict[str, float]:
        """Evaluations an iteration in batches (a call of twice the rows is two), by network and kind."""
        batch, found = self.trainer.spec.batch_size, defaultdict[str, float](float)
        for passes in self.passes:
            for kind in (kind for kinds in passes for kind in kinds):
                found[f"{kind.network}: {kind.title}"] += kind.rows / batch
        return {name: round(count / len(self.passes), 3) for name, count in sorted(found.items())}

    def _iterate(self, number: int) -> None:
        self.trainer.iteration = number
        self.trainer._iterate()

    def _evaluate(self, passes: list[list[Kind]]) -> None:
        for kinds in passes:
            # One pass, one autocast: weights are converted once in it, as in training.
            with self.trainer.accelerator.autocast(), fast_kernels(self.device):
                for kind in kinds:
                    repeat(kind, self.recorder.examples[kind], self.device)

    def _update(self, number: int) -> None:
        """The optimizer steps of an iteration, as the trainer takes them."""
        for turn in self.trainer.method.turns(number):
            trained = [self.trainer.networks[name] for name in turn.trains]
            weights = [weight for network in trained for weight in network.weights.values()]
            self.trainer.accelerator.clip_grad_norm_(weights, self.trainer.spec.gradient_clip)
            for network in trained:
                network.optimizer.step()
                if network.average is not None:
                    network.average.update()

    def _give_gradients(self) -> None:
        """Some, to step on at a learning rate of 0: it costs the same and spoils nothing, and the trainer sets its own."""
        for network in self.trainer.networks.values():
            for group in network.optimizer.param_groups:
                group["lr"] = 0.0
            for weight in network.weights.values():
                weight.requires_grad_(True).grad = torch.full_like(weight, 1e-6)

    def _drop_gradients(self) -> None:
        for network in self.trainer.networks.values():
            network.optimizer.zero_grad(set_to_none=True)

    def _time(self, call: Callable[[], Any]) -> float:
        tell = time.process_time if self.by == "processor" else time.perf_counter
        finish(self.device)
        begun = tell()
        call()
        finish(self.device)
        return (tell() - begun) * 1000


def measure(recipe: Path, options: argparse.Namespace) -> Measured:
    """Builds the recipe's job and times it; to be called in a process of its own, for the sake of its memory."""
    raw = job(recipe, options.base, options.batch, options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        run = JobRun(raw, Path(temporary, "job"), Store(Path(temporary, "store")), cache=options.cache)
        with run.reporter:
            trainer = run._build(resume=False)
            assert isinstance(trainer.feed, Feed)
            bench = Bench(trainer, trainer.feed.base.network)
            bench.count(options.iterations)
            peak = peak_bytes(bench.device)
            pairs = bench.pairs()
    return Measured(
        recipe=recipe.stem.removeprefix(PREFIX),
        method=run.job.method,
        precision=run.precision,
        batch=options.batch,
        iterations=options.iterations,
        by=bench.by,
        iteration=statistics.mean(whole for whole, _, _ in pairs),
        evaluations=statistics.mean(bare for _, bare, _ in pairs),
        updates=statistics.mean(update for _, _, update in pairs),
        overhead=statistics.median(whole / bare - 1 for whole, bare, _ in pairs),
        overhead_beside_updates=statistics.median(whole / (bare + update) - 1 for whole, bare, update in pairs),
        peak_bytes=peak,
        counts=bench.counts(),
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: what torch allocated on the GPU, or the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(rows: list[Measured], title: str) -> Table:
    """The figures to look at."""
    made = Table("method", title=title, show_lines=True)
    headings = ("pictures/s", "ms an iteration", "evaluations", "updates", "overhead", "beside updates", "peak MiB")
    for heading in headings:
        made.add_column(heading, justify="right")
    made.add_column("evaluations an iteration, in batches")
    for row in rows:
        times = (f"{row.pictures_per_second:.1f}", *(f"{t:.0f}" for t in (row.iteration, row.evaluations, row.updates)))
        shares = [
            Text(f"{share:+.1%}", "green" if share <= TARGET else "red")
            for share in (row.overhead, row.overhead_beside_updates)
        ]
        counts = "\n".join(f"{count:g} {name}" for name, count in row.counts.items())
        made.add_row(row.recipe, *times, *shares, f"{row.peak_bytes / 2**20:.0f}", counts)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parser().parse_args(arguments)
    found = {
        path.stem.removeprefix(PREFIX): path
        for path in sorted(options.recipes.glob(f"{PREFIX}*.toml"))
        if "partition" not in read_spec(str(path))  # several students' iterations are their method's
    }
    wanted = [name.removeprefix(PREFIX) for name in options.only] or list(found)
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        print(f"nothing to time: {options.recipes} has no {', '.join(unknown) or PREFIX + '*.toml'}", file=sys.stderr)
        return 2
    if options.worker is not None:
        options.worker.write_text(json.dumps(asdict(measure(found[wanted[0]], options))))
        return 0
    rows, failed = [], []
    for name in wanted:
        print(f"{name} ...", file=sys.stderr)
        row = in_own_process(name, options)
        rows += [row] if row is not None else []
        failed += [name] if row is None else []
    facts = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts["threads"] = options.threads or facts["threads"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = [{**asdict(row), "pictures_per_second": row.pictures_per_second} for row in rows]
    options.out.write_text(json.dumps({"machine": facts, "methods": report, "failed": failed}, indent=2) + "\n")
    on = f"{facts['device']}, {facts['threads']} threads"
    by = ", ".join(sorted({f"time by the {row.by}" for row in rows}))
    title = f"training at batch {options.batch}, {on}; {by} (overhead: {TARGET:.0%} or less)"
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows, title))
    print(f"written to {options.out}")
    return 1 if failed else 0


def in_own_process(name: str, options: argparse.Namespace) -> Measured | None:
    """One method's figures; None, and the end of its output, where it failed."""
    with tempfile.TemporaryDirectory() as temporary:
        result, log = Path(temporary, "result.json"), Path(temporary, "log")
        command = [sys.executable, "-m", "tests.benchmarks.bench_train", "--worker", str(result), "--only", name]
        command += ["--recipes", str(options.recipes), "--cache", str(options.cache), "--batch", str(options.batch)]
        command += ["--iterations", str(options.iterations)]
        command += [] if options.threads is None else ["--threads", str(options.threads)]
        command += [] if options.base is None else ["--base", options.base]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        ended = watched(command, Path(temporary, "report.json"), log, environment=environment)
        if ended.status != 0:
            print(f"{name} failed:\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
            return None
        return Measured(**json.loads(result.read_text()))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--only", nargs="+", default=[], metavar="NAME", help="time these recipes alone")
    made.add_argument("--recipes", type=Path, default=RECIPES, help="folder of recipes emoji_*.toml")
    made.add_argument("--base", help="train students of another base than the recipes'")
    made.add_argument("--batch", type=int, default=32, help="pictures (%(default)s)")
    made.add_argument("--iterations", type=int, default=20, help="to count, and to time (%(default)s)")
    made.add_argument("--threads", type=int, help="CPU threads; torch's choice when left out")
    made.add_argument("--cache", type=Path, default=Path("runs/cache"), help="folder of encoded data (%(default)s)")
    made.add_argument("--out", type=Path, default=Path("runs/bench-train.json"))
    made.add_argument(
        "--worker", type=Path, help=argparse.SUPPRESS
    )  # where the process of one method writes its figures
    return made


if __name__ == "__main__":
    sys.exit(main())
