"""Extractors: the bundled one sees what people see; the others run, or say clearly why not."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, Dinov2Config, Dinov2Model

from distillers.emoji.data import load_pictures, load_records
from distillers.evaluation import features, metrics


@pytest.fixture(scope="module")
def lite() -> features.Extractor:
    return features.extractor("efficientnet-lite0")


def blurred(pictures: Tensor) -> Tensor:
    small = torch.nn.functional.avg_pool2d(pictures.float(), 8)
    return torch.nn.functional.interpolate(small, scale_factor=8, mode="bilinear").round().to(torch.uint8)


def test_worse_pictures_are_farther_from_real_ones(lite: features.Extractor) -> None:
    records = [r for r in load_records() if r.category == "food & drink" and not r.skin_tone][:96:4]
    pictures = load_pictures(records)
    noise = torch.randint(-60, 61, pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = (pictures.int() + noise).clamp(0, 255).to(torch.uint8)
    real, other, bad, worse = (lite(p) for p in (pictures[::2], pictures[1::2], blurred(pictures[1::2]), noisy[1::2]))
    assert real.shape == (12, 1280)
    floor = metrics.kernel_distance(other, real)
    assert floor.low < 0 < floor.high
    for drawn in (bad, worse):
        assert metrics.kernel_distance(drawn, real).low > floor.high
        assert metrics.frechet_distance(drawn, real) > 1.2 * metrics.frechet_distance(other, real)
        assert metrics.precision_recall(real, drawn)[1] < metrics.precision_recall(real, other)[1]


def test_a_picture_has_the_same_features_in_every_batch_and_reports_progress(lite: features.Extractor) -> None:
    pictures = load_pictures(load_records()[:3])
    done: list[int] = []
    together = lite(pictures, done.append)
    assert torch.allclose(together[1:2], lite(pictures[1:2]), atol=1e-3)
    assert done == [3]
    assert not together.requires_grad


def test_what_is_no_picture_is_refused(lite: features.Extractor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        lite(torch.rand(2, 3, 8, 8))
    with pytest.raises(
        ValueError, match="not a feature extractor; available: efficientnet-lite0, inception, dinov2, clip"
    ):
        features.extractor("resnet")


def test_dinov2_gives_its_class_token(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    extracted = features.DinoV2(source=str(tmp_path))(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert extracted.shape == (2, 16)


def test_clip_scores_pictures_against_prompts(tmp_path: Path) -> None:
    extractor = features.Clip.__new__(features.Clip)
    features.Extractor.__init__(extractor)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=20, max_position_embeddings=8, eos_token_id=2, **shape)
    vision = CLIPVisionConfig(image_size=224, patch_size=112, **shape)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    extractor.network = features.frozen(CLIPModel(config), "cpu")

    class Tokens(dict[str, Tensor]):
        def to(self, device: str) -> "Tokens":
            return self

    extractor.tokenizer = lambda prompts, **_: Tokens(input_ids=torch.tensor([[1, len(p), 2] for p in prompts]))
    pictures = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    extracted = extractor(pictures)
    assert torch.allclose(extracted.norm(dim=1), torch.ones(3), atol=1e-5)
    scores = extractor.score(extracted, ["a", "bb", "ccc"])
    assert scores.shape == (3,)
    assert float(scores.min()) >= 0
    assert float(scores.max()) <= 100
    alone = extractor.score(extracted[1:2], ["bb"])
    assert torch.allclose(scores[1:2], alone, atol=1e-3)


def test_missing_packages_and_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(features.Unavailable, match="--extractors"):
        features.DinoV2(source=str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(features.Unavailable, match="pip install torch-fidelity"):
        features.extractor("inception")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(features.Unavailable, match="metrics"):
        features.extractor("efficientnet-lite0")
