"""Diffusers pipelines as models in parts: what the families built on them have in common."""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from weights.autoencoder import Decoder, decoded, encoded, scale_of, split
from weights.bundled import pipeline_class_name, resolve_base
from weights.cards import check_weights, read_card
from weights.contracts import StepSchedule
from weights.denoiser import GUIDANCE, cond_repeat
from weights.families import taker_of
from weights.families.base import Part, PartName, Programs, TextToImage
from weights.network_denoiser import NetworkDenoiser
from weights.networks import read_network
from weights.quiet import quiet

LORA_FILE = "pytorch_lora_weights.safetensors"


class PipelineModel(TextToImage):
    """A diffusers pipeline in parts: text encoders, and a denoising network in an autoencoder's latent space."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    network_class: ClassVar[type[ModelMixin]]
    network_module: ClassVar[type[nn.Module]]
    """Wraps the network to take the denoiser's inputs by position."""
    known_as: ClassVar[str]
    usual_steps: ClassVar[int] = 50
    usual_guidance: ClassVar[float] = 1.0
    fixed: ClassVar[frozenset[str]]
    """Network settings that must not change: the latents, the text encoders and the samplers depend on them."""
    part_names: ClassVar[tuple[PartName, ...]] = ("network", "decoder")

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        network: nn.Module | None = None,
        card: dict[str, Any] | None = None,
        programs: Programs | None = None,
    ) -> None:
        self.pipeline: Any = pipeline
        self.card = card or {}
        self._programs: Programs = programs or {}
        self.vae = self.pipeline.vae
        self.scale = scale_of(self.vae)
        self.denoiser: NetworkDenoiser = self._denoiser(network or self._own_network)
        self._decode = self._programs.get("decoder", Decoder(self.vae))
        for part in (self.vae, self.network):
            # The path that it was loaded from must not be published.
            cast(Any, part).register_to_config(_name_or_path="")
        self.size = self._usual_size()
        self.default_steps = int(self.card.get("default_steps", self.usual_steps))
        self.default_guidance = float(self.card.get("default_guidance", self.usual_guidance))
        self.licence = str(self.card.get("licence", "unspecified"))

    @abstractmethod
    def _denoiser(self, network: nn.Module) -> NetworkDenoiser:
        """The network as a denoiser, run by the program that replaces it, if any."""

    def _usual_size(self) -> int:
        """Height and width in pixels where none are named."""
        return int(self._own_network.config.sample_size) * self.scale

    @abstractmethod
    def _multiple(self) -> int:
        """The number of pixels that an image's height and width must be multiples of."""

    @abstractmethod
    def _student_scheduler(self, schedule: StepSchedule) -> Any:
        """A diffusers scheduler that, asked for as many steps as the schedule has, does its consistency sampling.

        Raises:
            ValueError: there is none.
        """

    @abstractmethod
    def _merge_adapters(self, network: Any, folder: Path) -> None:
        """Load the folder's LoRA adapters into a network; the caller fuses them."""

    @classmethod
    def _load_settings(cls, _folder: Path) -> Mapping[str, Any]:
        """Extra arguments for loading the pipeline in that folder."""
        return {}

    @classmethod
    def _dtypes(cls, dtype: torch.dtype) -> torch.dtype | dict[str, torch.dtype]:
        """The components' dtypes when ``dtype`` is requested: one for all, or by component name with a ``default``."""
        return dtype

    @classmethod
    def pipeline_name(cls) -> str:
        return cls.pipeline_class.__name__

    @classmethod
    def check_source(cls, source: str | Path) -> None:
        _checked(source, cls)

    @classmethod
    @quiet
    def load(cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        folder = _checked(source, cls)
        card = read_card(folder)
        check_weights(folder, card)
        pipeline = cls.pipeline_class.from_pretrained(
            folder, dtype=cls._dtypes(dtype), use_safetensors=True, **cls._load_settings(folder)
        )
        model = cls(pipeline, card=card)
        for module in model.components().values():
            module.eval().requires_grad_(False)
        return model.to(device)

    @property
    def _own_network(self) -> Any:
        """The pipeline's network, which need not be the one this model uses."""
        return getattr(self.pipeline, self.network_name)

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    @property
    def device(self) -> torch.device:
        return next(cast(nn.Module, self.vae).parameters()).device  # the network may be on the meta device

    def components(self) -> dict[str, nn.Module]:
        return {self.network_name: self.network, "vae": self.vae}

    @quiet
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        return super().to(device, dtype)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width, multiple = height or self.size, width or self.size, self._multiple()
        if height % multiple or width % multiple or height <= 0 or width <= 0:
            raise ValueError(f"size {width}x{height}: width and height must be positive multiples of {multiple}")
        return int(self._own_network.config.in_channels), height // self.scale, width // self.scale

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        placed = pictures.to(self.device, self.vae.dtype)
        return torch.cat([encoded(self.vae, part) for part in split(placed)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self._decode(part) for part in split(latents, self.scale)])

    def render(self, latents: Tensor) -> Tensor:
        pictures = decoded(self.vae, latents)
        return pictures + (pictures.clamp(-1, 1) - pictures).detach()

    def with_network(self, network: nn.Module) -> Self:
        others: Programs = {name: program for name, program in self._programs.items() if name != "network"}
        return type(self)(self.pipeline, network, self.card, others)

    @property
    def programs(self) -> Programs:
        return self._programs

    def with_programs(self, programs: Programs, *, keep_network: bool = True) -> Self:
        unknown = set(programs) - set(self.part_names)
        if unknown or not (keep_network or "network" in programs):
            raise ValueError(
                f"programs for {sorted(programs)}: give some of {self.part_names}, and the network's to drop it"
            )
        network = self.network if keep_network else _weightless(self.network)
        return type(self)(self.pipeline, network, self.card, dict(programs))

    def parts(self) -> dict[PartName, Part]:
        """`TextToImage.parts`: network and decoder. Text encoders with several outputs cannot be replaced."""
        network, vae = self.network, self.vae
        return {
            "network": Part(
                module=self.network_module(network), example=self._network_example, config=plain_config(network)
            ),
            "decoder": Part(module=Decoder(vae), example=self._latents_example, config=plain_config(vae)),
        }

    def _latents_example(self, rows: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(rows, *self.latent_shape(), generator=generator).to(self.device),)

    def _network_example(self, rows: int) -> tuple[Tensor, ...]:
        (x_t,) = self._latents_example(rows)
        cond = cond_repeat(self.encode_prompts([""]), rows)
        cond[GUIDANCE] = torch.linspace(1, 8, rows, device=self.device)
        return self.denoiser.inputs(x_t, torch.linspace(1, 1 / rows, rows, device=self.device), cond)

    def copy(self) -> Self:
        return self.with_network(copy.deepcopy(self.network))

    @quiet
    def with_random_network(self, changes: Mapping[str, Any]) -> Self:
        """See `TextToImage.with_random_network`; the network's inputs and outputs cannot change."""
        config = {name: value for name, value in cast(Any, self.network).config.items() if not name.startswith("_")}
        kind = self.network_class.__name__
        unknown = sorted(set(changes) - set(config) | set(changes) & self.fixed)
        if unknown:
            allowed = ", ".join(sorted(set(config) - self.fixed))
            raise ValueError(f"network: {unknown} cannot be changed in a {kind}; use some of {allowed}")
        try:
            network = self.network_class.from_config(self._completed({**config, **changes}))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"network: no {kind} has {dict(changes)}: {error}") from error
        return self.with_network(network.to(self.device, self.dtype))

    def _completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """The network's configuration, completed by settings that follow from others."""
        return config

    @quiet
    def save_network(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        # The memo moves the copy's weights to the CPU at once, so a full GPU need not hold a second network.
        stored = {id(p): nn.Parameter(p.detach().to("cpu", dtype, copy=True), False) for p in self.network.parameters()}
        network: Any = copy.deepcopy(self.network, memo=stored)
        network.to("cpu", dtype).save_pretrained(folder / self.network_name)

    def save_adapters(self, folder: Path, layers: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.pipeline_class.save_lora_weights(
            folder,
            safe_serialization=True,
            **{f"{self.network_name}_lora_layers": layers, f"{self.network_name}_lora_adapter_metadata": config},
        )

    @quiet
    def load_network(self, folder: Path) -> Self:
        if (folder / LORA_FILE).is_file():
            return self.with_loras([(folder, 1.0)])
        network: Any = read_network(self.network_class, folder / self.network_name, self.device, self.dtype)
        return self.with_network(network)

    @quiet
    def with_loras(self, loras: Sequence[tuple[Path, float]]) -> Self:
        network: Any = copy.deepcopy(self.network)
        for folder, scale in loras:
            self._merge_adapters(network, folder)
            if not getattr(network, "peft_config", None):
                raise ValueError(
                    f"{folder / LORA_FILE} has no adapters for a {self.network_class.__name__}: their names begin with "
                    f"{self.network_name!r} and a dot, as diffusers saves them"
                )
            network.fuse_lora(scale)
            network.unload_lora()
        return self.with_network(network.to(self.device, self.dtype).eval().requires_grad_(False))

    @quiet
    def export(self, folder: Path, schedule: StepSchedule) -> None:
        scheduler = self._student_scheduler(schedule)
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(**{self.network_name: self.network, "scheduler": scheduler})
        pipeline.register_to_config(_name_or_path="")
        pipeline.save_pretrained(folder)


def plain_config(module: nn.Module) -> dict[str, Any]:
    """The configuration of a diffusers or transformers module, without private entries such as its path."""
    config = cast(Any, module).config
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {"class": type(module).__name__, **{k: v for k, v in plain.items() if not k.startswith("_")}}


def _weightless(network: nn.Module) -> nn.Module:
    """A copy of the network on the meta device: it has names, shapes and dtypes, but takes no memory."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}.values()
    return copy.deepcopy(network, memo={id(each): each.to("meta") for each in tensors})


def _checked(source: str | Path, family: type[PipelineModel]) -> Path:
    """The pipeline's folder, unless it is of another class, which diffusers would load as far as names match."""
    folder = resolve_base(source)
    kind = pipeline_class_name(folder)
    if kind == family.pipeline_name():
        return folder
    taker = taker_of(kind)
    fix = f": family {taker!r} takes it" if taker is not None else ""
    raise ValueError(
        f"{folder} holds a {kind}, and family {family.family!r} takes a {family.pipeline_name()} alone "
        f"({family.known_as}){fix}"
    )
