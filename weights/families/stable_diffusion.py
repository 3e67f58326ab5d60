"""Stable Diffusion: any diffusers `StableDiffusionPipeline`, from a folder or the hub.

The text encoder may be CLIP's or a BERT (the bundled model's), the autoencoder `AutoencoderKL` or `AutoencoderTiny`. The
network predicts eps, v or x0 over a discrete variance-preserving schedule; its own timestep n of N is ``t = (n + 1) / N``.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from weights.bundled import resolve_base
from weights.denoiser import GUIDANCE, Cond, Denoiser
from weights.diffusion.parameterizations import Prediction, to_x0
from weights.diffusion.schedules import DiscreteVP, expand
from weights.families.base import TextToImage

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "fewstep.json"
"""Beside model_index.json: a base's default_steps, default_guidance and licence, where they are not the usual ones."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars, and their remarks on components that are not Stable Diffusion's usual ones."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


SIDES = ("down_blocks", "up_blocks")
MIDDLE = ("mid_block",)
"""A UNet's blocks by the names that the network itself gives them."""


FIXED = frozenset({"sample_size", "in_channels", "out_channels", "cross_attention_dim", "time_cond_proj_dim"})
"""Settings of a UNet that its latents, its text encoder and its samplers decide."""
_SCALE_WEIGHT = "time_embedding.cond_proj.weight"
GUIDANCE_WIDTH = 256
"""Of a guidance scale's embedding, as in LCM's public weights."""


def embedded_scale(scale: Tensor) -> Tensor:
    """Guidance scales ``(B,)`` as sines and cosines ``(B, 256)``: what diffusers' pipelines give as ``timestep_cond``.

    Their frequencies are a timestep embedding's, of ``1000 (w - 1)`` (LCM, https://arxiv.org/abs/2310.04378, section 4.3,
    whose w is one less).
    """
    half = GUIDANCE_WIDTH // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * -(math.log(10000.0) / (half - 1)))
    phase = (scale.float() - 1).unsqueeze(1) * 1000.0 * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=1)


class _Enough(Exception):
    """Ends a forward pass once the features that were asked for are there."""


class UNetDenoiser(Denoiser):
    """A `UNet2DConditionModel` as a denoiser; ``cond`` is ``{"encoder_hidden_states": (B, L, D)}``."""

    schedule: DiscreteVP

    def __init__(self, unet: nn.Module, schedule: DiscreteVP, prediction: Prediction) -> None:
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.prediction = prediction

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        output = self._call(x_t, t, cond)
        alpha, sigma = (expand(c, x_t) for c in (self.schedule.alpha(t), self.schedule.sigma(t)))
        return to_x0(output.float(), x_t.float(), alpha, sigma, self.prediction)

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        with self._recording(MIDDLE, stop=False) as features:
            return self(x_t, t, cond), features

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        return self.block_features(x_t, t, cond, MIDDLE)

    def block_features(self, x_t: Tensor, t: Tensor, cond: Cond, blocks: Sequence[str]) -> list[Tensor]:
        with self._recording(blocks, stop=True) as features:
            try:
                self._call(x_t, t, cond)
            except _Enough:
                pass
            return features

    @property
    def feature_channels(self) -> list[int]:
        return [int(cast(Any, self.unet).config.block_out_channels[-1])]

    @property
    def embeds_guidance(self) -> bool:
        return cast(Any, self.unet).config.time_cond_proj_dim is not None

    @property
    def feature_blocks(self) -> list[str]:
        unet = cast(Any, self.unet)
        down, up = ([f"{side}.{index}" for index in range(len(getattr(unet, side)))] for side in SIDES)
        return [*down, *MIDDLE, *up]

    def _call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = next(self.unet.parameters()).dtype
        states = cond["encoder_hidden_states"].to(dtype)
        told = {"timestep_cond": embedded_scale(cond[GUIDANCE]).to(dtype)} if self.embeds_guidance else {}
        index = self.schedule.native_index(t).float()
        return cast(Tensor, self.unet(x_t.to(dtype), index, states, **told, return_dict=False)[0])

    @contextmanager
    def _recording(self, blocks: Sequence[str], stop: bool) -> Iterator[list[Tensor]]:
        """Collects those blocks' outputs; with ``stop`` nothing is run after the last of them.

        After the mid block that saves the up blocks, more than half of the work.
        """
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, Any]) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)  # down blocks give their skips as well
            if stop and len(kept) == len(blocks):
                raise _Enough

        handles = [self.unet.get_submodule(block).register_forward_hook(keep) for block in blocks]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


