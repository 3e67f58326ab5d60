"""Checkpoints: what is written comes back bit for bit, and nothing but a checkpoint of ours is read."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distillers.checkpoint import (
    load_checkpoint,
    pack_module,
    pack_optimizer,
    save_checkpoint,
    unpack_module,
    unpack_optimizer,
)


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, 3), float(step))).square().sum().backward()
        optimizer.step()


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    moments, hyper = pack_optimizer(optimizer, "adam")
    save_checkpoint(tmp_path / "c.safetensors", {**pack_module(model, "model"), **moments}, {"adam": hyper, "step": 3})
    advance(model, optimizer, 4)
    tensors, state = load_checkpoint(tmp_path / "c.safetensors")
    fresh, fresh_optimizer = trained(0)
    unpack_module(fresh, "model", tensors)
    unpack_optimizer(fresh_optimizer, "adam", tensors, state["adam"])
    assert state["step"] == 3
    assert not torch.equal(fresh.weight, model.weight)
    advance(fresh, fresh_optimizer, 4)
    assert torch.equal(fresh.weight, model.weight)
    assert torch.equal(fresh.bias, model.bias)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"x": torch.ones(2)}, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distillers.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"x": torch.zeros(2)}, {"step": 2})
    assert load_checkpoint(path)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3)
    save_checkpoint(tmp_path / "c.safetensors", {"a": x, "b": x.T, "c": x}, {})
    tensors, _ = load_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(tensors["b"], x.T)
    assert torch.equal(tensors["c"], x)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file({"x": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="no training state"):
        load_checkpoint(weights)
    save_checkpoint(tmp_path / "c.safetensors", {"x": torch.ones(100)}, {})
    half = tmp_path / "half.safetensors"
    half.write_bytes((tmp_path / "c.safetensors").read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(half)


def test_packing_copies_nothing_that_training_then_changes(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    before = copy.deepcopy(model.state_dict())
    save_checkpoint(tmp_path / "c.safetensors", pack_module(model, "m"), {})
    advance(model, optimizer, 1)
    assert torch.equal(load_checkpoint(tmp_path / "c.safetensors")[0]["m.weight"], before["weight"])
