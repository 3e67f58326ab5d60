"""What is compiled at warm-up is all that drawing needs: a program made later would keep everybody waiting for minutes."""

import asyncio
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.engine.backends.torch_backend import TorchBackend
from service.engine.base import DiversityWish
from service.engine.step_engine import StepEngine
from tests.service.conftest import TinyBase
from tests.service.engine_help import Harness, request, until_seen


def test_nothing_is_compiled_after_the_warm_up(tiny_base: TinyBase, tmp_path: Path, monkeypatch: Any) -> None:
    """On the CPU, with a GPU's settings: compiled are the same calls, into programs that run as they are."""
    real, made = torch.compile, []

    def counted(graph: Any, inputs: Any) -> Any:
        made.append([tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor)])
        return graph.forward

    def counting(module: nn.Module, *, mode: str, **options: Any) -> Any:
        assert mode == "reduce-overhead"
        return real(module, backend=counted, **options)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    backend = TorchBackend(device=torch.device("cuda"), max_batch=2, compiled=True)
    harness = Harness(tiny_base, tmp_path, backend=backend, max_batch=2)
    harness.publish()

    async def scenario(engine: StepEngine) -> None:
        warm = len(made)
        assert warm >= 3 * 3, "text encoder, network and decoder: for one row, for two, and for one bit by bit"
        harness.publish("new", change=0.9)
        await until_seen()
        asked = [
            request(seeds=(1, 2)),
            request(prompt="blue dog", seeds=(3,), guidance_scale=4.0, steps=2),
            request(prompt="green tree", seeds=(4, 5), diversity=DiversityWish()),
            request(prompt="blue dog", seeds=(6,), steps=1, guidance_scale=0.0),
            request(prompt="red dog", seeds=(7,), guidance_scale=2.0, negative_prompt="cat"),
            request(model=tiny_base.id, prompt="green tree", seeds=(8, 9), steps=2),
            request(model="new", seeds=(10,)),
            request(seeds=(11, 12), deterministic=True),
        ]
        await asyncio.gather(*map(engine.generate, asked))
        for each in asked:
            await engine.generate(each)
        assert made[warm:] == []

    harness.run(scenario)
