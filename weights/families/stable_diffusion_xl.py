"""SDXL: any diffusers `StableDiffusionXLPipeline`, from a folder or the hub (https://arxiv.org/abs/2307.01952).

Differences from Stable Diffusion 1 and 2: two text encoders, whose penultimate hidden states condition the network,
along with the second one's pooled embedding; conditioning on the image's sizes, which follow from the latents'; and an
autoencoder that overflows in float16, and so stays in float32 unless its configuration says otherwise. The refiner is
another kind of pipeline, and not supported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from weights.families.base import Part, PartName
from weights.families.stable_diffusion import StableDiffusion
from weights.prompts import clip_states, in_parts
from weights.quiet import quiet
from weights.unet import UNetDenoiser, UNetXL, UNetXLDenoiser


class StableDiffusionXL(StableDiffusion):
    """A `StableDiffusionXLPipeline` in parts.

    The empty prompt is encoded as zeros if the pipeline's configuration says so, as SDXL's does.
    """

    family = "stable_diffusion_xl"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    known_as: ClassVar[str] = "SDXL, its fine-tunes and smaller networks like it, but not its refiner"
    usual_guidance: ClassVar[float] = 5.0
    network_module: ClassVar[type[nn.Module]] = UNetXL
    part_names: ClassVar[tuple[PartName, ...]] = ("network", "decoder")

    @classmethod
    def _load_settings(cls, _folder: Path) -> Mapping[str, Any]:
        return {}

    @classmethod
    @quiet
    def load(cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        model = super().load(source, device, dtype)
        if model.vae.config.latents_mean is not None:
            raise ValueError(
                f"{source}: its autoencoder shifts latents by latents_mean, which family {cls.family!r} does not support"
            )
        return model

    def _denoiser(self, network: nn.Module) -> UNetDenoiser:
        return UNetXLDenoiser(network, *self._noise(), self._programs.get("network"), scale=self.scale)

    def components(self) -> dict[str, nn.Module]:
        return {**super().components(), "text_encoder_2": self.pipeline.text_encoder_2}

    @quiet
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        if self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
            self.vae.to(torch.float32)
        return self

    def parts(self) -> dict[PartName, Part]:
        """`TextToImage.parts`, without the text encoders, which have two outputs."""
        return {name: part for name, part in super().parts().items() if name in self.part_names}

    def _encoded(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Concatenated hidden states ``(B, L, D)`` of both encoders, and the second's pooled embedding ``(B, E)``."""
        states, pooled = in_parts(self._encode_few, prompts)
        return states, pooled

    def _encode_few(self, prompts: list[str]) -> tuple[Tensor, ...]:
        pipeline = self.pipeline
        both = [
            clip_states(tokenizer, encoder, prompts, tokenizer.model_max_length)
            for tokenizer, encoder in (
                (self.tokenizer, self.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
        ]
        pooled = both[1][1]
        assert pooled is not None, "a CLIPTextModelWithProjection"
        return torch.cat([states for states, _ in both], dim=-1), pooled

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, pooled = self._encoded(prompts)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            written = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
            states, pooled = states * written[:, None, None], pooled * written[:, None]
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        return nn.functional.normalize(self._encoded(prompts)[1].float(), dim=-1)
