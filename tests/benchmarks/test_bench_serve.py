"""The serving benchmark's parts do what they say; what they measure is nobody's promise."""

import asyncio
import io
import itertools
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Response
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from tests.benchmarks.bench_serve import __main__ as command
from tests.benchmarks.bench_serve.bare import Bare
from tests.benchmarks.bench_serve.baselines import Body, Key, Locked, Pipelines, Windowed, make_app
from tests.benchmarks.bench_serve.load import Failed, Latencies, arrive, saturate
from tests.benchmarks.bench_serve.report import Alone, Loaded, Round, alone, bars, bars_table, servers_table
from tests.benchmarks.bench_serve.servers import Setup, our_settings, write_exports
from tests.benchmarks.bench_serve.traffic import Ask, Mixture, percentile, poisson
from tests.service.conftest import SCHEDULES, TinyBase
from tests.service.live import serving
from weights.denoiser import cond_repeat
from weights.drawing import draw
from weights.families import load
from weights.store import Store
from weights.students import load_student


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A tiny base and a student of it."""
    from tests.helpers import tiny_pipeline

    folder = tmp_path_factory.mktemp("bench")
    base = TinyBase(tiny_pipeline(folder / "base"), load("stable_diffusion", folder / "base"))
    base.publish(Store(folder / "store"), folder / "work")
    return Setup(
        base=base.id,
        student="tiny",
        store=folder / "store",
        device="cpu",
        threads=1,
        window=0.05,
        most=8,
        steps=(1, 2, 4),
        settings=("QUEUE_SECONDS=5", "THREADS=2"),
    )


# What is asked, and when


def test_arrivals_have_no_memory() -> None:
    times = poisson(rate=50, seconds=200, seed=1)
    assert times == poisson(rate=50, seconds=200, seed=1) != poisson(rate=50, seconds=200, seed=2)
    assert times == sorted(times) and times[0] >= 0 and times[-1] < 200
    waits = np.diff(times)
    assert len(times) == pytest.approx(50 * 200, rel=0.03)
    assert waits.std() / waits.mean() == pytest.approx(1, rel=0.05), (
        "exponential waits scatter as widely as they are long"
    )
    assert (waits < math.log(2) / 50).mean() == pytest.approx(0.5, abs=0.02)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    below = sum(value <= found for value in values)
    assert found in values
    assert below >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values)


def test_known_percentiles() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.95, 1)] == [50, 95, 100]
    assert percentile([3.0], 0.01) == 3
    for values, share in (([], 0.5), ([1.0], 0.0), ([1.0], 1.1)):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, share)


def test_a_refusal_is_worse_than_any_wait() -> None:
    found = Latencies(seconds=[1.0] * 18, refused=2)
    assert (found.at(0.9), found.at(0.95)) == (1.0, math.inf)


def test_every_server_is_asked_the_same() -> None:
    mixture = Mixture(steps=(1, 2, 4), most_pictures=4, guided=0.25, guidance_scale=1.5)
    first, again, other = (list(itertools.islice(mixture.asks(seed), 2000)) for seed in (1, 1, 2))
    assert first == again != other
    assert {(each.steps, each.n) for each in first} == set(itertools.product((1, 2, 4), (1, 2, 3, 4)))
    assert sum(each.guidance_scale == 1.5 for each in first) / 2000 == pytest.approx(0.25, abs=0.03)
    assert {each.guidance_scale for each in first} == {1.0, 1.5}
    assert len({each.prompt for each in first}) == 2000, "no server gets by with prompts that it has encoded before"


# The load


class Counting:
    """A server that tells what it is asked for; the first answers wait until so many are being asked for at once."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.most_at_once = 0
        self.status = 200
        self.short = 0
        """Pictures that are missing from each answer."""
        self.wants_at_once = 1
        self._now = 0
        self.app = FastAPI()
        self.app.add_api_route("/health/ready", self._ready)
        self.app.add_api_route("/v1/images/generations", self._draw, methods=["POST"])

    async def _ready(self) -> None:
        """At once."""

    async def _draw(self, body: dict[str, Any]) -> Any:
        self.asked.append(body)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        while self.most_at_once < self.wants_at_once:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.005)
        self._now -= 1
        if self.status != 200:
            return Response(status_code=self.status)
        return {"data": [{"b64_json": ""}] * (body["n"] - self.short)}


