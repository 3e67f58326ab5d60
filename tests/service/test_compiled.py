"""What is compiled at warm-up is all that drawing needs: a program made later would keep everybody waiting for minutes."""

import asyncio
from pathlib import Path
from typing import Any

import torch

from service.engine.backends.torch_backend import TorchBackend
from service.engine.step_engine import StepEngine
from tests.service.conftest import TinyBase
from tests.service.engine_help import Harness, mixture, request, until_seen


def test_nothing_is_compiled_after_the_warm_up(
    tiny_base: TinyBase, tmp_path: Path, programs: list[Any], monkeypatch: Any
) -> None:
    """On the CPU, with a GPU's settings: compiled are the same calls, into programs that run as they are."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    backend = TorchBackend(device=torch.device("cuda"), max_batch=2, compiled=True)
    harness = Harness(tiny_base, tmp_path, backend=backend, max_batch=2)
    harness.publish()

    async def scenario(engine: StepEngine) -> None:
        warm = len(programs)
        assert warm >= 3 * 3, "text encoder, network and decoder: for one row, for two, and for one bit by bit"
        assert {mode for mode, _ in programs} == {"reduce-overhead"}
        harness.publish("new", change=0.9)
        await until_seen()
        asked = [
            *mixture(tiny_base),
            request(model="new", seeds=(10,)),
            request(seeds=(11, 12), deterministic=True),
        ]
        await asyncio.gather(*map(engine.generate, asked))
        for each in asked:
            await engine.generate(each)
        assert programs[warm:] == []

    harness.run(scenario)