class StableDiffusion(TextToImage):
    """A `StableDiffusionPipeline` in parts."""

    family = "stable_diffusion"
    network_name = "unet"
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
        self, pipeline: StableDiffusionPipeline, network: nn.Module | None = None, card: dict[str, Any] | None = None
    ) -> None:
        self.pipeline = pipeline
        self.card = card or {}
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder
        self.vae = pipeline.vae
        scheduler = pipeline.scheduler.config
        prediction = _PREDICTIONS[scheduler.prediction_type]
        schedule = DiscreteVP(pipeline.scheduler.alphas_cumprod)
        self.denoiser: UNetDenoiser = UNetDenoiser(network or pipeline.unet, schedule, prediction)
        parts: list[Any] = [self.vae, self.denoiser.unet]
        for part in parts:  # where it was loaded from must not be published: a machine's path
            part.register_to_config(_name_or_path="")
        self.scale = 2 ** (len(self._vae_widths()) - 1)
        self.size = int(pipeline.unet.config.sample_size) * self.scale
        self.default_steps = int(self.card.get("default_steps", 50))
        self.default_guidance = float(self.card.get("default_guidance", 7.5))
        self.licence = str(self.card.get("licence", "unspecified"))

    def _vae_widths(self) -> list[int]:
        config = self.vae.config
        return list(getattr(config, "encoder_block_out_channels", None) or config.block_out_channels)

    @classmethod
    @_quiet()
    def load(cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        folder = resolve_base(source)
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
        card_file = folder / CARD_FILE
        model = cls(pipeline, card=json.loads(card_file.read_text()) if card_file.is_file() else None)
        for module in model.components().values():
            module.eval().requires_grad_(False)
        return model.to(device)

    @property
    def network(self) -> nn.Module:
        return self.denoiser.unet

    def components(self) -> dict[str, nn.Module]:
        return {"unet": self.network, "vae": self.vae, "text_encoder": self.text_encoder}

    @_quiet()
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

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        ids, mask = self._tokens(prompts)
        return {"encoder_hidden_states": self.text_encoder(ids, mask if self._uses_mask() else None)[0]}

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
        output = self.vae.encode(pictures.to(self.device, self.vae.dtype))
        latents = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
        return cast(Tensor, latents.float() * self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return cast(Tensor, self.vae.decode(scaled, return_dict=False)[0].float().clamp(-1, 1))

    def with_network(self, network: nn.Module) -> Self:
        return type(self)(self.pipeline, network, self.card)

    def copy(self) -> Self:
        return self.with_network(copy.deepcopy(self.network))

    @_quiet()
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

    @_quiet()
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

    @_quiet()
    def save_network(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        network: Any = copy.deepcopy(self.network)
        network.to("cpu", dtype).save_pretrained(folder / self.network_name)

    @_quiet()
    def load_network(self, folder: Path) -> Self:
        if (folder / LORA_FILE).is_file():
            return self.with_loras([(folder, 1.0)])
        network: Any = UNet2DConditionModel.from_pretrained(
            folder / self.network_name, dtype=self.dtype, use_safetensors=True
        )
        return self.with_network(network.to(self.device, self.dtype).eval().requires_grad_(False))

    @_quiet()
    def with_loras(self, loras: Sequence[tuple[Path, float]]) -> Self:
        network: Any = copy.deepcopy(self.network)
        for folder, scale in loras:
            state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
                folder, weight_name=LORA_FILE, use_safetensors=True, return_lora_metadata=True
            )
            StableDiffusionPipeline.load_lora_into_unet(state, alphas, network, metadata=metadata)
            network.fuse_lora(scale)
            network.unload_lora()
        return self.with_network(network.to(self.device, self.dtype).eval().requires_grad_(False))

    @_quiet()
    def export(self, folder: Path, timesteps: list[int]) -> None:
        config = {k: v for k, v in self.pipeline.scheduler.config.items() if not k.startswith("_")}
        scheduler = LCMScheduler.from_config(config, original_inference_steps=len(timesteps))
        scheduler.set_timesteps(len(timesteps))
        if scheduler.timesteps.tolist() != timesteps:
            raise ValueError(
                f"diffusers' LCMScheduler draws {len(timesteps)} steps at {scheduler.timesteps.tolist()}, this student at "
                f"{timesteps}: export a step count whose timesteps agree"
            )
        parts = {**self.pipeline.components, "unet": self.network, "scheduler": scheduler}
        StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
