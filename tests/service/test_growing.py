"""Programs that are made while they are drawn with: nobody waits for one, and answers and costs are those of what ran."""

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.engine.backends.base import Growing, doubling
from service.engine.backends.cache import Cache
from service.engine.backends.compiler import Compiler
from service.engine.backends.program import Program
from service.engine.costs import CostProfile
from service.engine.step_engine import StepEngine
from tests.service.conftest import TinyBase
from tests.service.engine_help import Harness, pixels, request, until_seen
from weights.families import TextToImage
from weights.families import base as families

pytestmark = pytest.mark.usefixtures("loaded_once")


class Grown(Growing):
    """Runs a module in the sizes that it is made for, and is made for another one when a test says so."""

    def __init__(self, module: nn.Module, batches: Sequence[int]) -> None:
        super().__init__()
        self._module, self._batches = module, batches
        self.sizes, self.wanted = {1}, set[int]()
        self.waited: list[int] = []
        """Sizes that were made while the caller waited."""

    @property
    def made(self) -> list[int]:
        return sorted(self.sizes)

    def want(self, batch: int) -> None:
        self.wanted.add(batch)

    def forward(self, *inputs: Tensor) -> Any:
        rows = len(inputs[0])
        assert rows in self._batches
        if rows not in self.sizes:
            self.waited.append(rows)
            self.sizes.add(rows)
        return self._module(*inputs)


class Grows:
    """A backend of such programs."""

    name = "grows"

    def __init__(self, most: int) -> None:
        self.batches = doubling(most)
        self.networks: list[Grown] = []

    def prepare(self, model: TextToImage, base: TextToImage | None = None) -> TextToImage:
        names = model.part_names if base is None else ("network",)
        made = {name: Grown(part.module, self.batches) for name, part in model.parts().items() if name in names}
        self.networks.append(made["network"])
        return model.with_programs({**({} if base is None else base.programs), **made})


def test_a_new_model_is_drawn_in_the_batches_that_are_made(
    tiny_base: TinyBase, tmp_path: Path, monkeypatch: Any
) -> None:
    backend = Grows(4)
    harness = Harness(tiny_base, tmp_path, backend=backend, max_batch=4)
    harness.publish()
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(harness.engine._costs, "observe", lambda part, batch, seconds: seen.append((part.call, batch)))

    async def scenario(engine: StepEngine) -> None:
        harness.publish("new", change=0.9)
        await until_seen()
        asked = request(model="new", seeds=(1, 2, 3, 4))
        seen.clear()
        first = await engine.generate(asked)
        new = backend.networks[-1]
        assert (new.waited, max(new.wanted)) == ([], 4)
        assert {batch for call, batch in seen if call == "network"} == {1}, "what ran is what its time is taken for"
        assert [batch for call, _, _, batch in harness.watch.calls if call == "network"] == [1] * 16
        new.sizes.add(4)
        harness.watch.calls.clear()
        second = await engine.generate(asked)
        assert [batch for call, _, _, batch in harness.watch.calls if call == "network"] == [4] * 4
        assert [each.seed for each in first] == [each.seed for each in second]
        assert new.waited == []

    harness.run(scenario)


def test_guided_and_deterministic_pictures_of_a_new_model(tiny_base: TinyBase, tmp_path: Path) -> None:
    """Two rows that stay together go through a batch of one, one after the other; who draws alone wants no larger one."""
    backend = Grows(4)
    harness = Harness(tiny_base, tmp_path, backend=backend, max_batch=4)

    async def scenario(engine: StepEngine) -> None:
        harness.publish("new", change=0.9)
        asked = request(model="new", seeds=(1, 2), steps=1, deterministic=True)
        alone = await engine.generate(asked)
        new = backend.networks[-1]
        assert (new.waited, new.wanted) == ([], set())
        await engine.generate(request(model="new", seeds=(1,), steps=1, guidance_scale=3.0))
        assert (new.waited, new.wanted) == ([], {2})
        new.sizes |= {2, 4}
        assert pixels(await engine.generate(asked)) == pixels(alone)

    harness.run(scenario)


