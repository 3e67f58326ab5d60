"""Compares serving: this server, two common ways to serve a diffusers pipeline, and the networks' bare calls.

    python -m tests.benchmarks.bench_serve [--seconds 20] [--rounds 3] [--clients 16] [--out runs/bench-serve.json]

All servers are started first, with as many threads each; then they are measured one at a time, every round in another
order, with the same requests: at saturation (a closed loop), under Poisson arrivals at shares of the first baseline's
saturation, and with one request at a time beside the bare calls in this process. Ratios are taken within a round, and
their medians over the rounds are what the bars are about: a machine that is busy with other things slows both sides.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from distillers.evaluation.subjects import counted
from tests.benchmarks.bench_network import machine
from tests.benchmarks.bench_serve.bare import Bare
from tests.benchmarks.bench_serve.load import Failed, Saturation, arrive, connection_to, nothing, one_by_one, saturate
from tests.benchmarks.bench_serve.report import Alone, Loaded, Round, bars, bars_table, servers_table
from tests.benchmarks.bench_serve.servers import Setup, our_settings, start_all
from tests.benchmarks.bench_serve.traffic import Ask, Mixture, poisson, prompt

SHARE = 0.7
"""Of the lock's saturation: the load that the bar on latency is about."""
REST = 0.2
"""Seconds before what is timed alone: the threads of whoever worked last may spin for a while before they sleep."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, default=Path("runs/bench-serve.json"))
    made.add_argument("--seconds", type=float, default=20.0, help="of each measurement (%(default)s)")
    made.add_argument("--settle", type=float, default=5.0, help="seconds of load before it counts (%(default)s)")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--clients", type=int, default=16, help="at saturation (%(default)s)")
    made.add_argument("--shares", type=float, nargs="+", default=[0.4, SHARE, 0.9], help="of the lock's saturation")
    made.add_argument("--alone", type=int, default=20, help="requests of each kind, one at a time (%(default)s)")
    made.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    made.add_argument("--pictures", type=int, default=4, help="a request's n is 1 to this (%(default)s)")
    made.add_argument("--guided", type=float, default=0.25, help="share of guided requests (%(default)s)")
    made.add_argument("--guidance", type=float, default=1.5, help="their scale (%(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--base", default="emoji-base")
    made.add_argument("--student", default="emoji-average")
    made.add_argument("--store", type=Path, help="folder of the student; the bundled ones need none")
    made.add_argument("--device", default="auto")
    made.add_argument("--threads", type=int, help="CPU threads of each server; torch's choice when left out")
    made.add_argument("--window", type=float, default=0.05, help="seconds, of the second baseline (%(default)s)")
    made.add_argument("--most", type=int, default=8, help="pictures of one of its calls (%(default)s)")
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of this server")
    made.add_argument("--strict", action="store_true", help="end with status 1 where a bar is missed")
    return made


class Comparison:
    """The measurements of one run."""

    def __init__(self, options: argparse.Namespace, urls: dict[str, str], bare: Bare) -> None:
        self.options = options
        self.urls = urls
        self.bare = bare
        self.mixture = Mixture(
            steps=tuple(options.steps),
            most_pictures=options.pictures,
            guided=options.guided,
            guidance_scale=options.guidance,
        )
        self.locked: list[Saturation] = []

    async def round(self, number: int) -> Round:
        """Everything once."""
        order = list(self.urls)
        order = order[number % len(order) :] + order[: number % len(order)]
        seed = self.options.seed + 1000 * number
        saturations = {name: await self.saturation(name, seed) for name in order}
        self.locked.append(saturations["lock"])
        rate = statistics.median(each.requests_per_second for each in self.locked)
        shares = sorted({*self.options.shares, SHARE})
        loaded = [await self.loaded(name, share, rate, seed) for share in shares for name in order]
        images = {name: each.images_per_second for name, each in saturations.items()}
        kinds, answer = self.alone(seed)
        return Round(images_per_second=images, loaded=loaded, alone=kinds, answer=answer)

    async def saturation(self, name: str, seed: int) -> Saturation:
        """One server under more than it can do."""
        asks, options = self.mixture.asks(seed), self.options
        found = await saturate(self.urls[name], options.student, asks, options.clients, options.seconds, options.settle)
        say(f"{name} at saturation: {found.images_per_second:.2f} images/s")
        if not found.images_per_second:
            raise Failed(f"{name} drew nothing in {options.seconds:g} s: measure for longer (--seconds)")
        return found

    async def loaded(self, name: str, share: float, rate: float, seed: int) -> Loaded:
        """One server under arrivals at a share of the lock's saturation; the same ones for every server."""
        times = poisson(share * rate, self.options.seconds, seed)
        schedule = list(zip(times, itertools.islice(self.mixture.asks(seed + 1), len(times)), strict=True))
        if not schedule:
            raise Failed(f"nobody arrives in {self.options.seconds:g} s at {share * rate:.3f}/s: measure for longer")
        found = await arrive(self.urls[name], self.options.student, schedule)
        say(f"{name} at {share:.0%}: p95 {found.at(0.95):.2f} s of {len(times)} requests")
        return Loaded(
            server=name, share=share, p50=found.at(0.5), p95=found.at(0.95), requests=len(times), refused=found.refused
        )

    def alone(self, seed: int) -> tuple[dict[str, Alone], float]:
        """This server by kind of request: one over HTTP, then the same bare, and again; and an answer that draws nothing."""
        found, chance, answers = {}, random.Random(seed), list[float]()
        with connection_to(self.urls["ours"]) as connection:
            for steps, n in itertools.product(self.options.steps, sorted({1, self.options.pictures})):
                pairs = []
                for number in range(self.options.alone + 1):
                    one = Ask(prompt=prompt(chance), seed=number, steps=steps, n=n, guidance_scale=1.0)
                    time.sleep(REST)
                    answer = one_by_one(connection, self.options.student, one)
                    time.sleep(REST)
                    pairs.append((answer, self.bare.seconds(one)))
                    time.sleep(REST)
                    answers.append(nothing(connection))
                found[f"{counted(steps, 'step')}, {counted(n, 'picture')}"] = Alone.of(pairs[1:])  # the first warms up
        say("alone: " + ", ".join(f"{kind} {each.overhead:+.1%}" for kind, each in found.items()))
        return found, statistics.median(answers)


