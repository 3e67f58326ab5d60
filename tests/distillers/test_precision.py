"""The device of a command-line option."""

from argparse import ArgumentTypeError

import pytest
import torch

from distillers.precision import device_name


@pytest.mark.parametrize(
    ("count", "given", "says"),
    [
        (0, "cuda", r"'cuda' was requested, but torch finds 0 CUDA GPU\(s\): use one of these, or 'cpu'"),
        (2, "cuda:2", r"'cuda:2' was requested, but torch finds 2 CUDA GPU\(s\)"),
        (2, "gpu", "'gpu' is no device: use 'cpu', 'cuda' or 'cuda:N'"),
        (2, "cuda:x", "'cuda:x' is no device"),
        (2, "mps", "cannot compute in float64"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    count: int, given: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ArgumentTypeError, match=says):
        device_name(given)


def test_a_device_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_name(each) for each in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