@pytest.fixture
def counting() -> Iterator[tuple[str, Counting]]:
    server = Counting()
    with serving(server.app) as url:
        yield url, server


def test_a_closed_loop_keeps_every_client_busy(counting: tuple[str, Counting]) -> None:
    url, server = counting
    server.wants_at_once = 5
    found = asyncio.run(saturate(url, "tiny", Mixture().asks(1), clients=5, seconds=0.4, settle=0.1))
    assert server.most_at_once == 5
    asked = {Ask(**{name: body[name] for name in Ask.__dataclass_fields__}) for body in server.asked}
    assert asked == set(itertools.islice(Mixture().asks(1), len(server.asked)))
    counted, all_of_them = found.images_per_second * 0.4, sum(each.n for each in asked)
    assert 0 < counted < all_of_them, "what comes before the measured time, and after, is not counted"
    assert found.requests_per_second < found.images_per_second


def test_an_open_loop_waits_for_nobody(counting: tuple[str, Counting]) -> None:
    url, server = counting
    server.wants_at_once = 30
    asks = list(itertools.islice(Mixture().asks(1), 30))
    found = asyncio.run(arrive(url, "tiny", [(0.0, one) for one in asks]))
    assert (len(found.seconds), found.refused, len(server.asked)) == (30, 0, 30)
    server.status = 429
    refused = asyncio.run(arrive(url, "tiny", [(0.0, one) for one in asks]))
    assert (refused.seconds, refused.refused) == ([], 30)


def test_a_server_that_draws_too_little_is_found_out(counting: tuple[str, Counting]) -> None:
    url, server = counting
    schedule = [(0.0, next(Mixture().asks(1)))]
    for server.status, server.short in ((200, 1), (500, 0)):
        with pytest.raises(ExceptionGroup) as caught:
            asyncio.run(arrive(url, "tiny", schedule))
        assert caught.group_contains(Failed)


# The baselines


