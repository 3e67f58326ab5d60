"""Checkpoints: what is written comes back, in the memory format that fused optimizers need, and half a file is refused."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from distillers.checkpoint import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "view": shared.T, "number": torch.tensor(3, dtype=torch.int64)}
    save_checkpoint(tmp_path / "folder" / "x.safetensors", tensors, {"step": 3, "text": "ü"})
    found, state = load_checkpoint(tmp_path / "folder" / "x.safetensors")
    assert state == {"step": 3, "text": "ü"}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"a": torch.ones(2)}, {"step": 2})
    assert load_checkpoint(path)[1] == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_is_in_its_folder_for_good_before_an_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("weights.files.sync_folder", lambda folder: synced.extend(os.listdir(folder)))
    save_checkpoint(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
    assert synced == ["x.safetensors"]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"one\.safetensors cannot be written"):
            save_checkpoint(tmp_path / "one.safetensors", {"x": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.zeros(1000)}, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no training state"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_goes_on_as_if_never_stopped(fused: bool, tmp_path: Path) -> None:
    """With channels_last weights: a fused step walks weights and moments in memory order, so the formats must agree."""

    def build() -> tuple[nn.Conv2d, torch.optim.AdamW]:
        torch.manual_seed(0)
        module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)

    def train(module: nn.Conv2d, optimizer: torch.optim.AdamW, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()

    straight, optimizer = build()
    train(straight, optimizer, 0, 6)
    stopped, optimizer = build()
    train(stopped, optimizer, 0, 3)
    moments, state = pack_optimizer(optimizer, "o")
    save_checkpoint(tmp_path / "x.safetensors", moments, state)
    resumed, optimizer = build()
    resumed.load_state_dict(stopped.state_dict())
    unpack_optimizer(optimizer, "o", *load_checkpoint(tmp_path / "x.safetensors"))
    train(resumed, optimizer, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
