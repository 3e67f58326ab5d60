"""What a DMD2 job holds in memory, by what is trained: every weight, adapters, or adapters on one shared base.

    python -m tests.benchmarks.bench_memory [--base emoji-base] [--batch 4] [--rank 64] [--out runs/bench-memory.json]

Each mode trains some iterations in a process of its own. Weights, gradients, optimizer moments and averages are counted
exactly, what is shared counting once; the peak is measured during the iterations and has the activations in it. On a GPU
it is torch's peak allocation, on the CPU the peak resident memory above what the libraries took before anything was loaded.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft  # noqa: F401 (loaded before memory is measured)
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distillers.job import JobRun
from distillers.trainer import Trainer
from tests.benchmarks.bench_network import machine
from weights.bundled import resolve_base
from weights.families import families
from weights.store import Store

ROOT = Path(__file__).resolve().parents[2]
MODES = {"full": None, "lora": False, "lean": True}
"""What is trained: every weight, or adapters (student's and fake score's), with `LoraSpec.shared_base` off or on."""
STEADY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc gives every freed tensor's memory back at once, so that what is resident is what is in use."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one mode."""

    mode: str
    trained: int
    """Number of trained parameters; all else is in bytes."""
    weights: int
    """Of teacher, student, fake score and discriminator."""
    gradients: int
    """Of the turn that trains the most."""
    moments: int
    averages: int
    encoders: int
    """Text encoder and autoencoder."""
    peak: int | None
    """While iterating; None where it cannot be measured."""

    @property
    def counted(self) -> int:
        """All but activations."""
        return self.weights + self.gradients + self.moments + self.averages + self.encoders


def spec(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """The mode's job: one step, so that every iteration costs the same, with both turns in each."""
    shared = MODES[mode]
    adapters = {} if shared is None else {"lora": {"rank": options.rank, "shared_base": shared}}
    return {
        "student": "bench",
        "method": "dmd2",
        "base": options.base,
        "family": options.family,
        "data": {"source": options.data},
        "train": {
            "iterations": options.iterations,
            "batch_size": options.batch,
            "precision": options.precision,
            "threads": options.threads,
        },
        "config": {"schedules": {1: {"timesteps": [1.0]}}, "student_every": 1, "fake_score_lora": shared is not None},
        **adapters,
    }


def measure(mode: str, options: argparse.Namespace) -> Memory:
    """Trains in this process and counts."""
    families()  # imports diffusers and transformers
    before = _resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        run = JobRun(spec(mode, options), Path(folder), Store(Path(folder) / "store"))
        with run.reporter:
            trainer = run._build(resume=False)
            _forget_peak(run.accelerator.device)
            for _ in range(options.iterations):
                trainer._iterate()
                trainer.iteration += 1
            return Memory(mode=mode, peak=_peak(run.accelerator.device, before), **count(trainer))


def count(trainer: Trainer) -> dict[str, int]:
    """Everything of a trainer's that lasts longer than a step, but for the peak."""
    base = trainer.feed.base  # type: ignore[attr-defined]
    networks = trainer.networks.values()
    modules = [base.network, *(network.module for network in networks)]
    encoders = [module for module in base.components().values() if module is not base.network]
    averages = [list(network.average.values.values()) for network in networks if network.average is not None]
    turns = trainer.method.turns(0)
    return {
        "trained": sum(weight.numel() for network in networks for weight in network.weights.values()),
        "weights": size(tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()),
        "gradients": max(
            size(weight for name in turn.trains for weight in trainer.networks[name].weights.values()) for turn in turns
        ),
        "moments": size(
            value
            for network in networks
            for moments in network.optimizer.state.values()
            for value in moments.values()
            if isinstance(value, Tensor)
        ),
        "averages": size([*(value for values in averages for value in values), *trainer.method.state().values()]),
        "encoders": size(tensor for module in encoders for tensor in module.state_dict(keep_vars=True).values()),
    }


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory under these tensors; what several of them share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _resident(field: str) -> int | None:
    """VmRSS (bytes resident now) or VmHWM (the most so far); None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _forget_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): VmHWM starts anew


def _peak(device: torch.device, before: int | None) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    highest = _resident("VmHWM")
    return None if highest is None or before is None else highest - before


def measured_apart(mode: str, arguments: list[str]) -> Memory:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_memory", *arguments, "--measure", mode]
    environment = {**os.environ, **STEADY, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[Memory], title: str) -> Table:
    """The figures to look at, in megabytes."""
    made = Table("mode", title=title)
    for heading in ("trained", "weights", "gradients", "moments", "averages", "encoders", "together", "peak"):
        made.add_column(heading, justify="right")
    for row in rows:
        figures = (row.weights, row.gradients, row.moments, row.averages, row.encoders, row.counted)
        shown = [f"{figure / 1e6:,.1f}" for figure in figures]
        made.add_row(row.mode, f"{row.trained:,}", *shown, "-" if row.peak is None else f"{row.peak / 1e6:,.1f}")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emoji-base", help="bundled base, pipeline folder or hub id (%(default)s)")
    parser.add_argument("--family", default="auto")
    parser.add_argument("--data", default="emoji", help="'emoji', or a folder with pictures; scaled to the base's size")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-memory.json"))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice when left out")
    parser.add_argument("--measure", choices=list(MODES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure is not None:
        print(json.dumps(asdict(measure(options.measure, options))))
        return 0
    try:
        resolve_base(options.base)
        rows = [measured_apart(mode, arguments) for mode in options.modes]
    except FileNotFoundError as error:
        print(f"nothing to measure: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"a job ended with status {error.returncode}; --modes leaves out what does not fit", file=sys.stderr)
        return 2
    facts = {name: getattr(options, name) for name in ("base", "batch", "rank", "precision")}
    facts |= machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = [{**asdict(row), "together": row.counted} for row in rows]
    options.out.write_text(json.dumps({"machine": facts, "bytes": written}, indent=2) + "\n")
    title = f"{options.base}, batch {options.batch}, rank {options.rank}, precision {options.precision}; megabytes"
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows, title))
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
