"""Models are loaded while others are drawn with: nobody waits but those who want them, in their order, and for no longer."""

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service import logs
from service.engine import making, thread
from service.engine.admission import Admission
from service.engine.base import Drawn, DrawRequest, EngineError, ModelBroken, NotReady, Overloaded, TimedOut
from service.engine.gate import Gate
from service.engine.line import Line
from service.engine.loading import UNKNOWN_SECONDS, Loader, Wait
from service.engine.making import Maker, Wanted
from service.engine.pictures import Ticket
from service.engine.residency import Found
from service.engine.resident import Resident
from service.engine.step_engine import StepEngine
from tests.helpers import tiny_pipeline
from tests.service.conftest import TinyBase
from tests.service.engine_help import Harness, pixels, request, until
from weights.contracts import StepSchedule
from weights.families import TextToImage, load
from weights.modules import storages

pytestmark = pytest.mark.usefixtures("loaded_once")


class Brake:
    """Holds every load until it is let go, and fails those of some models."""

    def __init__(self) -> None:
        self.on = False
        self.begun: list[str] = []
        self.broken: set[str] = set()
        self._go = threading.Semaphore(0)

    def loads(self, label: str) -> None:
        if not self.on:
            return
        self.begun.append(label)
        assert self._go.acquire(timeout=120)
        if label in self.broken:
            raise OSError("the disk is gone")

    def let_go(self, loads: int = 1) -> None:
        self._go.release(loads)

    async def holds(self, label: str) -> None:
        await until(lambda: bool(self.begun) and self.begun[-1] == label)


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    brake = Brake()
    derived = Maker.derived

    def held(maker: Maker, wanted: Wanted, base: Resident) -> Resident:
        brake.loads(wanted.key.label)
        return derived(maker, wanted, base)

    monkeypatch.setattr(Maker, "derived", held)
    yield brake
    brake.let_go(100)


@pytest.fixture
def harness(tiny_base: TinyBase, tmp_path: Path) -> Harness:
    harness = Harness(tiny_base, tmp_path, max_batch=16, default_model="tiny")
    harness.publish()
    return harness


@pytest.fixture
def tight(tiny_base: TinyBase, tmp_path: Path) -> Harness:
    """With room for the base and one student."""
    own = tiny_base.model.network
    room = [sum(storages(each).values()) for each in (tiny_base.model.components().values(), [own])]
    harness = Harness(tiny_base, tmp_path)
    harness.engine._residency._shelf.budget = sum(room)
    return harness


def start(engine: StepEngine, **fields: Any) -> "asyncio.Task[list[Drawn]]":
    return asyncio.create_task(engine.generate(request(**fields)))


def test_others_are_drawn_while_a_model_is_loaded(harness: Harness, brake: Brake) -> None:
    async def scenario(engine: StepEngine) -> None:
        harness.publish("new", change=0.9)
        brake.on = True
        waiting = start(engine, model="new", seeds=(1, 2))
        await brake.holds("new")
        for model in ("tiny", harness.base.id):
            assert len(await engine.generate(request(model=model, steps=2, prompt="blue dog", previews=1))) == 1
        assert not waiting.done()
        assert engine.load().pictures == 2
        brake.let_go()
        drawn = await waiting
        assert pixels(drawn) == pixels(await engine.generate(request(model="new", seeds=(1, 2))))
        assert pixels(drawn) != pixels(await engine.generate(request(model="tiny", seeds=(1, 2))))
        assert brake.begun == ["new"], "once for all"

    harness.run(scenario)


