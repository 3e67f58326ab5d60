"""A stopped evaluation goes on where it was, and nothing stale or torn is ever used."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillers.evaluation.cache import Batch, Cache, default_root, digest_modules, digest_tensor
from distillers.evaluation.features import Extractor

DRAWINGS = [(f"prompt {number}", number) for number in range(10)]


class Artist:
    """Draws a flat picture of the seed's level; counts its work, and stops where it is told."""

    def __init__(self, offset: int = 0, stop_after: int | None = None) -> None:
        self.offset, self.stop_after = offset, stop_after
        self.calls: list[list[int]] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Batch:
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(list(seeds))
        levels = torch.tensor([seed * 10 + self.offset for seed in seeds], dtype=torch.uint8)
        return Batch(levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous(), 2)


def test_pictures_come_in_order_and_are_drawn_once(tmp_path: Path) -> None:
    done: list[int] = []
    first = Cache(tmp_path).pictures({"weights": "a"}, DRAWINGS, Artist(), batch=4, progress=done.append)
    assert first.pictures[:, 0, 0, 0].tolist() == [seed * 10 for _, seed in DRAWINGS]
    assert first.evaluations == 2
    assert first.milliseconds > 0
    assert done == [4, 4, 2]
    again = Artist()
    second = Cache(tmp_path).pictures({"weights": "a"}, DRAWINGS, again, batch=4)
    assert torch.equal(first.pictures, second.pictures)
    assert second.milliseconds == first.milliseconds
    assert again.calls == [[0]]  # only the first picture, to see that it still comes out so


def test_an_interrupted_set_goes_on_at_the_batch_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).pictures({}, DRAWINGS, Artist(stop_after=2), batch=4)
    rest = Artist()
    assert len(Cache(tmp_path).pictures({}, DRAWINGS, rest, batch=4).pictures) == 10
    assert rest.calls == [[0], [8, 9]]


def test_a_set_that_would_come_out_otherwise_is_drawn_anew(tmp_path: Path) -> None:
    Cache(tmp_path).pictures({}, DRAWINGS, Artist(), batch=4)
    changed = Cache(tmp_path).pictures({}, DRAWINGS, Artist(offset=5), batch=4)
    assert changed.pictures[:, 0, 0, 0].tolist() == [seed * 10 + 5 for _, seed in DRAWINGS]


@pytest.mark.parametrize("key", [{"weights": "b"}, {"weights": "a", "steps": 1}])
def test_other_settings_have_another_set(tmp_path: Path, key: dict[str, object]) -> None:
    Cache(tmp_path).pictures({"weights": "a"}, DRAWINGS, Artist(), batch=4)
    other = Artist()
    Cache(tmp_path).pictures(key, DRAWINGS, other, batch=4)
    assert sum(map(len, other.calls)) == 10


def test_a_torn_file_is_made_again(tmp_path: Path) -> None:
    whole = Cache(tmp_path).pictures({}, DRAWINGS, Artist(), batch=4)
    for file in sorted(tmp_path.rglob("*.safetensors"))[1:]:
        file.write_bytes(file.read_bytes()[:-7])
    again = Artist()
    assert torch.equal(Cache(tmp_path).pictures({}, DRAWINGS, again, batch=4).pictures, whole.pictures)
    assert again.calls == [[0], [4, 5, 6, 7], [8, 9]]


class Mean(Extractor):
    name, size, mean, std = "mean", 8, (0.0,) * 3, (1.0,) * 3
    calls = 0

    def embed(self, pictures: Tensor) -> Tensor:
        self.calls += 1
        return pictures.mean(dim=(2, 3))


def test_features_are_taken_once_for_the_same_pictures(tmp_path: Path) -> None:
    pictures = torch.arange(5, dtype=torch.uint8).mul(40).view(5, 1, 1, 1).expand(5, 3, 8, 8).contiguous()
    extractor, cache = Mean(), Cache(tmp_path)
    features = cache.features(extractor, pictures)
    assert torch.allclose(features[:, 0], torch.arange(5) * 40 / 255)
    assert torch.equal(cache.features(extractor, pictures.clone()), features)
    assert extractor.calls == 1
    cache.features(extractor, pictures.flip(0))
    assert extractor.calls == 2


def test_digests_see_values_shapes_and_names() -> None:
    one = torch.nn.Linear(2, 2)
    before = digest_modules({"unet": one})
    assert before == digest_modules({"unet": one}) != digest_modules({"vae": one})
    with torch.no_grad():
        one.weight[0, 0] += 1e-6
    assert digest_modules({"unet": one}) != before
    assert digest_tensor(torch.zeros(2, 3)) != digest_tensor(torch.zeros(3, 2))
    assert digest_tensor(torch.tensor(1.0)) != digest_tensor(torch.tensor(2.0))


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "fewstep" / "evaluation"