def test_everything_is_made_before_the_server_is_ready(tiny_base: TinyBase, tmp_path: Path) -> None:
    backend = Grows(4)
    harness = Harness(tiny_base, tmp_path, backend=backend, max_batch=4, default_model="tiny")
    harness.publish()

    async def scenario(_: StepEngine) -> None:
        assert [network.made for network in backend.networks] == [[1, 2, 4]] * 2

    harness.run(scenario)


def rows(count: int) -> tuple[Tensor, ...]:
    return (torch.ones(count, 3) + torch.arange(count)[:, None],)


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    return Compiler(Cache(tmp_path), "f32", 1)


@pytest.fixture
def program(compiler: Compiler) -> Program:
    torch.manual_seed(0)
    made = Program(compiler, families.Part(module=nn.Linear(3, 3), example=rows, config={}), (1, 2, 4))
    made(*rows(1))
    return made


def done(compiler: Compiler) -> None:
    """Returns when all that is to be compiled is."""
    idle = threading.Event()
    compiler.later(idle.set)
    assert idle.wait(120)


def test_a_program_is_compiled_on_a_thread_of_its_own(
    compiler: Compiler, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_batch, threads = Program.compile_batch, []

    def watched(self: Program, batch: int) -> None:
        threads.append((threading.current_thread() is threading.main_thread(), batch))
        compile_batch(self, batch)

    monkeypatch.setattr(Program, "compile_batch", watched)
    assert program.made == [1]
    for _ in range(3):
        program.want(4)
        program.want(1)
    done(compiler)
    assert program.made == [1, 4]
    assert threads == [(False, 4)], "once, and what is there already not again"
    monkeypatch.setattr(compiler, "compile", None)
    assert program(*rows(4)).shape == (4, 3), "by what was compiled"


def test_what_cannot_be_compiled_is_said_once(
    compiler: Compiler, program: Program, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(compiler, "compile", fail)
    for _ in range(2):
        program.want(2)
        done(compiler)
    assert caplog.text.count("OpenVINO cannot compile a batch of 2") == 1
    assert program.made == [1]


def test_nothing_is_compiled_for_a_model_that_has_left_memory(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(compiler, families.Part(module=nn.Linear(3, 3), example=rows, config={}), (1, 2))
    go_on = threading.Event()
    compiler.later(partial(go_on.wait, 120))
    program.want(2)
    monkeypatch.setattr(compiler, "compile", None)
    monkeypatch.setattr(Program, "compile_batch", lambda *_: pytest.fail("nobody wants it"))
    del program
    go_on.set()
    done(compiler)


def test_costs_of_some_batches() -> None:
    profile = CostProfile({1: 1.0, 2: 1.2, 4: 1.5})
    assert profile.among([1, 2, 4, 8]) is profile
    some = profile.among([1, 2])
    assert (some.batches, some.best(8), some.seconds(4)) == ([1, 2], (2, 2), 1.5)
    assert profile.among([]).batches == [1]
    for _ in range(64):
        profile.observe(2, 12.0)
    assert profile.among([1, 2]).seconds(2) == pytest.approx(12.0), "as it is now"


def test_answers_while_it_grows(tiny_base: TinyBase, tmp_path: Path) -> None:
    """In any company while larger batches come: every request is answered."""
    backend = Grows(8)
    harness = Harness(tiny_base, tmp_path, backend=backend, max_batch=8)

    async def scenario(engine: StepEngine) -> None:
        harness.publish("new", change=0.9)
        for sizes in (set(), {4}, {2, 8}):
            asked = [request(model="new", seeds=tuple(range(1, count + 1))) for count in (1, 3, 7)]
            if backend.networks and len(backend.networks) > 1:
                backend.networks[-1].sizes |= sizes
            answers = await asyncio.gather(*map(engine.generate, asked))
            assert [len(each) for each in answers] == [1, 3, 7]
        assert backend.networks[-1].waited == []

    harness.run(scenario)