def test_a_load_that_fails_ends_the_requests_that_wait_for_it(harness: Harness, brake: Brake) -> None:
    async def scenario(engine: StepEngine) -> None:
        for name in ("bad", "good"):
            harness.publish(name)
        brake.on, brake.broken = True, {"bad"}
        failing = [start(engine, model="bad", prompt=prompt) for prompt in ("red apple", "blue dog")]
        await brake.holds("bad")
        await until(lambda: engine.load().pictures == 2)  # both wait for the same load
        others = [start(engine, model="good"), start(engine)]
        brake.let_go(2)
        results = await asyncio.gather(*failing, *others, return_exceptions=True)
        assert [type(each) for each in results] == [ModelBroken, ModelBroken, list, list]
        assert "'bad' cannot be loaded" in str(results[0])
        brake.on = False
        assert len(await engine.generate(request(model="bad"))) == 1, "it is tried again"
        assert (engine.load().pictures, engine.load().seconds) == (0, 0)

    harness.run(scenario)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_request_that_ends_while_it_waits(harness: Harness, brake: Brake, begun: bool, late: bool) -> None:
    async def scenario(engine: StepEngine) -> None:
        for name in ("first", "second"):
            harness.publish(name)
        brake.on = True
        other = start(engine, model="first")
        await brake.holds("first")
        leaving = start(engine, model="second")
        await until(lambda: engine.load().pictures == 2)
        if begun:
            brake.let_go()
            await brake.holds("second")
        if late:
            (ticket,) = (ticket for ticket in engine._tickets if ticket.model == "second")
            ticket.end(TimedOut("as its timer does"))
        else:
            leaving.cancel()
        (left,) = await asyncio.gather(leaving, return_exceptions=True)
        assert isinstance(left, TimedOut if late else asyncio.CancelledError)
        brake.let_go(2)
        assert len(await other) == 1
        assert len(await engine.generate(request())) == 1
        assert brake.begun == (["first", "second"] if begun else ["first"]), "nothing is loaded for nobody"
        assert harness.watch.calls.count(("decoder", "second", 1, 1)) == 0
        assert (engine.load().pictures, engine.load().seconds) == (0, 0)

    harness.run(scenario)


def test_models_that_drive_each_other_out_are_all_drawn_with(tight: Harness) -> None:
    """There is room for one: each is driven out while its pictures, or those who wait for it, are still to be drawn."""
    names = ["a", "b", "c"]
    for index, name in enumerate(names):
        tight.publish(name, change=0.8 + 0.1 * index)

    async def scenario(engine: StepEngine) -> None:
        alone = {name: pixels(await engine.generate(request(model=name, deterministic=True))) for name in names}
        asked = [names[index % 3] for index in range(12)]
        drawn = await asyncio.gather(*(engine.generate(request(model=name, deterministic=True)) for name in asked))
        assert [pixels(each) for each in drawn] == [alone[name] for name in asked]
        assert len(engine.load().resident) == 2

    tight.run(scenario)


def test_what_has_left_memory_is_gone_though_nothing_else_happens(tight: Harness) -> None:
    for name in ("a", "b"):
        tight.publish(name)

    async def scenario(engine: StepEngine) -> None:
        await engine.generate(request(model="a"))
        gone = weakref.ref(engine._residency.get("a", "x").model.network)
        engine._residency.get("b", "x")  # not by the engine's threads, which do nothing after the picture
        gc.collect()
        assert gone() is None

    tight.run(scenario)


