"""The interface of a family: a text-to-image model in parts.

A family is one file in this folder, which defines one subclass of `TextToImage` with a class attribute ``family``. It
needs no registration (see `weights.families.families`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from weights.contracts import StepSchedule
from weights.denoiser import Denoiser

PartName = Literal["network", "decoder", "text_encoder"]
Programs = Mapping[PartName, nn.Module]
"""Replacements of parts: each maps the same inputs as the part's module, of any batch size, to the same output."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a model's computation that a program can take over: tensors in, one tensor out, row by row.

    Apart from the batch size, shapes differ between calls only if the size of the images does.
    """

    module: nn.Module
    """Takes the tensors of ``example`` by position and returns one tensor with as many rows."""
    example: Callable[[int], tuple[Tensor, ...]]
    """Returns inputs with that many rows, like those for an image of the usual size; the same every time."""
    config: Mapping[str, Any]
    """What besides the weights determines the module's output, as plain JSON values."""


class TextToImage(ABC):
    """A text-to-image model: a denoiser in a latent space, with the encoders and the decoder around it.

    Latents are scaled to about unit variance. Images are float tensors ``(B, 3, H, W)`` in [-1, 1].
    """

    family: ClassVar[str]
    network_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[list[str]] = []
    part_names: ClassVar[tuple[PartName, ...]] = ()
    """Parts that a backend can replace by another program; see `parts`."""

    denoiser: Denoiser
    size: int
    """Default height and width in pixels."""
    default_steps: int
    """Number of steps of the undistilled model at which its quality is quoted."""
    default_guidance: float
    """Guidance scale of the undistilled model at which its quality is quoted (1.0 is off)."""
    licence: str = "unspecified"
    """Licence of the undistilled model's weights, as an SPDX expression if its folder has one."""
    extra_bytes: int = 0
    """Memory that its parts use besides parameters and buffers, such as for a compiled copy."""

    @classmethod
    def pipeline_name(cls) -> str | None:
        """The class name of the diffusers pipelines that the family loads; None if it loads no pipelines."""
        return None

    @classmethod
    @abstractmethod
    def check_source(cls, source: str | Path) -> None:
        """Check, without loading anything, that `load` takes ``source``, as far as that can be told.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: it is a model of another family.
        """

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Load the model in ``source``: a folder, or whatever else the family accepts.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: the family cannot load it, or its weights are not those that its card states.
        """

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network that distillation trains."""

    @abstractmethod
    def components(self) -> dict[str, nn.Module]:
        """Every module by name, including the network."""

    @abstractmethod
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one image's latents.

        Raises:
            ValueError: the model cannot generate images of that height and width.
        """

    def step_noise(self, noise: Tensor) -> Tensor:
        """Unit normal noise that a step adds, in the order in which diffusers' pipeline draws it for an exported student.

        Args:
            noise: ``(B, C, h, w)``, as it comes from the generator.

        Returns:
            The same numbers, ``(B, C, h, w)``. Only a pipeline that packs its latents has another order than theirs.
        """
        return noise

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The denoiser's conditions, one row per prompt; the empty prompt is the unconditional one."""

    @abstractmethod
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """One embedding per prompt in the text encoder's space: ``(N, D)``, float32, of length 1."""

    @abstractmethod
    def encode(self, pictures: Tensor) -> Tensor:
        """Encode images ``(B, 3, H, W)`` in [-1, 1] to latents of about unit variance."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images ``(B, 3, H, W)`` in [-1, 1], float32."""

    @abstractmethod
    def render(self, latents: Tensor) -> Tensor:
        """Differentiable `decode`, for losses on images; the gradient passes through the clamping."""

    @abstractmethod
    def with_network(self, network: nn.Module) -> Self:
        """This model with another network; every other component is shared, not copied."""

    @abstractmethod
    def copy(self) -> Self:
        """This model with a copy of the network; every other component is shared."""

    def with_random_network(self, changes: Mapping[str, Any]) -> Self:
        """This model with a randomly initialised network of another shape, such as a smaller student.

        Args:
            changes: settings of the network's configuration that differ from this one's.

        Raises:
            ValueError: the network has no such setting, does not allow that value, or has a fixed shape.
        """
        raise ValueError(f"network: family {self.family!r} supports only its own network")

    def with_guidance_embedding(self) -> Self:
        """This model with a copy of the network that also embeds a guidance scale, without effect until it is trained.

        Raises:
            TypeError: the family's networks cannot embed one.
        """
        raise TypeError(f"networks of family {self.family!r} cannot be conditioned on a guidance scale")

    @abstractmethod
    def save_network(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the network to ``folder`` as safetensors."""

    def save_adapters(self, folder: Path, layers: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Write LoRA adapters of the network to ``folder``, in the file that `load_network` looks for.

        Args:
            folder: where to write.
            layers: the adapters' weights, under peft's names.
            config: peft's configuration of the adapters.

        Raises:
            TypeError: the family's networks take no adapters.
        """
        raise TypeError(f"networks of family {self.family!r} do not support LoRA adapters")

    @abstractmethod
    def load_network(self, folder: Path) -> Self:
        """This model with the network that `save_network` wrote, or with the folder's LoRA adapters merged in."""

    def with_loras(self, loras: Sequence[tuple[Path, float]]) -> Self:
        """This model with a copy of the network into which LoRA adapters are merged, one after another.

        Args:
            loras: folders with adapters for this network, as `save_adapters` writes them, each with the scale to merge
                them at (1.0 is as trained).

        Raises:
            TypeError: the family's networks take no adapters.
            ValueError: a folder has no adapters for this network.
        """
        raise TypeError(f"networks of family {self.family!r} do not support LoRA adapters")

    @abstractmethod
    def export(self, folder: Path, schedule: StepSchedule) -> None:
        """Write a self-contained diffusers pipeline that does this schedule's consistency sampling without our code.

        Raises:
            ValueError: diffusers has no such pipeline, or none with such a schedule.
        """

    def parts(self) -> dict[PartName, Part]:
        """The parts in `part_names`, as computed by this model's own modules, whatever programs replace them."""
        return {}

    @property
    def programs(self) -> Programs:
        """The programs that currently replace parts."""
        return {}

    def with_programs(self, programs: Programs, *, keep_network: bool = True) -> Self:
        """This model with programs in place of parts; everything else is shared with this one, not copied.

        Args:
            programs: replacements by part name. Other parts are run by the model's own modules.
            keep_network: whether `network` keeps its weights. Without them the model can only generate; its parameters
                keep names, shapes and dtypes, but are on torch's meta device.

        Raises:
            ValueError: the model has no such part, or would be left without its network.
        """
        if programs or not keep_network:
            raise ValueError(f"family {self.family!r} has no parts that another program could run")
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move every component, and return this model."""
        for module in self.components().values():
            module.to(device)
            if dtype is not None:
                module.to(dtype)
        self.denoiser.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the network's weights."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return next(self.network.parameters()).dtype
