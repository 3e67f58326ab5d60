"""Warm-up: what is measured, and what happens where a batch does not fit."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from service.engine.costs import Costs
from service.engine.parts import parts_of
from service.engine.warming import measured_sizes, warm
from tests.service.conftest import TinyBase


def test_every_size_worth_it_is_measured() -> None:
    assert measured_sizes(range(1, 9)) == [1, 2, 4, 8]
    assert measured_sizes([1, 2, 4, 6]) == [1, 2, 4, 6]
    assert measured_sizes([1]) == [1]


def test_all_parts_are_called_in_all_sizes_and_measured(tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    base, student = tiny_base.model, tiny_base.model.with_guidance_embedding()
    sizes: Counter[tuple[Any, int]] = Counter()
    for model in (base, student):
        denoiser = model.denoiser
        right = denoiser.forward

        def spy(x_t: Tensor, t: Tensor, cond: Any, model: Any = model, right: Any = right) -> Tensor:
            sizes[model, len(x_t)] += 1
            found: Tensor = right(x_t, t, cond)
            return found

        monkeypatch.setattr(denoiser, "forward", spy)
    costs = Costs(range(1, 5), math.inf)
    warm(base, [student], costs)
    assert set(sizes) == {(model, size) for model in (base, student) for size in (1, 2, 4)}
    parts = parts_of(base)
    for part in (parts.text, parts.decoder, parts.network, parts_of(student).network):
        assert costs.of(part).batches == [1, 2, 3, 4]
        assert set(costs.of(part).measured) == {1, 2, 4}, "and not guessed"


def test_no_batch_is_made_that_did_not_fit(tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tiny_base.model.decode

    def decode(latents: Tensor) -> Tensor:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no room")
        return right(latents)

    monkeypatch.setattr(tiny_base.model, "decode", decode)
    costs = Costs([1, 2, 4, 8], math.inf)
    warm(tiny_base.model, [], costs)
    assert costs.of(parts_of(tiny_base.model).decoder).batches == [1, 2]
    assert costs.of(parts_of(tiny_base.model).network).batches == [1, 2, 4, 8]


def test_a_model_that_cannot_be_called_at_all_is_an_error(tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(latents: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(tiny_base.model, "decode", decode)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        warm(tiny_base.model, [], Costs([1, 2], math.inf))