def say(line: str) -> None:
    """Progress: a run takes minutes."""
    print(line, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> Sequence[Round]:
    """Start everything, and measure it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        setup = Setup(
            base=options.base,
            student=options.student,
            store=options.store or folder / "store",
            device=options.device,
            threads=options.threads,
            window=options.window,
            most=options.most,
            steps=tuple(options.steps),
            settings=tuple(options.set),
        )
        with start_all(setup, folder) as urls:
            comparison = Comparison(options, urls, Bare.load(our_settings(setup, folder), setup.student))

            async def all_rounds() -> list[Round]:
                return [await comparison.round(number) for number in range(options.rounds)]

            return asyncio.run(all_rounds())


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parser().parse_args(arguments)
    rounds = measure(options)
    found = bars(rounds, SHARE)
    facts = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report = {
        "machine": facts,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "bars": [{**asdict(bar), "holds": bar.holds} for bar in found],
        "rounds": [asdict(each) for each in rounds],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 140)
    threads = "" if options.threads is None else f", {counted(options.threads, 'thread')}"
    title = f"serving {options.student}, {facts['device']}{threads}, {counted(options.clients, 'client')}"
    console.print(servers_table(rounds, title))
    console.print(bars_table(found, rounds))
    print(f"written to {options.out}")
    return 1 if options.strict and not all(bar.holds for bar in found) else 0


if __name__ == "__main__":
    sys.exit(main())
