"""SANA: any diffusers `SanaPipeline` whose network has no position embedding, from a folder or the hub.

A linear transformer that predicts the flow ``eps - x_0`` in the latents of an autoencoder with 32 pixels per latent along
each side, conditioned on a Gemma 2 (https://arxiv.org/abs/2410.10629). As in diffusers' pipeline, a prompt is encoded after
an instruction to elaborate on it ("complex human instruction" in the paper), and the empty prompt without.
"""

import inspect
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin, SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn

from weights.contracts import StepSchedule
from weights.families.base import Programs
from weights.flow_pipelines import FlowModel
from weights.linear_transformer import MASK, LinearTransformer, LinearTransformerDenoiser
from weights.prompts import in_parts
from weights.quiet import quiet

WIDE = ("vae", "text_encoder")
"""Components that run in bfloat16 if float16 is requested, for its range: large activations overflow in float16."""


class Sana(FlowModel):
    """A `SanaPipeline` in parts."""

    family = "sana"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = SanaPipeline
    network_class: ClassVar[type[ModelMixin]] = SanaTransformer2DModel
    network_module: ClassVar[type[nn.Module]] = LinearTransformer
    known_as: ClassVar[str] = "SANA 0.6B and 1.6B, and their fine-tunes"
    usual_steps: ClassVar[int] = 20
    usual_guidance: ClassVar[float] = 4.5
    fixed: ClassVar[frozenset[str]] = frozenset(
        {
            "sample_size",
            "patch_size",
            "in_channels",
            "out_channels",
            "caption_channels",
            "cross_attention_dim",
            "interpolation_scale",
            "guidance_embeds",
            "guidance_embeds_scale",
            "timestep_scale",
        }
    )
    lora_targets = [  # noqa: RUF012 (a constant of the class, never changed)
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv_inverted",
        "conv_point",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
        "time_embed.linear",
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
        self.text_encoder = self.pipeline.text_encoder
        self._instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default

    @classmethod
    def _dtypes(cls, dtype: torch.dtype) -> torch.dtype | dict[str, torch.dtype]:
        return {"default": dtype, **dict.fromkeys(WIDE, torch.bfloat16)} if dtype == torch.float16 else dtype

    def _denoiser(self, network: nn.Module) -> LinearTransformerDenoiser:
        config = self._own_network.config
        if config.interpolation_scale is not None:
            raise ValueError(
                f"the network's interpolation_scale is {config.interpolation_scale}: it has a position embedding, as those "
                "for 2K and 4K images do, which students of this family cannot store; use a model whose "
                "transformer/config.json has null there, such as those for 512 and 1024 pixels"
            )
        return LinearTransformerDenoiser(network, self._schedule(), "flow", self._programs.get("network"))

    def components(self) -> dict[str, nn.Module]:
        return {**super().components(), "text_encoder": self.text_encoder}

    @quiet
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """See `TextToImage.to`; the components in `WIDE` get bfloat16 if float16 is requested."""
        super().to(device)
        if dtype is None:
            return self
        for name, module in self.components().items():
            own = torch.bfloat16 if dtype == torch.float16 and name in WIDE else dtype
            # Module.to would also round the text encoder's rotary frequencies, which transformers keeps in float32.
            for weight in module.parameters():
                weight.data = weight.data.to(own)
        return self

    def _encode_alike(self, prompts: list[str], instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        """Hidden states ``(N, L, D)`` and attention mask ``(N, L)`` of prompts after the instruction, if one is given."""
        states, mask, *_ = self.pipeline.encode_prompt(
            prompts, False, device=self.device, complex_human_instruction=instruction
        )
        return states, mask.bool()

    def _encode_few(self, prompts: list[str]) -> tuple[Tensor, ...]:
        empty = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
        told = [row for row, prompt in enumerate(prompts) if prompt.strip()]
        parts = [
            self._encode_alike([prompts[row] for row in rows], instruction)
            for rows, instruction in ((empty, None), (told, self._instruction))
            if rows
        ]
        back = torch.tensor([*empty, *told], device=self.device).argsort()
        return tuple(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """See `TextToImage.encode_prompts`; hidden states ``(N, 300, D)`` and their attention mask ``(N, 300)``, bool.

        Every prompt is encoded after the pipeline's default instruction, except an empty one, which is encoded as the
        pipeline encodes its default negative prompt. The pipeline leaves the instruction out for every negative prompt;
        here a negative prompt that is not empty gets it too, because nothing marks it as one.
        """
        states, mask = in_parts(self._encode_few, prompts)
        return {"encoder_hidden_states": states, MASK: mask}

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """See `TextToImage.embed_prompts`; the mean hidden state of a prompt's tokens, without the instruction."""
        states, mask = in_parts(lambda few: self._encode_alike(few, None), prompts)
        return nn.functional.normalize((states.float() * mask.unsqueeze(-1)).sum(1), dim=-1)

    @quiet
    def with_guidance_embedding(self) -> Self:
        """See `TextToImage.with_guidance_embedding`; SANA-Sprint's ``guidance_embedder``, whose last layer starts at 0.

        The other layers are random, so that the last one has a gradient from the start.
        """
        network = cast(Any, self.network)
        told: Any = SanaTransformer2DModel.from_config({**network.config, "guidance_embeds": True})
        told = told.to(self.device, self.dtype).train(network.training)
        # A network that embeds guidance has the same time embedding under another name.
        weights = {
            name.replace("time_embed.emb.", "time_embed."): weight for name, weight in network.state_dict().items()
        }
        missing, unexpected = told.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.startswith("time_embed.guidance_embedder.") for name in missing)
        if missing:
            for weight in told.time_embed.guidance_embedder.linear_2.parameters():
                nn.init.zeros_(weight)
        return self.with_network(told)

    def _completed(self, config: dict[str, Any]) -> dict[str, Any]:
        # The prompt's hidden states are projected to the width of the image's tokens.
        return {**config, "cross_attention_dim": config["num_attention_heads"] * config["attention_head_dim"]}

    def export(self, folder: Path, schedule: StepSchedule) -> None:
        if self.denoiser.embeds_guidance:
            raise ValueError(
                "the student's network embeds a guidance scale, which diffusers' SanaPipeline does not give it: serve the "
                "student, or train one without guidance_range to export it"
            )
        super().export(folder, schedule)
