"""FLUX.1: any diffusers `FluxPipeline` (dev, schnell and their fine-tunes), from a folder or the hub.

A transformer that predicts the flow ``eps - x_0`` along straight lines, and is told the prompt by a CLIP's vector and a
T5's states. FLUX.1-dev is also told a guidance scale, and answers as guided in one evaluation; schnell is told none.

A scheduler with ``use_dynamic_shifting`` (dev's) has a noise schedule for every size. A family has one: the one at the
model's usual size, 1024 pixels unless the folder's fewstep.json gives another ``size``. At other sizes diffusers draws with
another shift than this family does.
"""

from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, ModelMixin
from torch import Tensor, nn

from weights.families.base import Programs
from weights.flow_pipelines import FlowModel
from weights.flux import PATCH, FluxDenoiser, FluxNetwork, unpacked
from weights.pipelines import LORA_FILE
from weights.prompts import in_parts, keep_wide_layers, padded_states
from weights.quiet import quiet

LENGTHS = {True: 512, False: 256}
"""T5's tokens, by whether the network embeds guidance: dev's and schnell's, as their authors' code has them."""


class Flux(FlowModel):
    """A `FluxPipeline` in parts."""

    family = "flux"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    network_class: ClassVar[type[ModelMixin]] = FluxTransformer2DModel
    network_module: ClassVar[type[nn.Module]] = FluxNetwork
    known_as: ClassVar[str] = "FLUX.1-dev, FLUX.1-schnell, and their fine-tunes"
    spaced_by_pipeline: ClassVar[bool] = True
    fixed: ClassVar[frozenset[str]] = frozenset(
        {
            "patch_size",
            "in_channels",
            "out_channels",
            "joint_attention_dim",
            "pooled_projection_dim",
            "guidance_embeds",
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
        "proj_mlp",
        "norm1.linear",
        "norm1_context.linear",
        "norm.linear",
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
            raise ValueError(f"the pipeline has no {', '.join(missing)}; a FLUX.1 needs both of its text encoders")
        self.text_encoder = self.pipeline.text_encoder
        self.text_encoder_2 = self.pipeline.text_encoder_2
        own = bool(self._own_network.config.guidance_embeds)
        # schnell is distilled for few steps itself.
        self.default_steps = int(self.card.get("default_steps", 50 if own else 4))
        self.default_guidance = float(self.card.get("default_guidance", 3.5 if own else 1.0))
        self.text_length = LENGTHS[own]

    def _usual_size(self) -> int:
        usual = int(self.card.get("size", self.pipeline.default_sample_size * self.scale))
        if usual <= 0 or usual % self._multiple():
            raise ValueError(f"fewstep.json: size {usual} must be a positive multiple of {self._multiple()}")
        return usual

    def _denoiser(self, network: nn.Module) -> FluxDenoiser:
        return FluxDenoiser(network, self._schedule(), "flow", self._programs.get("network"))

    def components(self) -> dict[str, nn.Module]:
        encoders = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {**super().components(), **encoders}

    @quiet
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        if dtype == torch.float16:
            keep_wide_layers(self.text_encoder_2)
        return self

    def _multiple(self) -> int:
        return self.scale * PATCH

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """See `TextToImage.latent_shape`; the network's channels are those of packed latents."""
        channels, *sides = super().latent_shape(height, width)
        return channels // PATCH**2, sides[0], sides[1]

    def step_noise(self, noise: Tensor) -> Tensor:
        """See `TextToImage.step_noise`; diffusers draws it for packed latents."""
        rows, channels, height, width = noise.shape
        return unpacked(noise.reshape(rows, -1, channels * PATCH**2), height, width)

    def _vectors(self, prompts: list[str]) -> Tensor:
        """CLIP's vectors ``(N, E)``."""
        tokenizer, encoder = self.pipeline.tokenizer, self.text_encoder
        length = self.pipeline.tokenizer_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        pooled: Tensor = encoder(tokens.input_ids.to(self.device)).pooler_output
        return pooled.to(encoder.dtype)

    def _encode_few(self, prompts: list[str]) -> tuple[Tensor, ...]:
        states = padded_states(self.pipeline.tokenizer_2, self.text_encoder_2, prompts, self.text_length)
        return states, self._vectors(prompts)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, pooled = in_parts(self._encode_few, prompts)
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """See `TextToImage.embed_prompts`; CLIP's vectors."""
        (pooled,) = in_parts(lambda few: (self._vectors(few),), prompts)
        return nn.functional.normalize(pooled.float(), dim=-1)

    def with_guidance_embedding(self) -> Self:
        """See `TextToImage.with_guidance_embedding`; only networks that embed guidance already can be told a scale.

        Raises:
            TypeError: the network is one without ``guidance_embeds``, such as schnell's.
        """
        return self.copy() if self.denoiser.embeds_guidance else super().with_guidance_embedding()

    def _merge_adapters(self, network: Any, folder: Path) -> None:
        pipeline = cast(Any, self.pipeline_class)
        state, alphas, metadata = pipeline.lora_state_dict(
            folder, weight_name=LORA_FILE, use_safetensors=True, return_alphas=True, return_lora_metadata=True
        )
        pipeline.load_lora_into_transformer(state, alphas, network, metadata=metadata)
