"""Stable Diffusion: any diffusers `StableDiffusionPipeline`, from a folder or the hub.

The text encoder may be CLIP's or a BERT (the bundled model's), the autoencoder `AutoencoderKL` or `AutoencoderTiny`. The
network predicts eps, v or x0 over a discrete variance-preserving schedule; its own timestep n of N is ``t = (n + 1) / N``.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from weights.bundled import resolve_base
from weights.denoiser import GUIDANCE, cond_repeat
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import DiscreteVP
from weights.families import families
from weights.families.base import Part, PartName, Programs, TextToImage
from weights.networks import read_network
from weights.quiet import quiet
from weights.unet import GUIDANCE_WIDTH, UNet, UNetDenoiser

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "fewstep.json"
"""Beside model_index.json: a base's default_steps, default_guidance and licence, where they are not the usual ones."""


PIXELS_AT_ONCE = 4 * 1024 * 1024
"""Of the pictures that go through the autoencoder together: each of its widest activations is 2 GiB in float32 then."""
FIXED = frozenset({"sample_size", "in_channels", "out_channels", "cross_attention_dim", "time_cond_proj_dim"})
"""Settings of a UNet that its latents, its text encoder and its samplers decide."""
_SCALE_WEIGHT = "time_embedding.cond_proj.weight"


class _Decoder(nn.Module):
    """Latents of about unit variance to pictures in [-1, 1], float32."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        vae = cast(Any, self.vae)
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        return cast(Tensor, vae.decode(scaled, return_dict=False)[0].float().clamp(-1, 1))


class _TextEncoder(nn.Module):
    """Hidden states ``(B, L, D)`` of tokens and, where the pipeline gives one, their mask ``(B, L)``."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.text_encoder(ids, mask)[0])


