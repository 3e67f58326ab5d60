"""Stable Diffusion 3 and 3.5: any diffusers `StableDiffusion3Pipeline`, from a folder or the hub.

A transformer that predicts the flow ``eps - x_0`` along straight paths (https://arxiv.org/abs/2403.03206). It is
conditioned on two CLIPs and, if its folder has one, a T5; it does not embed a guidance scale. All parts run in the
requested precision, as in diffusers, except for T5's layers that overflow in float16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from weights.families.base import Programs
from weights.flow_pipelines import FlowModel
from weights.prompts import clip_states, in_parts, keep_wide_layers, padded_states
from weights.quiet import quiet
from weights.transformer import T5_LENGTH, T5_STATES, Transformer, TransformerDenoiser


class StableDiffusion3(FlowModel):
    """A `StableDiffusion3Pipeline` in parts."""

    family = "stable_diffusion_3"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    network_class: ClassVar[type[ModelMixin]] = SD3Transformer2DModel
    network_module: ClassVar[type[nn.Module]] = Transformer
    known_as: ClassVar[str] = "Stable Diffusion 3 and 3.5, and their fine-tunes"
    usual_steps: ClassVar[int] = 28
    usual_guidance: ClassVar[float] = 7.0
    fixed: ClassVar[frozenset[str]] = frozenset(
        {
            "sample_size",
            "patch_size",
            "in_channels",
            "out_channels",
            "joint_attention_dim",
            "pooled_projection_dim",
            "pos_embed_max_size",
            "caption_projection_dim",
        }
    )
    lora_targets = [  # noqa: RUF012 (a constant of the class, never changed)
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "norm1.linear",
        "norm1_context.linear",
        "proj_out",
    ]

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        network: nn.Module | None = None,
        card: dict[str, Any] | None = None,
        programs: Programs | None = None,
    ) -> None:
        super().__init__(pipeline, network, card, programs)
        missing = [name for name in ("text_encoder", "text_encoder_2") if getattr(self.pipeline, name) is None]
        if missing:
            raise ValueError(
                f"the pipeline has no {', '.join(missing)}; of its text encoders, only text_encoder_3 may be left out"
            )
        self.text_encoder = self.pipeline.text_encoder
        self.text_encoder_2 = self.pipeline.text_encoder_2
        self.text_encoder_3 = self.pipeline.text_encoder_3

    @classmethod
    def _load_settings(cls, folder: Path) -> Mapping[str, Any]:
        # Components missing from a pipeline's index must be passed to diffusers as None.
        third = ("text_encoder_3", "tokenizer_3")
        return {} if (folder / third[0]).is_dir() else dict.fromkeys(third)

    def _denoiser(self, network: nn.Module) -> TransformerDenoiser:
        return TransformerDenoiser(network, self._schedule(), "flow", self._programs.get("network"))

    def components(self) -> dict[str, nn.Module]:
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        encoders = {name: getattr(self.pipeline, name) for name in names}
        return {**super().components(), **{name: each for name, each in encoders.items() if each is not None}}

    @quiet
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        if dtype == torch.float16 and self.text_encoder_3 is not None:
            keep_wide_layers(self.text_encoder_3)
        return self

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """See `TextToImage.latent_shape`; the size is also limited by the network's position embedding."""
        shape = super().latent_shape(height, width)
        most = self._multiple() * int(self._own_network.config.pos_embed_max_size)
        if max(shape[1:]) * self.scale > most:
            raise ValueError(
                f"size {shape[2] * self.scale}x{shape[1] * self.scale}: width and height must be at most {most}, since the "
                "network has no positions beyond"
            )
        return shape

    def _clip(self, prompts: list[str], which: str = "") -> tuple[Tensor, Tensor]:
        """One CLIP's hidden states ``(N, L, D)``, with the first tokenizer's L, and pooled embeddings ``(N, E)``."""
        tokenizer, encoder = getattr(self.pipeline, f"tokenizer{which}"), getattr(self.pipeline, f"text_encoder{which}")
        states, pooled = clip_states(tokenizer, encoder, prompts, self.pipeline.tokenizer_max_length)
        assert pooled is not None, "a CLIPTextModelWithProjection"
        return states, pooled

    def _encode_few(self, prompts: list[str]) -> tuple[Tensor, ...]:
        (first, one), (second, other) = self._clip(prompts), self._clip(prompts, "_2")
        clips = torch.cat([first, second], dim=-1), torch.cat([one, other], dim=-1)
        if self.text_encoder_3 is None:
            return clips
        return *clips, padded_states(self.pipeline.tokenizer_3, self.text_encoder_3, prompts, T5_LENGTH)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, pooled, *t5 = in_parts(self._encode_few, prompts)
        return {"encoder_hidden_states": states, "text_embeds": pooled, **({T5_STATES: t5[0]} if t5 else {})}

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """See `TextToImage.embed_prompts`; uses the second, larger CLIP's space."""
        (pooled,) = in_parts(lambda few: (self._clip(few, "_2")[1],), prompts)
        return nn.functional.normalize(pooled.float(), dim=-1)

    def _completed(self, config: dict[str, Any]) -> dict[str, Any]:
        # Image and prompt tokens have the same width.
        return {**config, "caption_projection_dim": config["num_attention_heads"] * config["attention_head_dim"]}
