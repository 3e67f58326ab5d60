"""CUDA graphs, where there is a GPU to capture them on."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distillers.checkpoint import pack_optimizer
from distillers.graphs import Replayed
from distillers.muon import Muon

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@gpu
def test_a_replay_is_the_function_on_other_inputs() -> None:
    first, second = (torch.full((2,), value, device="cuda") for value in (1.0, 5.0))
    replayed = Replayed(lambda x, y: x * y + 1, first, second)
    assert replayed(second, second).tolist() == [26.0, 26.0]
    assert replayed(first, second).tolist() == [6.0, 6.0]


@gpu
def test_a_captured_step_trains_as_one_that_is_not() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)).cuda()
    theirs = copy.deepcopy(ours)

    def step_of(network: nn.Module) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        rate = torch.tensor(0.0, device="cuda")
        optimizer = Muon(network.parameters(), lr=rate, betas=(0.0, 0.0), momentum=0.0, capturable=True)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = network(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return rate, step

    inputs = torch.randn(5, 8, 16, device="cuda")
    rate, step = step_of(ours)
    replayed = Replayed(step, inputs[0])  # its steps go by a rate of 0
    rate.fill_(1e-2)
    other_rate, other = step_of(theirs)
    other_rate.fill_(1e-2)
    for x in inputs:
        torch.testing.assert_close(replayed(x), other(x), rtol=1e-3, atol=1e-5)


def test_a_rate_that_lies_on_the_device_is_a_number_in_a_checkpoint() -> None:
    weight = nn.Parameter(torch.ones(4))
    _, state = pack_optimizer(torch.optim.AdamW([weight], lr=torch.tensor(0.25)), "optimizer")
    assert state["param_groups"][0]["lr"] == 0.25 and isinstance(state["param_groups"][0]["lr"], float)