def test_adapters_are_merged_while_others_are_drawn(
    harness: Harness, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And requests for the plain model do not wait for one that has adapters merged in."""

    def with_loras(self: Any, loras: Any) -> Any:
        assert [scale for _, scale in loras] == [0.5]
        return self.copy()

    monkeypatch.setattr(type(harness.base.model), "with_loras", with_loras)

    async def scenario(engine: StepEngine) -> None:
        harness.publish("style", adapter="lora")
        brake.on = True
        for model in ("tiny", harness.base.id):
            merging = start(engine, model=model, loras=(("style", 0.5),))
            await brake.holds(f"{model}+style:0.5")
            assert len(await engine.generate(request(model=model))) == 1
            assert not merging.done()
            brake.let_go()
            (drawn,) = await merging
            assert drawn.loras == (("style", 0.5),)

    harness.run(scenario)


def test_a_server_that_stops_does_not_wait_for_a_load_for_ever(
    harness: Harness, brake: Brake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(thread, "STOP_SECONDS", 0.1)

    async def scenario(engine: StepEngine) -> None:
        for name in ("new", "next"):
            harness.publish(name)
        brake.on = True
        waiting = [start(engine, model="new")]
        await brake.holds("new")
        waiting.append(start(engine, model="next"))  # not before: which of two is planned first is anybody's guess
        await until(lambda: engine.load().pictures == 2)
        await engine.stop()
        for each in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(each, NotReady)
        assert "still being loaded" in caplog.text
        brake.let_go(2)
        await until(lambda: not engine._thread._loader._thread.is_alive())
        assert brake.begun == ["new"], "nothing more is loaded"

    harness.run(scenario)


def test_a_server_that_stops_does_not_wait_for_its_start_for_ever(
    harness: Harness, brake: Brake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Converting and compiling the models can take minutes, which nobody needs any more."""
    monkeypatch.setattr(thread, "STOP_SECONDS", 0.1)
    brake.on = True

    async def scenario() -> None:
        engine = harness.engine
        await engine.start()
        await brake.holds("tiny")
        stopping = asyncio.create_task(engine.stop())
        try:
            await until(lambda: "still busy" in caplog.text)
            assert engine._thread._thread.is_alive()
        finally:
            brake.let_go()
            await stopping
        await until(lambda: not engine._thread._thread.is_alive())

    asyncio.run(scenario())


def test_a_loader_is_stopped_while_its_thread_starts() -> None:
    """A thread has its identity before it may be joined, and the engine's thread starts what another one stops."""
    begins, may_begin = threading.Event(), threading.Event()

    class Slow(threading.Thread):
        _own: int | None = None

        @property
        def ident(self) -> int | None:
            return self._own

        def start(self) -> None:
            self._own = 1
            begins.set()
            assert may_begin.wait(60)
            super().start()

    loader = Loader(cast(Any, None), lambda wait: None)
    loader._thread = Slow(target=loader._work)
    starting = threading.Thread(target=loader.start)
    starting.start()
    assert begins.wait(60)
    threading.Timer(0.2, may_begin.set).start()
    loader.stop(60)
    starting.join()
    assert not loader._thread.is_alive()
    late = Loader(cast(Any, None), lambda wait: None)
    late.stop(60)
    late.start()
    assert late._thread.ident is None, "what was stopped before it began never does"


LOADING_AT_THE_END = """
import threading, time, torch
from service.engine.loading import Loader, Wait
begun = threading.Event()

class Planner:
    def load(self, request, model):
        end, numbers = time.monotonic() + 1, torch.ones(1000, 1000)
        while time.monotonic() < end:
            begun.set()
            numbers @ numbers

class Ticket:
    over, model, client = False, "m", ""

    @property
    def request(self):
        return self

    def within(self, call, *given):
        return call(*given)

loader = Loader(Planner(), lambda wait: print("loaded"))
loader.start()
loader.put(Wait(wants="m", tickets=[Ticket()]))
assert begun.wait(60)
loader.stop(0.01)
print("stopped")
"""


def test_a_process_that_ends_while_a_model_is_loaded_ends_in_good_order() -> None:
    command = [sys.executable, "-c", LOADING_AT_THE_END]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["stopped", "loaded"]


def test_a_stopping_engine_keeps_nothing_in_memory(harness: Harness, brake: Brake) -> None:
    async def scenario(engine: StepEngine) -> None:
        harness.publish("new")
        brake.on = True
        waiting = start(engine, model="new")
        await brake.holds("new")
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(NotReady):
            await waiting
        brake.let_go()
        await stopping
        assert engine.load().resident == {}

    harness.run(scenario)


def test_no_call_is_made_while_a_base_is_loaded(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a base that no setting lists: its libraries change what all threads compute with."""
    other = tiny_pipeline(tmp_path / "other", seed=1)
    foreign = TinyBase(other, load("stable_diffusion", other))
    foreign.publish(harness.store, tmp_path / "work" / "foreign", "foreign")
    calls: list[int] = []

    def load_base(*_where: Any) -> TextToImage:
        torch.set_default_dtype(torch.float64)
        try:
            calls.append(len(harness.watch.calls))
            time.sleep(0.3)
            calls.append(len(harness.watch.calls))
        finally:
            torch.set_default_dtype(torch.float32)
        return foreign.model

    async def scenario(engine: StepEngine) -> None:
        monkeypatch.setattr(making, "load", load_base)
        asked = [request(model=harness.base.id, seeds=(seed,), steps=20, deterministic=True) for seed in range(8)]
        alone = [pixels(await engine.generate(each)) for each in asked]
        busy = asyncio.gather(*(engine.generate(each) for each in asked))
        assert len(await engine.generate(request(model="foreign"))) == 1
        assert [pixels(each) for each in await busy] == alone
        before, after = calls
        assert before == after

    harness.run(scenario)


# The gate


def test_whoever_wants_to_close_the_gate_comes_next() -> None:
    gate, inside, over = Gate(), [0], threading.Event()

    def call_after_call() -> None:
        while not over.is_set():
            with gate.passing():
                inside[0] += 1
                time.sleep(0.001)
                inside[0] -= 1

    computing = threading.Thread(target=call_after_call)
    computing.start()
    try:
        for _ in range(20):
            with gate.closed():
                assert inside[0] == 0
                time.sleep(0.002)
                assert inside[0] == 0
    finally:
        over.set()
        computing.join()


def test_an_error_leaves_the_gate_open() -> None:
    gate = Gate()
    for way in (gate.passing, gate.closed, gate.passing):
        with pytest.raises(ZeroDivisionError), way():
            raise ZeroDivisionError


# Who waits, whatever happens


class World:
    """Everything around an `Admission`: models that come and go at any time, and loads that are made one after another."""

    def __init__(self) -> None:
        self.memory: dict[str, Resident] = {}
        self.versions: Counter[str] = Counter()
        """How often each model has been published again; a resident's LoRAs say which version it is."""
        self.unusable: set[tuple[str, int]] = set()
        self.arrived: dict[str, list[Ticket]] = {}
        self.admitted: dict[str, list[Ticket]] = {}
        self.answers: dict[Ticket, EngineError] = {}
        self.out: list[Wait] = []
        self.done: list[Wait] = []
        self.loads: Counter[str] = Counter()
        self.admission = Admission(cast(Any, self), cast(Any, self), self, 10)

    # What it needs of a planner, of a loop and of a loader

    def put(self, wait: Wait) -> None:
        self.out.append(wait)

    def ahead(self, _client: str) -> tuple[float, bool]:
        return 0.0, False

    def find(self, asked: DrawRequest, model: str) -> Found:
        own, version = self.memory.get(model), self.versions[model]
        newer = version if own is not None and own.loras != self.loras(model) else None
        return Found(wants=model, resident=own, newer=newer)

    def loras(self, model: str) -> tuple[tuple[str, float], ...]:
        return ((model, self.versions[model]),)

    def admit(self, ticket: Ticket, resident: Resident) -> None:
        assert resident.member == ticket.model, "it is the model that was asked for"
        if not ticket.over:
            self.admitted.setdefault(ticket.model, []).append(ticket)

    # What happens

    def comes(self, model: str) -> None:
        place = Line(60).join("", 0.0)
        ticket = Ticket(request=request(model=model), model=model, place=place, send=lambda _: None)
        ticket.send = lambda answer: self.answers.update({ticket: cast(EngineError, answer)})
        self.arrived.setdefault(model, []).append(ticket)
        waits = [wait for wait in (*self.out, *self.done) if wait.wants == model]
        there = model in self.memory and not any(wait.tickets for wait in waits)
        self.admission.take(ticket)
        assert (ticket in self.admitted.get(model, [])) == there, "at once where nobody waits and it is in memory"
        if there and self.memory[model].loras != self.loras(model):
            renewing = any(wait.wants == model for wait in (*self.out, *self.done))
            assert renewing or (model, self.versions[model]) in self.unusable, "the newer version is on its way"
        assert len([wait for wait in (*self.out, *self.done) if wait.wants == model]) <= 1

    def leaves(self, model: str) -> None:
        waiting = [each for each in self.arrived.get(model, []) if each not in self.admitted.get(model, [])]
        if waiting:
            waiting[0].over = True

    def loaded(self, _model: str, fails: bool = False) -> None:
        """The loader is done with its next wait."""
        if not self.out:
            return
        wait = self.out.pop(0)
        if wait.asks is not None:
            name, nothing = wait.asks.model, cast(Any, None)
            self.loads[name] += 1
            resident = Resident(
                model=nothing, base=nothing, raw_base=nothing, manifest=None, member=name, loras=self.loras(name)
            )
            wait.outcome = ModelBroken("the disk is gone") if fails else resident
            if not fails:
                self.memory = {name: resident}  # and drives all others out
            elif wait.renews is not None:
                self.unusable.add((name, cast(int, wait.version)))
        self.done.append(wait)

    def heard(self, _model: str) -> None:
        """The engine's thread takes the next one back."""
        if self.done:
            self.admission.back(self.done.pop(0))

    def evicted(self, model: str) -> None:
        self.memory.pop(model, None)

    def republished(self, model: str) -> None:
        self.versions[model] += 1


HAPPENS: dict[str, Callable[[World, str], None]] = {
    "comes": World.comes,
    "leaves": World.leaves,
    "loaded": World.loaded,
    "failed": lambda world, model: world.loaded(model, fails=True),
    "heard": World.heard,
    "evicted": World.evicted,
    "republished": World.republished,
}


@given(st.lists(st.tuples(st.sampled_from(sorted(HAPPENS)), st.sampled_from("abc")), max_size=40))
def test_every_request_is_admitted_once_and_in_order_or_told_why_not(events: list[tuple[str, str]]) -> None:
    world = World()
    for event, model in events:
        HAPPENS[event](world, model)
    for _ in range(len(events)):
        world.loaded("")
        world.heard("")
    assert not world.out and not world.done, "loads come to an end, though every one drives all other models out"
    for model, arrived in world.arrived.items():
        admitted = world.admitted.get(model, [])
        assert admitted == [ticket for ticket in arrived if ticket in admitted], "in their order, once"
        for ticket in arrived:
            assert ticket in admitted or ticket.over, "nobody is forgotten"
            assert ticket not in admitted or ticket not in world.answers
        assert world.loads[model] <= len(arrived)


class Order:
    """A planner that notes what is loaded, and waits before the first load until it may."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.begun, self.may = threading.Event(), threading.Event()

    def load(self, _request: DrawRequest, model: str) -> Resident:
        self.begun.set()
        assert self.may.wait(60)
        self.loaded.append(model)
        raise ModelBroken("only the order matters")


def asks(model: str, client: str) -> Ticket:
    place = Line(60).join(client, 0.0)
    return Ticket(request=request(model=model, client=client), model=model, place=place, send=lambda _: None)


def waits(model: str, client: str) -> Wait:
    return Wait(wants=model, tickets=[asks(model, client)])


def test_clients_take_turns_in_having_models_loaded() -> None:
    planner, done = Order(), threading.Semaphore(0)
    loader = Loader(cast(Any, planner), lambda wait: done.release())
    given_up = waits("nobody's", "b")
    given_up.tickets[0].over = True
    loader.put(waits("a0", "a"))
    loader.start()
    assert planner.begun.wait(60)
    for wait in (*(waits(f"a{number}", "a") for number in range(1, 5)), given_up, waits("b0", "b"), waits("c0", "c")):
        loader.put(wait)
    assert loader.ahead("a") == (7 * UNKNOWN_SECONDS, True), "whoever has given up delays nobody"
    assert loader.ahead("d") == (7 * UNKNOWN_SECONDS, False)
    planner.may.set()
    for _ in range(8):
        assert done.acquire(timeout=60)
    assert planner.loaded[0] == "a0"
    assert {"b0", "c0"} < set(planner.loaded[1:4]), "after at most one more of the client with many"
    assert [name for name in planner.loaded if name[0] == "a"] == ["a0", "a1", "a2", "a3", "a4"]
    assert loader.ahead("a") == (0, False)
    loader.stop(60)


@pytest.mark.parametrize(
    ("seconds", "own", "refused"),
    [(10.0, True, False), (10.5, True, True), (10.5, False, False), (20.0, False, False), (21.5, False, True)],
)
def test_too_many_models_to_load_are_refused(seconds: float, own: bool, refused: bool) -> None:
    world = World()
    world.ahead = lambda _client: (seconds, own)  # type: ignore[method-assign]
    world.comes("a")
    (ticket,) = world.arrived["a"]
    assert ticket.over == refused
    assert len(world.out) == (not refused)
    if refused:
        answer = world.answers[ticket]
        assert isinstance(answer, Overloaded)
        assert answer.retry_after in (1, 2)
        assert "'a' is not in memory" in str(answer)


# A student that is published again


def test_a_republished_student_makes_nobody_wait(harness: Harness, brake: Brake) -> None:
    async def scenario(engine: StepEngine) -> None:
        old = pixels(await engine.generate(request()))
        harness.publish(change=0.9)
        brake.on = True
        await until(
            lambda: engine._recent.last("tiny").manifest.created_at == harness.store.manifest("tiny").created_at
        )
        for _ in range(3):
            assert pixels(await engine.generate(request())) == old
        await brake.holds("tiny")
        brake.let_go(1)
        while pixels(await engine.generate(request())) == old:
            pass
        assert brake.begun == ["tiny"], "once"

    harness.run(scenario)


def test_a_republished_student_that_is_broken_leaves_the_old_one(
    harness: Harness, brake: Brake, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(engine: StepEngine) -> None:
        old = pixels(await engine.generate(request()))
        harness.publish(change=0.9)
        brake.on, brake.broken = True, {"tiny"}
        await until(
            lambda: engine._recent.last("tiny").manifest.created_at == harness.store.manifest("tiny").created_at
        )
        assert pixels(await engine.generate(request())) == old
        await brake.holds("tiny")
        brake.let_go(1)
        await until(lambda: "the version in memory is kept" in caplog.text)
        assert pixels(await engine.generate(request())) == old
        assert brake.begun == ["tiny"], "not tried again"
        harness.publish(change=0.8)
        brake.broken = set()
        brake.let_go(1)
        while pixels(await engine.generate(request())) == old:
            pass
        assert brake.begun == ["tiny"] * 2

    harness.run(scenario)


def test_what_only_the_new_version_can_do_waits_for_it(harness: Harness, brake: Brake) -> None:
    async def scenario(engine: StepEngine) -> None:
        await engine.generate(request())
        harness.publish(change=0.9, schedules={3: StepSchedule(timesteps=[1.0, 0.6, 0.3])})
        brake.on = True
        await until(lambda: 3 in engine._recent.last("tiny").manifest.schedules)
        waiting = start(engine, steps=3)
        await brake.holds("tiny")
        assert not waiting.done()
        brake.let_go(1)
        (drawn,) = await waiting
        assert drawn.steps == 3

    harness.run(scenario)


def test_what_is_logged_for_a_request_has_its_id(
    harness: Harness, brake: Brake, caplog: pytest.LogCaptureFixture
) -> None:
    ids: dict[str, str | None] = {}

    def note(record: logging.LogRecord) -> bool:
        ids[record.getMessage()] = logs.request_id.get()
        return True

    caplog.handler.addFilter(note)
    caplog.set_level(logging.INFO)

    async def scenario(engine: StepEngine) -> None:
        for name in ("good", "bad"):
            harness.publish(name)
        brake.on, brake.broken = True, {"bad"}
        brake.let_go(2)
        for name in ("good", "bad"):
            logs.request_id.set(f"req_{name}")
            await asyncio.gather(start(engine, model=name), return_exceptions=True)

    harness.run(scenario)
    about = {text: own for text, own in ids.items() if "'good' was loaded" in text or text == "loading 'good'"}
    assert set(about.values()) == {"req_good"} and len(about) == 2


def test_threads_that_a_backend_asks_for_are_the_engines() -> None:
    world, before = World(), torch.get_num_threads()
    try:
        for threads in (before + 1, None):
            world.comes("a")
            world.loaded("a", fails=True)
            world.done[0].threads = threads
            world.heard("a")
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
