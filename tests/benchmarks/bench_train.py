"""Times training, method by method, and what of that time is not the network evaluations that the method asks for.

    python -m tests.benchmarks.bench_train [--only dmd2 ...] [--batch 32] [--iterations 20] [--threads N] [--cache DIR]

Every recipe emoji_*.toml is built as a job and driven by the trainer itself, in a process of its own. A first round of its
iterations counts what each evaluates, by kind (see `evaluations`). The second round times the very same iterations (their
random numbers follow from their numbers), and beside each its evaluations, and its optimizer steps, repeated bare
(clipping, step, average). So three figures come from pairs that share the machine's mood:

    evaluations    the median over iterations of bare evaluations / iteration
    updates        the same of bare optimizer steps
    overhead       iteration / bare evaluations - 1: everything else, updates among it; "beside updates" leaves them out

Data is read from a cache of encoded captions and pictures, which the first run fills (minutes). Peak memory is the process's
largest resident memory over the first round; on a GPU what torch allocated there. Prints a table and writes JSON.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillers.precision import fast_kernels
from distillers.spec import read_spec
from distillers.trainer import Trainer
from tests.benchmarks.bench_network import _finish as finish
from tests.benchmarks.evaluations import Kind, Recorder, repeat

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


def job(recipe: Path, base: str | None, batch: int, threads: int | None, iterations: int) -> dict[str, Any]:
    """The recipe at this batch size, from the base's own weights, without an end by the clock."""
    raw = read_spec(str(recipe))
    train = {**raw.get("train", {}), "iterations": iterations, "batch_size": batch, "gradient_accumulation": 1}
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

        Which comes first alternates, so that neither gains where the machine gets slower or faster.
        """
        self._evaluate(self.passes[0])
        found = []
        for number, passes in enumerate(self.passes):
            calls = [
                lambda number=number: self._iterate(number),
                lambda passes=passes: self._evaluate(passes),
                lambda number=number: self._update(number),
            ]
            order = (0, 1, 2) if number % 2 == 0 else (1, 2, 0)
            taken = {which: self._time(calls[which]) for which in order}
            found.append((taken[0], taken[1], taken[2]))
        return found

    def counts(self) -> dict[str, float]:
        """Evaluations an iteration in batches (a call of twice the rows is two), by network and kind."""
        batch, found = self.trainer.feed.batch_size, Counter[str]()  # type: ignore[attr-defined]
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
        """Gradients of ones are made outside of the time that is taken (see `_time`)."""
        for turn in self.trainer.method.turns(number):
            trained = [self.trainer.networks[name] for name in turn.trains]
            weights = [weight for network in trained for weight in network.weights.values()]
            self.trainer.accelerator.clip_grad_norm_(weights, self.trainer.spec.gradient_clip)
            for network in trained:
                network.optimizer.step()
                if network.average is not None:
                    network.average.update()

    def _give_gradients(self) -> None:
        for network in self.trainer.networks.values():
            for weight in network.weights.values():
                weight.requires_grad_(True)
                weight.grad = torch.full_like(weight, 1e-6)

    def _time(self, call: Callable[[], Any]) -> float:
        finish(self.device)
        begun = time.perf_counter()
        call()
        finish(self.device)
        return (time.perf_counter() - begun) * 1000
