"""What shares a call and what does not, and that nobody's company shows in a picture: the engine while it is busy."""

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from service.engine.base import (
    DiversityWish,
    Drawn,
    DrawRequest,
    EngineError,
    NotReady,
    Overloaded,
    Preview,
    TimedOut,
)
from service.engine.step_engine import StepEngine
from tests.service.as_loaded import AsLoaded
from tests.service.conftest import TinyBase
from tests.service.engine_help import Harness, collect, mixture, pixels, request, until
from weights.contracts import Diversity
from weights.denoiser import Cond, Denoiser
from weights.families import TextToImage

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def harness(tiny_base: TinyBase, tmp_path: Path) -> Harness:
    harness = Harness(tiny_base, tmp_path, max_batch=16)
    harness.publish(diversity=Diversity(base_steps=1, base_guidance=3.0))
    return harness


def furthest(one: Drawn, other: Drawn) -> int:
    """The largest difference of two pictures' values, of 255."""
    return int(np.abs(np.asarray(one.image, np.int16) - np.asarray(other.image, np.int16)).max())


async def one_by_one(engine: StepEngine, asked: Sequence[DrawRequest]) -> list[list[Drawn]]:
    return [await engine.generate(each) for each in asked]


def test_all_that_can_share_calls_does(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        asked = mixture(harness.base)
        drawn = await harness.together(*asked)
        # By one call all prompts that the first picture, at the start, did not need: "red apple" and "" are known by then.
        assert harness.watch.rows("text") == {4: 1}
        calls = [(model, rows) for call, model, rows, _ in harness.watch.calls if call == "network"]
        # Alone they take 4 + 2 + 4 + 1 + 4 + 2 = 17. Here: four of the first's, with all others of its network, and one
        # more of these; the base's two, the first of them for two requests; and what is left of those that it began.
        assert len(calls) == 9
        assert sum(rows for _, rows in calls) == sum(each.evaluations for group in drawn for each in group)
        assert harness.watch.rows("decoder").total() <= 6
        assert sorted(harness.watch.ends) == sorted(("done", len(each.seeds)) for each in asked)

    harness.run(scenario)


def test_a_picture_is_the_same_in_any_company(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        asked = mixture(harness.base)
        alone = await one_by_one(engine, asked)
        for own, among in zip(alone, await harness.together(*asked), strict=True):
            for one, other in zip(own, among, strict=True):
                assert furthest(one, other) <= 1
                assert (one.seed, one.evaluations, one.diversity) == (other.seed, other.evaluations, other.diversity)
        assert len({picture for own in alone for picture in pixels(own)}) == 9

    harness.run(scenario)


def test_a_deterministic_picture_is_the_same_to_the_byte(harness: Harness) -> None:
    """Whatever is drawn with it, and in whatever order they came."""

    async def scenario(engine: StepEngine) -> None:
        plain = mixture(harness.base)
        asked = [DrawRequest(**{**vars(each), "deterministic": True}) for each in plain]
        alone = [pixels(drawn) for drawn in await one_by_one(engine, asked)]
        for seed in range(3):
            order = [*range(len(asked)), *[None] * 3]
            random.Random(seed).shuffle(order)
            mixed = [asked[place] if place is not None else plain[seed] for place in order]
            for place, drawn in zip(order, await harness.together(*mixed), strict=True):
                assert place is None or pixels(drawn) == alone[place]

    harness.run(scenario)
    assert not torch.are_deterministic_algorithms_enabled()
    assert set(harness.watch.rows("network")) > {1}, "the others still shared calls"


def test_deterministic_pictures_have_every_call_to_themselves(harness: Harness) -> None:
    """Which shows in no picture of a small model; and prompts wait for no more than every other call."""

    async def scenario(engine: StepEngine) -> None:
        prompts = ["red apple", "blue dog", "green tree", "red dog"]
        await harness.together(*(request(prompt=prompt, deterministic=True, guidance_scale=2.0) for prompt in prompts))
        assert {(rows, batch) for _, _, rows, batch in harness.watch.calls} == {(1, 1)}
        kinds = [call for call, *_ in harness.watch.calls]
        # At the start nobody has both prompts; then two rows of a guided step come before each of the other prompts.
        assert kinds[:8] == ["text", "text", *["network"] * 2, "text", *["network"] * 2, "text"]
        assert sum(kind == "text" for kind in kinds) == len(prompts) + 1

    harness.run(scenario)


@pytest.mark.parametrize("batches", [[1], [1, 3], [1, 2, 8]])
def test_batches_of_any_sizes_draw_the_same(tiny_base: TinyBase, tmp_path: Path, batches: list[int]) -> None:
    """Calls are padded to the backend's sizes; a guided picture goes row by row where a batch is one row."""
    drawn = {}
    for name, sizes in {"any": [*range(1, 17)], "these": batches}.items():
        backend = AsLoaded(1)
        backend.batches = sizes
        harness = Harness(tiny_base, tmp_path / name, backend=backend)
        harness.publish()
        drawn[name] = harness.run(lambda engine, harness=harness: harness.together(*mixture(tiny_base)))
        assert {batch for _, _, _, batch in harness.watch.calls} <= set(sizes)
        assert all(0 < rows <= batch for _, _, rows, batch in harness.watch.calls)
    for own, other in zip(drawn["any"], drawn["these"], strict=True):
        assert max(furthest(*pair) for pair in zip(own, other, strict=True)) <= 1


def test_a_prompt_is_encoded_once(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        asked = [request(prompt=prompt, steps=steps) for prompt in ("blue dog", "green tree") for steps in (1, 4)]
        await harness.together(request(), *asked)
        assert harness.watch.rows("text") == {2: 1}
        await one_by_one(engine, asked)
        assert harness.watch.rows("text") == {2: 1}

    harness.run(scenario)


def test_nothing_needs_the_prompt_cache(tiny_base: TinyBase, tmp_path: Path) -> None:
    harness = Harness(tiny_base, tmp_path, prompt_cache_bytes=0)
    harness.publish()
    (drawn,) = harness.draw(guidance_scale=3.0)
    assert drawn.evaluations == 8


def test_a_request_that_nobody_waits_for_leaves_before_the_next_call(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        alone = await engine.generate(request(seeds=(3,)))
        harness.watch.shut()
        staying = asyncio.create_task(engine.generate(request(seeds=(3,))))
        await harness.watch.held()
        leaving = asyncio.create_task(engine.generate(request(seeds=(4, 5))))
        await harness.arrived(1)
        await harness.watch.step()
        assert [(call, rows) for call, _, rows, _ in harness.watch.calls] == [("network", 1), ("network", 3)], (
            "it has joined"
        )
        assert engine.load().pictures == 3
        before = engine.load().seconds
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert engine.load().pictures == 1
        assert engine.load().seconds < before
        harness.watch.open()
        (drawn,) = await staying
        assert [(call, rows) for call, _, rows, _ in harness.watch.calls[2:]] == [*[("network", 1)] * 2, ("decoder", 1)]
        assert furthest(drawn, alone[0]) <= 1
        assert harness.watch.ends[1:] == [("cancelled", 2), ("done", 1)]
        assert (engine.load().pictures, engine.load().seconds) == (0, 0)

    harness.run(scenario)


def test_an_iterator_that_is_closed_drops_its_request(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        answers = engine.stream(request(seeds=(1, 2, 3), previews=3))
        assert isinstance(await anext(answers), Preview)
        await answers.aclose()
        assert engine.load().pictures == 0
        assert len(await engine.generate(request())) == 1
        assert harness.watch.ends == [("cancelled", 3), ("done", 1)]

    harness.run(scenario)


@pytest.mark.parametrize("exact", [False, True])
def test_previews_come_in_order_and_before_their_picture(harness: Harness, exact: bool) -> None:
    asked = request(seeds=(1, 2), previews=9, exact_previews=exact, diversity=DiversityWish())

    async def scenario(engine: StepEngine) -> list[Preview | Drawn]:
        answers = await collect(engine, asked)
        assert harness.watch.rows("decoder").total() == (4 if exact else 1)
        return answers

    answers = harness.run(scenario)
    for index, seed in enumerate(asked.seeds):
        *previews, picture = [each for each in answers if each.index == index]
        assert isinstance(picture, Drawn) and picture.seed == seed
        shown = [(each.step, each.steps, each.seed) for each in previews if isinstance(each, Preview)]
        assert shown == [(step, 4, seed) for step in (1, 2, 3)]
        assert {each.image.size for each in previews} == {(32, 32)}
        assert len({each.image.tobytes() for each in [*previews, picture]}) == 4


def test_an_exact_preview_is_the_decoders(harness: Harness) -> None:
    """After the last but one step a consistency student's x_0 is what it draws in fewer steps from the same noise."""

    async def scenario(engine: StepEngine) -> None:
        (whole,) = await engine.generate(request(steps=1))
        shown = await collect(engine, request(steps=4, previews=3, exact_previews=True))
        # The first step is the same call in either: the network sees pure noise at t = 1.
        assert shown[0].image.tobytes() == whole.image.tobytes()

    harness.run(scenario)


class Faulty(Denoiser):
    """A network that fails at rows of one prompt, or at many rows."""

    def __init__(self, denoiser: Any, poison: Cond, fails: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.poison, self.fails = denoiser, denoiser.schedule, poison, fails
        self.network = denoiser.network

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        own = self.poison["encoder_hidden_states"]
        bad = (cond["encoder_hidden_states"] - own).abs().amax((1, 2)) < 1e-4
        return self.fails(self.denoiser(x_t, t, cond), bad)


class FaultyBackend(AsLoaded):
    """Wraps every network in `Faulty`, once it is switched on."""

    def __init__(self, fails: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(16)
        self.on, self.fails = False, fails

    def prepare(self, model: TextToImage, base: TextToImage | None = None) -> TextToImage:
        prepared: Any = model.with_network(model.network)

        def fails(x0: Tensor, bad: Tensor) -> Tensor:
            return self.fails(x0, bad) if self.on else x0

        prepared.denoiser = Faulty(model.denoiser, model.encode_prompts(["blue dog"]), fails)
        return prepared


def not_a_number(x0: Tensor, bad: Tensor) -> Tensor:
    return torch.where(bad.reshape(-1, 1, 1, 1), torch.nan, x0)


def exploding(x0: Tensor, bad: Tensor) -> Tensor:
    if bad.any():
        raise ZeroDivisionError("a bug that one prompt finds")
    return x0


def short_of_memory(x0: Tensor, _bad: Tensor) -> Tensor:
    if len(x0) > 2:
        raise torch.OutOfMemoryError("too many rows")
    return x0


@pytest.mark.parametrize("fails", [not_a_number, exploding])
def test_trouble_stays_with_the_request_that_has_it(
    tiny_base: TinyBase, tmp_path: Path, fails: Callable[[Tensor, Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    backend = FaultyBackend(fails)
    harness = Harness(tiny_base, tmp_path, backend=backend)
    harness.publish()
    asked = [request(seeds=(1, 2)), request(prompt="blue dog", seeds=(3, 4)), request(prompt="green tree", seeds=(5,))]

    async def scenario(engine: StepEngine) -> None:
        alone = await one_by_one(engine, asked)
        backend.on = True
        company = await harness.together(*asked, return_exceptions=True)
        guilty = company[1]
        assert isinstance(guilty, EngineError)
        assert "the server's log says why" in str(guilty)
        assert isinstance(guilty.__cause__, ArithmeticError)
        for place in (0, 2):
            assert max(furthest(*pair) for pair in zip(alone[place], company[place], strict=True)) <= 1
        assert len(await engine.generate(asked[0])) == 2
        assert ("failed", 2) in harness.watch.ends
        assert engine.load().pictures == 0

    harness.run(scenario)
    assert "drawing failed" in caplog.text


def test_a_batch_that_is_too_large_is_made_smaller(tiny_base: TinyBase, tmp_path: Path) -> None:
    backend = FaultyBackend(short_of_memory)
    harness = Harness(tiny_base, tmp_path, backend=backend)
    harness.publish()

    async def scenario(engine: StepEngine) -> None:
        whole = await engine.generate(request(seeds=(1, 2, 3, 4, 5)))
        backend.on = True
        smaller = await engine.generate(request(seeds=(1, 2, 3, 4, 5)))
        assert max(furthest(*pair) for pair in zip(whole, smaller, strict=True)) <= 1

    harness.run(scenario)


def test_a_prompt_that_cannot_be_encoded(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    base, encode = harness.base.model, harness.base.model.encode_prompts

    def refuse(prompts: list[str]) -> dict[str, Tensor]:
        return 1 / 0 if "blue dog" in prompts else encode(prompts)  # type: ignore[return-value]

    async def scenario(engine: StepEngine) -> None:
        monkeypatch.setattr(base, "encode_prompts", refuse)
        asked = [request(prompt="red dog"), request(prompt="blue dog"), request(prompt="green tree")]
        results = await asyncio.gather(*(engine.generate(each) for each in asked), return_exceptions=True)
        assert [isinstance(each, EngineError) for each in results] == [False, True, False]

    harness.run(scenario)


def test_a_bug_ends_what_is_there_and_nothing_else(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(engine: StepEngine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("service.engine.loop.advance", lambda *_args: 1 / 0)
            with pytest.raises(EngineError, match="the server's log says why") as caught:
                await engine.generate(request())
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert len(await engine.generate(request())) == 1

    harness.run(scenario)


def test_a_full_line_is_refused(tiny_base: TinyBase, tmp_path: Path) -> None:
    harness = Harness(tiny_base, tmp_path, queue_seconds=0.1)
    harness.publish()

    async def scenario(engine: StepEngine) -> None:
        harness.watch.shut()
        busy = asyncio.create_task(engine.generate(request(client="a")))
        await harness.watch.held()
        with pytest.raises(Overloaded, match="of work are already in the queue") as caught:
            await engine.generate(request(client="a"))
        assert caught.value.retry_after >= 1
        harness.watch.open()
        await busy
        assert harness.watch.ends == [("refused", 1), ("done", 1)]
        assert len(await engine.generate(request(client="a"))) == 1

    harness.run(scenario)


@pytest.mark.parametrize(("limit", "own"), [(3.0, None), (60.0, 0.3)])
def test_a_request_that_takes_too_long(tiny_base: TinyBase, tmp_path: Path, limit: float, own: float | None) -> None:
    harness = Harness(tiny_base, tmp_path, request_timeout=limit)
    harness.publish()

    async def scenario(engine: StepEngine) -> None:
        await engine.generate(request())  # loads the student, which on a busy machine takes most of a second
        harness.watch.shut()
        with pytest.raises(TimedOut, match=rf"more than {own or limit:g} s"):
            await engine.generate(request(prompt="blue dog", seconds=own))
        assert (engine.load().pictures, engine.load().seconds) == (0, 0)
        harness.watch.open()
        assert harness.watch.ends[-1] == ("timed_out", 1)
        assert len(harness.watch.calls) == 1, "nothing was done for it beyond the call that was being made"

    harness.run(scenario)


def test_a_stopping_engine_refuses_those_who_wait(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        harness.watch.shut()
        tasks = [asyncio.create_task(engine.generate(request(seeds=(seed,)))) for seed in range(3)]
        await until(lambda: engine.load().pictures == 3)
        await harness.watch.held()
        stopping = asyncio.create_task(engine.stop())
        for task in tasks:
            with pytest.raises(NotReady, match="stopping"):
                await task
        harness.watch.open()
        await stopping
        assert engine.load().resident == {}

    harness.run(scenario)


def test_a_draining_engine_finishes_what_it_has(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        harness.watch.shut()
        busy = asyncio.create_task(engine.generate(request(seeds=(1, 2))))
        await harness.watch.held()
        await engine.drain(0.01)  # no longer than that
        assert not busy.done()
        draining = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        assert not engine.ready
        with pytest.raises(NotReady):
            await engine.generate(request())
        harness.watch.open()
        assert len(await busy) == 2
        await draining

    harness.run(scenario)


def test_what_it_does_and_holds(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        harness.watch.shut()
        busy = asyncio.create_task(engine.generate(request(seeds=(1, 2))))
        await harness.watch.held()
        load = engine.load()
        assert load.pictures == 2
        assert load.seconds > 0
        assert set(load.resident) == {harness.base.id, "tiny"}
        assert all(size > 0 for size in load.resident.values())
        harness.watch.open()
        await busy

    harness.run(scenario)


def test_nothing_is_loaded_for_a_request_that_nobody_waits_for(harness: Harness) -> None:
    harness.publish("other", change=0.9)

    async def scenario(engine: StepEngine) -> None:
        harness.watch.shut()
        busy = asyncio.create_task(engine.generate(request()))
        await harness.watch.held()
        leaving = asyncio.create_task(engine.generate(request(model="other")))
        await harness.arrived(1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        harness.watch.open()
        await busy
        assert "other" not in engine.load().resident
        assert len(await engine.generate(request(model="other"))) == 1
        assert "other" in engine.load().resident

    harness.run(scenario)