def _rows(pictures: Tensor, scale: int = 1) -> int:
    """How many of these, each as so many times larger pictures, go through the autoencoder at once."""
    return max(1, PIXELS_AT_ONCE // (pictures.shape[-2] * pictures.shape[-1] * scale * scale))


def _weightless(network: nn.Module) -> nn.Module:
    """A network like this one whose weights take no memory: all that can be asked of it is what it looks like."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}.values()
    return copy.deepcopy(network, memo={id(each): each.to("meta") for each in tensors})


def _check_kind(folder: Path, family: "type[StableDiffusion]") -> None:
    """Refuse another kind of pipeline, which diffusers would take apart as far as its components' names agree."""
    index = folder / "model_index.json"
    try:
        kind = dict(json.loads(index.read_text(encoding="utf-8"))).get("_class_name")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{index} is no pipeline's index ({error}): copy the pipeline again") from error
    if kind == family.pipeline_class.__name__:
        return
    others = {
        each.pipeline_class.__name__: name for name, each in families().items() if issubclass(each, StableDiffusion)
    }
    fix = f": family {others[kind]!r} takes it" if kind in others else ""
    raise ValueError(
        f"{folder} holds a {kind}, and family {family.family!r} takes a {family.pipeline_class.__name__} alone "
        f"({family.known_as}){fix}"
    )


def _config(module: nn.Module) -> dict[str, Any]:
    """What a module of diffusers or transformers is made from, without what tells where it lay."""
    config = cast(Any, module).config
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {"class": type(module).__name__, **{k: v for k, v in plain.items() if not k.startswith("_")}}


class StableDiffusion(TextToImage):
    """A `StableDiffusionPipeline` in parts."""

    family = "stable_diffusion"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    known_as: ClassVar[str] = "Stable Diffusion 1 and 2, and their fine-tunes"
    load_settings: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    """What its pipeline is told when it is loaded; servers have a hook of their own for what is checked."""
    usual_guidance: ClassVar[float] = 7.5
    unet_module: ClassVar[type[UNet]] = UNet
    """Takes the denoiser's inputs by position."""
    network_name = "unet"
    part_names: ClassVar[tuple[PartName, ...]] = ("network", "decoder", "text_encoder")
    lora_targets = [  # noqa: RUF012 (a constant of the class, never changed)
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
    ]

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
        self.tokenizer = self.pipeline.tokenizer
        self.text_encoder = self.pipeline.text_encoder
        self.vae = self.pipeline.vae
        self.scale = 2 ** (len(self._vae_widths()) - 1)
        self.denoiser: UNetDenoiser = self._denoiser(network or self.pipeline.unet)
        self._decode = self._programs.get("decoder", _Decoder(self.vae))
        self._encode_tokens = self._programs.get("text_encoder", _TextEncoder(self.text_encoder))
        for part in (self.vae, self.network):
            # Where it was loaded from must not be published: a machine's path.
            cast(Any, part).register_to_config(_name_or_path="")
        self.size = int(self.pipeline.unet.config.sample_size) * self.scale
        self.default_steps = int(self.card.get("default_steps", 50))
        self.default_guidance = float(self.card.get("default_guidance", self.usual_guidance))
        self.licence = str(self.card.get("licence", "unspecified"))

    def _denoiser(self, network: nn.Module) -> UNetDenoiser:
        return UNetDenoiser(network, *self._noise(), self._programs.get("network"))

    def _noise(self) -> tuple[DiscreteVP, Prediction]:
        """The schedule, and what the network predicts."""
        scheduler = self.pipeline.scheduler
        prediction = scheduler.config.get("prediction_type")
        if prediction not in _PREDICTIONS:
            raise ValueError(
                f"the scheduler's prediction_type is {prediction!r}; want one of {', '.join(_PREDICTIONS)}"
            )
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"the scheduler, {type(scheduler).__name__}, has noise that does not preserve variance; want one with "
                "alphas_cumprod, as a DDPMScheduler or an EulerDiscreteScheduler"
            )
        return DiscreteVP(scheduler.alphas_cumprod), _PREDICTIONS[prediction]

    def _vae_widths(self) -> list[int]:
        config = self.vae.config
        return list(getattr(config, "encoder_block_out_channels", None) or config.block_out_channels)

    @classmethod
    @quiet
    def load(cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        folder = resolve_base(source)
        _check_kind(folder, cls)
        pipeline = cls.pipeline_class.from_pretrained(folder, dtype=dtype, use_safetensors=True, **cls.load_settings)
        card_file = folder / CARD_FILE
        model = cls(pipeline, card=json.loads(card_file.read_text()) if card_file.is_file() else None)
        for module in model.components().values():
            module.eval().requires_grad_(False)
        return model.to(device)

    @property
    def network(self) -> nn.Module:
        return self.denoiser.unet

    @property
    def device(self) -> torch.device:
        return next(cast(nn.Module, self.vae).parameters()).device  # the network's weights may be gone

    def components(self) -> dict[str, nn.Module]:
        return {"unet": self.network, "vae": self.vae, "text_encoder": self.text_encoder}

    @quiet
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        return super().to(device, dtype)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width = height or self.size, width or self.size
        blocks = len(cast(Any, self.pipeline.unet).config.block_out_channels) - 1
        multiple = self.scale * 2**blocks
        if height % multiple or width % multiple or height <= 0 or width <= 0:
            raise ValueError(f"size {width}x{height}: width and height must be positive multiples of {multiple}")
        channels = int(self.pipeline.unet.config.in_channels)
        return channels, height // self.scale, width // self.scale

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.text_encoder.parameters()).device
        return tokens.input_ids.to(device), tokens.attention_mask.to(device)

    def _uses_mask(self) -> bool:
        """Whether the pipeline gives the text encoder its mask: diffusers' own rule, kept so that pixels agree."""
        return bool(getattr(self.text_encoder.config, "use_attention_mask", False))

    def _text_inputs(self, prompts: list[str]) -> tuple[Tensor, ...]:
        ids, mask = self._tokens(prompts)
        return (ids, mask) if self._uses_mask() else (ids,)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._encode_tokens(*self._text_inputs(prompts))}

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        ids, mask = self._tokens(prompts)
        output = self.text_encoder(ids, mask if self._uses_mask() else None)
        if self.text_encoder.config.model_type == "bert":  # sentence transformers average the tokens
            weight = mask.unsqueeze(-1).float()
            pooled = (output[0].float() * weight).sum(1) / weight.sum(1)
        else:
            pooled = output.pooler_output.float()
        return nn.functional.normalize(pooled, dim=-1)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        return torch.cat([self._encode(part) for part in torch.split(pictures, _rows(pictures))])

    def _encode(self, pictures: Tensor) -> Tensor:
        output = self.vae.encode(pictures.to(self.device, self.vae.dtype))
        latents = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
        return cast(Tensor, latents.float() * self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self._decode(part) for part in torch.split(latents, _rows(latents, self.scale))])

    def render(self, latents: Tensor) -> Tensor:
        vae: Any = self.vae
        pictures: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float()
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
                f"programs for {sorted(programs)}: want some of {self.part_names}, and the network's to drop it"
            )
        network = self.network if keep_network else _weightless(self.network)
        return type(self)(self.pipeline, network, self.card, dict(programs))

    def parts(self) -> dict[PartName, Part]:
        unet, vae, text_encoder = self.network, self.vae, self.text_encoder
        return {
            "network": Part(module=self.unet_module(unet), example=self._network_example, config=_config(unet)),
            "decoder": Part(module=_Decoder(vae), example=self._latents_example, config=_config(vae)),
            "text_encoder": Part(
                module=_TextEncoder(text_encoder), example=self._text_example, config=_config(text_encoder)
            ),
        }

    def _latents_example(self, rows: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(rows, *self.latent_shape(), generator=generator).to(self.device),)

    def _network_example(self, rows: int) -> tuple[Tensor, ...]:
        (x_t,) = self._latents_example(rows)
        cond = cond_repeat(self.encode_prompts([""]), rows)
        cond[GUIDANCE] = torch.linspace(1, 8, rows, device=self.device)
        return self.denoiser.inputs(x_t, torch.linspace(1, 1 / rows, rows, device=self.device), cond)

    def _text_example(self, rows: int) -> tuple[Tensor, ...]:
        return self._text_inputs([f"a picture of {row}" for row in range(rows)])

    def copy(self) -> Self:
        return self.with_network(copy.deepcopy(self.network))

    @quiet
    def with_random_network(self, changes: Mapping[str, Any]) -> Self:
        """See `TextToImage.with_random_network`; what goes in and out of the network stays as it is."""
        config = {name: value for name, value in cast(Any, self.network).config.items() if not name.startswith("_")}
        unknown = sorted(set(changes) - set(config) | set(changes) & FIXED)
        if unknown:
            allowed = ", ".join(sorted(set(config) - FIXED))
            raise ValueError(f"network: {unknown} cannot be changed in a UNet2DConditionModel; use some of {allowed}")
        try:
            network = UNet2DConditionModel.from_config({**config, **changes})
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"network: no UNet2DConditionModel has {dict(changes)}: {error}") from error
        return self.with_network(network.to(self.device, self.dtype))

    @quiet
    def with_guidance_embedding(self) -> Self:
        """See `TextToImage.with_guidance_embedding`: LCM's ``time_cond_proj``, which starts at zero here."""
        network = cast(Any, self.network)
        told = UNet2DConditionModel.from_config({**network.config, "time_cond_proj_dim": GUIDANCE_WIDTH})
        told = told.to(self.device, self.dtype).train(network.training)
        missing, unexpected = told.load_state_dict(network.state_dict(), strict=False)
        assert not unexpected and set(missing) <= {_SCALE_WEIGHT}, (missing, unexpected)
        if missing:
            nn.init.zeros_(told.get_parameter(_SCALE_WEIGHT))
        return self.with_network(told)

    @quiet
    def save_network(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        # Copied with its weights where they go, so that a GPU that is full holds no second network.
        stored = {id(p): nn.Parameter(p.detach().to("cpu", dtype, copy=True), False) for p in self.network.parameters()}
        network: Any = copy.deepcopy(self.network, memo=stored)
        network.to("cpu", dtype).save_pretrained(folder / self.network_name)

    @quiet
    def load_network(self, folder: Path) -> Self:
        if (folder / LORA_FILE).is_file():
            return self.with_loras([(folder, 1.0)])
        network = read_network(UNet2DConditionModel, folder / self.network_name, self.device, self.dtype)
        return self.with_network(network)

    @quiet
    def with_loras(self, loras: Sequence[tuple[Path, float]]) -> Self:
        network: Any = copy.deepcopy(self.network)
        for folder, scale in loras:
            pipeline = cast(Any, self.pipeline_class)
            state, alphas, metadata = pipeline.lora_state_dict(
                folder,
                weight_name=LORA_FILE,
                use_safetensors=True,
                return_lora_metadata=True,
                unet_config=network.config,
            )
            pipeline.load_lora_into_unet(state, alphas, network, metadata=metadata)
            network.fuse_lora(scale)
            network.unload_lora()
        return self.with_network(network.to(self.device, self.dtype).eval().requires_grad_(False))

    @quiet
    def export(self, folder: Path, times: list[float]) -> None:
        timesteps = [round(t * self.denoiser.schedule.num_train) - 1 for t in times]
        config = {k: v for k, v in self.pipeline.scheduler.config.items() if not k.startswith("_")}
        config["thresholding"] = False  # a student's x_0 is taken as it is
        scheduler = LCMScheduler.from_config(config, original_inference_steps=len(timesteps))
        scheduler.set_timesteps(len(timesteps))
        if scheduler.timesteps.tolist() != timesteps:
            raise ValueError(
                f"diffusers' LCMScheduler draws {len(timesteps)} steps at {scheduler.timesteps.tolist()}, this student at "
                f"{timesteps}: export a step count whose timesteps agree"
            )
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(unet=self.network, scheduler=scheduler)
        pipeline.register_to_config(_name_or_path="")
        pipeline.save_pretrained(folder)
