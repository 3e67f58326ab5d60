"""What a family gives: a text-to-image model in parts, behind one interface.

A family is one file in this folder. It defines one subclass of `TextToImage` with a class attribute ``family``; it is
found by being there (see `weights.families.families`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from weights.denoiser import Denoiser

PartName = Literal["network", "decoder", "text_encoder"]
Programs = Mapping[PartName, nn.Module]
"""What takes the place of parts: takes what their modules take, in any number of rows, and answers alike."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a model's work that another program can take over: tensors to a tensor, every row for itself.

    Shapes other than the batch's differ from call to call only where pictures of another size are drawn.
    """

    module: nn.Module
    """Takes the tensors of ``example`` by position, and answers with one tensor of as many rows."""
    example: Callable[[int], tuple[Tensor, ...]]
    """Inputs of so many rows, as drawing a picture of the usual size gives them; the same ones every time."""
    config: Mapping[str, Any]
    """What decides beside the weights what the module computes: plain values, as JSON has them."""


class TextToImage(ABC):
    """A text-to-image model: a denoiser in a latent space, and the way in and out of it.

    Latents are scaled to about unit variance. Pictures are float tensors ``(B, 3, H, W)`` in [-1, 1].
    """

    family: ClassVar[str]
    network_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[list[str]] = []
    part_names: ClassVar[tuple[PartName, ...]] = ()
    """Parts that a backend can have another program run; see `parts`."""

    denoiser: Denoiser
    size: int
    """Height and width in pixels when a request names none."""
    default_steps: int
    """Steps of the undistilled model at which its quality is quoted."""
    default_guidance: float
    """Guidance scale of the undistilled model at which its quality is quoted (1.0 is off)."""
    licence: str = "unspecified"
    """Of the undistilled model's weights, as an SPDX expression where its folder tells one."""
    extra_bytes: int = 0
    """Memory that its parts hold beside their parameters and buffers: a compiled copy of them, for instance."""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """The model in ``source``: a folder, or whatever else the family takes."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The part that distillation trains."""

    @abstractmethod
    def components(self) -> dict[str, nn.Module]:
        """Every module by name, the network among them."""

    @abstractmethod
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one picture's latents.

        Raises:
            ValueError: the model cannot draw pictures of that height and width.
        """

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The denoiser's conditions, one row a prompt; the empty prompt is the unconditional one."""

    @abstractmethod
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """One point a prompt in the text encoder's space: ``(N, D)``, float32, of length 1."""

    @abstractmethod
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures ``(B, 3, H, W)`` in [-1, 1] to latents of about unit variance."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures ``(B, 3, H, W)`` in [-1, 1], float32."""

    @abstractmethod
    def render(self, latents: Tensor) -> Tensor:
        """`decode` with its graph, for losses on pictures: values that are cut off there keep their gradient."""

    @abstractmethod
    def with_network(self, network: nn.Module) -> Self:
        """This model with another network; every other component is shared, not copied."""

    @abstractmethod
    def copy(self) -> Self:
        """This model with a copy of the network; every other component is shared."""

    def with_random_network(self, changes: Mapping[str, Any]) -> Self:
        """This model with a network of another shape, on random weights: a smaller student, to be trained from nothing.

        Args:
            changes: settings of the network's own configuration that differ from this one's.

        Raises:
            ValueError: the network has no such setting, or none of that value.
        """
        raise ValueError(f"network: family {self.family!r} draws with its own network alone")

    def with_guidance_embedding(self) -> Self:
        """This model with a copy of the network that is also told a guidance scale, which does not change its answer yet.

        Raises:
            TypeError: the family's networks cannot be told one.
        """
        raise TypeError(f"networks of family {self.family!r} cannot be told a guidance scale")

    @abstractmethod
    def save_network(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes the network into ``folder``, as safetensors."""

    def save_adapters(self, folder: Path, layers: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Writes LoRA adapters of its network into ``folder``, in the file that `load_network` looks for.

        Args:
            folder: where to.
            layers: the adapters' weights, by peft's names for them.
            config: peft's configuration of them.

        Raises:
            TypeError: the family's networks take no adapters.
        """
        raise TypeError(f"networks of family {self.family!r} take no LoRA adapters")

    @abstractmethod
    def load_network(self, folder: Path) -> Self:
        """This model with the network that `save_network` wrote, or with the LoRA adapters in the folder merged in."""

    def with_loras(self, loras: Sequence[tuple[Path, float]]) -> Self:
        """This model with a copy of the network into which LoRA adapters are merged, one after another.

        Args:
            loras: folders that each hold adapters for such a network, as `save_network` of a LoRA student wrote them, and
                the scale to merge them at: 1.0 is as they were trained.

        Raises:
            TypeError: the family's networks take no adapters.
        """
        raise TypeError(f"networks of family {self.family!r} take no LoRA adapters")

    @abstractmethod
    def export(self, folder: Path, times: list[float]) -> None:
        """Writes a self-contained pipeline for diffusers, which draws at these times, in (0, 1], without our code."""

    def parts(self) -> dict[PartName, Part]:
        """The parts of `part_names`, as this model's own modules compute them, whatever runs in their place."""
        return {}

    @property
    def programs(self) -> Programs:
        """What runs in the place of parts now."""
        return {}

    def with_programs(self, programs: Programs, *, keep_network: bool = True) -> Self:
        """This model with other programs in the place of parts; all else is shared with this one, not copied.

        Args:
            programs: by part. Parts that are not named are run by the model's own modules.
            keep_network: whether `network` still has weights. Without them the model can only draw; its parameters have
                names, shapes and dtypes, but lie on torch's meta device.

        Raises:
            ValueError: the model has no such part, or its network would be lost.
        """
        if programs or not keep_network:
            raise ValueError(f"family {self.family!r} has no parts that another program could run")
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Moves every component; returns itself."""
        for module in self.components().values():
            module.to(device)
            if dtype is not None:
                module.to(dtype)
        self.denoiser.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the network's weights lie."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network's weights are kept in."""
        return next(self.network.parameters()).dtype
