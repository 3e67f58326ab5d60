"""Muon against the singular value decomposition and torch's own AdamW."""

import copy

import pytest
import torch
from torch import nn

from distillers.checkpoint import pack_optimizer, unpack_optimizer
from distillers.muon import Muon, as_matrix, is_matrix, orthogonalised


def with_gradients(seed: int = 0) -> nn.Sequential:
    """A kernel and a matrix for Muon; vectors and a narrow last layer for AdamW."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24, 32), nn.Linear(32, 3))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight)
    return network


@pytest.mark.parametrize("shape", [(24, 144), (144, 24), (32, 32)])
def test_a_matrix_is_orthogonalised(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    sizes = (left.T @ found @ right.T).diagonal()
    assert sizes[values > values[0] / 20].min() > 0.6 and sizes.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.95
    torch.testing.assert_close(orthogonalised(1000 * matrix), found, rtol=0, atol=0.02)
    assert orthogonalised(torch.zeros(shape)).abs().max() == 0


def test_matrices_of_one_shape_are_orthogonalised_together_as_each_alone() -> None:
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    together = orthogonalised(matrices)
    for one, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(found, orthogonalised(one), rtol=0, atol=0.02)


def test_weights_of_one_shape_step_each_by_its_own_gradient() -> None:
    def step(weights: list[torch.Tensor], lr: float | torch.Tensor) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        Muon(weights, lr=lr, weight_decay=0.1).step()

    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(2, 3, 16, 32, 3, 3, generator=generator)
    together = [nn.Parameter(each.clone()) for each in start]
    step([*together], 1e-2)
    alone = [nn.Parameter(each.clone()) for each in start]
    for weight, gradient in zip(alone, gradients, strict=True):
        weight.grad = gradient.clone()
        Muon([weight], lr=1e-2, weight_decay=0.1).step()
    on_device = [nn.Parameter(each.clone()) for each in start]
    step([*on_device], torch.tensor(1e-2))
    for one, other, third in zip(together, alone, on_device, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        torch.testing.assert_close(one, third, rtol=0, atol=1e-6)


def test_what_is_a_matrix() -> None:
    network = with_gradients()
    names = [name for name, weight in network.named_parameters() if is_matrix(weight)]
    assert names == ["0.weight", "2.weight"]
    kernel = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(as_matrix(kernel)[1], kernel[1].permute(1, 2, 0).flatten())


def test_a_kernel_steps_as_its_matrix_does() -> None:
    """By lr 0.2 sqrt(longer side) times the orthogonalised momentum, after weight decay."""
    network = with_gradients()
    before = copy.deepcopy(network[0].weight.detach())
    gradient = network[0].weight.grad
    assert isinstance(gradient, torch.Tensor)
    optimizer = Muon(network.parameters(), lr=1e-3, weight_decay=0.1, momentum=0.5)
    optimizer.step()
    # Nesterov's first step: gradient + momentum * (momentum * 0 + gradient).
    expected = 1e-3 * 0.2 * 144**0.5 * orthogonalised(as_matrix(1.5 * gradient))
    found = as_matrix(before * (1 - 1e-4) - network[0].weight.detach())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    momentum = optimizer.state[network[0].weight]["momentum"]
    torch.testing.assert_close(momentum, gradient, rtol=0, atol=0)


def test_the_rest_steps_as_adamw_does() -> None:
    ours, theirs = with_gradients(), with_gradients()
    rest = [weight for weight in theirs.parameters() if not is_matrix(weight)]
    mine = Muon(ours.parameters(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    reference = torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    for _ in range(3):
        mine.step()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if not is_matrix(one):
            torch.testing.assert_close(one, other)


def test_it_goes_on_from_its_packed_state_bit_for_bit() -> None:
    straight, stopped = with_gradients(), with_gradients()
    gradients = [weight.grad for weight in straight.parameters()]

    def train(network: nn.Module, optimizer: Muon, steps: int) -> None:
        for _ in range(steps):
            for weight, gradient in zip(network.parameters(), gradients, strict=True):
                weight.grad = gradient
            optimizer.step()

    train(straight, Muon(straight.parameters(), lr=1e-2), 4)
    first = Muon(stopped.parameters(), lr=1e-2)
    train(stopped, first, 2)
    tensors, state = pack_optimizer(first, "muon")
    second = Muon(stopped.parameters(), lr=1e-2)
    unpack_optimizer(second, "muon", {name: tensor.clone() for name, tensor in tensors.items()}, state)
    train(stopped, second, 2)
    for one, other in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="does not support a closure"):
        Muon(with_gradients().parameters()).step(lambda: 0.0)