class Calls:
    """In place of a pipeline: notes its calls, and whether two were ever made at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[Key, list[str], list[int]]] = []
        self.fails = False
        self._one = threading.Lock()

    def __call__(self, key: Key, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        assert self._one.acquire(blocking=False), "two calls at once"
        try:
            self.calls.append((key, list(prompts), list(seeds)))
            time.sleep(0.002)
            if self.fails:
                raise RuntimeError("out of memory")
            return [Image.new("RGB", (1, 1), (seed, 0, 0)) for seed in seeds]
        finally:
            self._one.release()


def body(seed: int, n: int = 1, steps: int = 4, guidance_scale: float = 1.0) -> Body:
    return Body(prompt=f"prompt {seed}", seed=seed, n=n, steps=steps, guidance_scale=guidance_scale)


def seeds_of(images: list[Image.Image]) -> list[Any]:
    return [image.getpixel((0, 0))[0] for image in images]  # type: ignore[index]


def test_behind_a_lock_one_is_drawn_after_another() -> None:
    calls = Calls()

    async def scenario() -> None:
        locked = Locked(calls)
        drawn = await asyncio.gather(*(locked.draw(body(10 * number, n=2)) for number in range(4)))
        assert [seeds_of(images) for images in drawn] == [[0, 1], [10, 11], [20, 21], [30, 31]]

    asyncio.run(scenario())
    assert [len(seeds) for _, _, seeds in calls.calls] == [2] * 4


def windowed(calls: Calls, window: float, bodies: list[Body], most: int = 8) -> list[Any]:
    async def scenario() -> list[Any]:
        server = Windowed(calls, window, most)
        work = asyncio.create_task(server.work())
        try:
            drawing = asyncio.gather(*(server.draw(each) for each in bodies), return_exceptions=True)
            return list(await asyncio.wait_for(drawing, 20))
        finally:
            work.cancel()

    return asyncio.run(scenario())


def test_in_a_window_those_who_agree_are_drawn_together() -> None:
    calls = Calls()
    bodies = [body(0), body(10, n=2), body(20, steps=2), body(30, guidance_scale=1.5), body(40, n=3), body(50, steps=2)]
    drawn = windowed(calls, 0.1, bodies)
    assert [seeds_of(images) for images in drawn] == [[0], [10, 11], [20], [30], [40, 41, 42], [50]]
    assert [(key, seeds) for key, _, seeds in calls.calls] == [
        ((4, 1.0), [0, 10, 11, 40, 41, 42]),
        ((2, 1.0), [20, 50]),
        ((4, 1.5), [30]),
    ]
    assert calls.calls[1][1] == ["prompt 20", "prompt 50"]


def test_a_full_call_waits_for_no_window() -> None:
    """The window is longer than this test may take; a last request that does not fill a call would wait for it."""
    calls = Calls()
    windowed(calls, 1000.0, [body(number, n=2) for number in range(0, 80, 10)])
    assert [len(seeds) for _, _, seeds in calls.calls] == [8, 8]
    calls = Calls()
    windowed(calls, 1000.0, [body(0, n=3), body(10, n=3), body(20, n=4), body(30, n=4)])
    assert [len(seeds) for _, _, seeds in calls.calls] == [6, 8], "no request is taken apart"


def test_a_call_that_fails_is_everybodys_in_it_and_the_next_one_is_made() -> None:
    calls = Calls()
    calls.fails = True
    failed = windowed(calls, 0.01, [body(0), body(10), body(20, steps=2)])
    assert [str(each) for each in failed] == ["out of memory"] * 3
    assert len(calls.calls) == 2


def test_a_baseline_answers_as_the_benchmark_wants_it() -> None:
    with serving(make_app(Locked(Calls()).draw)) as url:
        asks = list(itertools.islice(Mixture().asks(1), 5))
        found = asyncio.run(arrive(url, "tiny", [(0.0, one) for one in asks]))
    assert len(found.seconds) == 5


def test_the_baselines_draw_what_this_project_draws(tiny: Setup, tmp_path: Path) -> None:
    pipelines = Pipelines(write_exports(tiny, tmp_path / "exports"), "cpu", torch.float32)
    base = load("stable_diffusion", tiny.base)
    student = load_student(Store(tiny.store).open("tiny"), base)
    cond, uncond = base.encode_prompts(["red apple"]), base.encode_prompts([""])
    for steps, scale in itertools.product((1, 2, 4), (1.0, 1.5)):
        images = pipelines((steps, scale), ["red apple", "red apple"], [3, 4])
        with torch.inference_mode():
            drawing = draw(student, cond_repeat(cond, 2), uncond, (3, 4), SCHEDULES[steps], guidance_scale=scale)
            expected = (base.decode(drawing.latents) / 2 + 0.5).clamp(0, 1) * 255
        got = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        assert (got.float() - expected).abs().max() <= 2, (steps, scale)


def test_settings_given_by_hand_come_last(tiny: Setup, tmp_path: Path) -> None:
    settings = our_settings(tiny, tmp_path)
    assert (settings.queue_seconds, settings.threads, settings.jobs) == (5, 2, False)
    assert (settings.bases, settings.default_model) == ([tiny.base], "tiny")
    assert "FEWSTEP_BASES" not in os.environ


def test_the_bare_calls_are_made_in_the_servers_own_way(tiny: Setup, tmp_path: Path) -> None:
    """On its backend, in calls of as many rows as that has been made for."""
    bare = Bare.load(our_settings(replace(tiny, settings=("BACKEND=torch", "MAX_BATCH=4")), tmp_path), "tiny")
    assert list(bare.batches) == [1, 2, 3, 4]
    bare = replace(bare, batches=(1, 2, 4))
    rows = []
    handle = bare.student.network.register_forward_pre_hook(lambda _network, inputs: rows.append(len(inputs[0])))
    for n in (1, 3):
        assert bare.seconds(Ask(prompt="red apple", seed=1, steps=2, n=n, guidance_scale=1.0)) > 0
    handle.remove()
    assert rows == [1, 1, 4, 4]


# The report


def made_up(ours: float, lock: float, window: float, p95: float, more: float) -> Round:
    loaded = [
        Loaded(server=server, share=0.7, p50=0.1, p95=seconds, requests=10, refused=refused)
        for server, seconds, refused in (("lock", 2.0, 0), ("window", 1.5, 3), ("ours", p95, 0))
    ]
    images = {"lock": lock, "window": window, "ours": ours}
    alone_is = {"1 step": Alone.of([(0.02 * (1 + more), 0.02)]), "4 steps": Alone.of([(0.1, 0.1)])}
    return Round(images_per_second=images, loaded=loaded, alone=alone_is, answer=0.003)


ROUNDS = [made_up(40, 10, 20, 0.8, 0.1), made_up(10, 2, 8, 1.0, 0.2), made_up(90, 30, 45, 1.2, 0.1)]


def test_ratios_are_taken_within_rounds() -> None:
    found = {bar.what: bar for bar in bars(ROUNDS, 0.7)}
    values = {what: (bar.value, bar.holds) for what, bar in found.items()}
    assert values == {
        "images/s over the lock's": (4.0, True),  # of 4, 5 and 3; the ratio of the medians is 4
        "images/s over the window's": (2.0, True),  # of 2, 1.25 and 2
        "p95 over the lock's, at 70%": (0.5, True),
        "alone, over the bare calls (all kinds)": (pytest.approx(0.002 / 0.12), True),
        "alone, over the bare calls (worst)": (pytest.approx(0.1), True),
    }
    assert {kind: each.bare for kind, each in alone(ROUNDS).items()} == {"1 step": 0.02, "4 steps": 0.1}
    worse = {bar.what: bar.holds for bar in bars([made_up(39, 10, 30, 1.1, 1.0)], 0.7)}
    assert not any(worse.values())


def test_alone_each_answer_is_compared_with_the_calls_beside_it() -> None:
    """A machine that becomes slow in between makes both sides slow."""
    found = Alone.of([(1.1, 1.0), (1.1, 1.0), (11.0, 10.0)])
    assert found.overhead == pytest.approx(0.1)
    assert (found.ours, found.bare) == (1.1, 1.0)


def test_the_tables_say_all_of_it() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(servers_table(ROUNDS, "serving"))
    console.print(bars_table(bars([made_up(39, 10, 20, 0.8, 0.1)], 0.7), ROUNDS))
    text = console.export_text()
    for words in (
        "fewstep serve",
        "40.00",
        "0.10 / 1.00",
        "(9 refused)",
        "at least 4",
        "MISSED",
        "holds",
        "+10.0%",
        "22.0 ms over 20.0",
        "3.0 ms",
    ):
        assert words in text, words


def test_a_missed_bar_is_an_error_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bench.json"
    outcomes = Counter()
    for missed, strict in itertools.product((False, True), (False, True)):
        rounds = [made_up(39, 10, 20, 0.8, 0.1)] if missed else ROUNDS
        monkeypatch.setattr(command, "measure", lambda _options, rounds=rounds: rounds)
        outcomes[missed, strict] = command.main(["--out", str(out), *(["--strict"] if strict else [])])
    assert outcomes == Counter({(True, True): 1})
    report = json.loads(out.read_text())
    assert [bar["holds"] for bar in report["bars"]] == [False, True, True, True, True]
    assert report["rounds"][0]["images_per_second"] == {"lock": 10, "window": 20, "ours": 39}
    assert report["options"]["clients"] == 16


@pytest.mark.slow
def test_the_whole_comparison_runs(tiny: Setup, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    places = ["--base", tiny.base, "--student", "tiny", "--store", str(tiny.store), "--out", str(out)]
    short = ["--seconds", "2", "--settle", "0.5", "--rounds", "2", "--clients", "4", "--alone", "2", "--shares", "0.5"]
    assert command.main([*places, *short, "--threads", "1", "--device", "cpu"]) == 0
    report = json.loads(out.read_text())
    assert len(report["rounds"]) == 2
    for each in report["rounds"]:
        assert all(each["images_per_second"][name] > 0 for name in ("lock", "window", "ours"))
        assert {(row["server"], row["share"]) for row in each["loaded"]} == set(
            itertools.product(("lock", "window", "ours"), (0.5, 0.7))
        )
        assert each["answer"] > 0
        assert set(each["alone"]) == {
            f"{steps}, {n}" for steps in ("1 step", "2 steps", "4 steps") for n in ("1 picture", "4 pictures")
        }
