"""Stable Diffusion: any diffusers `StableDiffusionPipeline`, from a folder or the hub.

The text encoder may be CLIP or a BERT (as in the bundled model), the autoencoder `AutoencoderKL` or `AutoencoderTiny`.
The network predicts eps, v or x0 over a discrete variance-preserving schedule; its timestep n of N is
``t = (n + 1) / N``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import DiffusionPipeline, LCMScheduler, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from weights.contracts import StepSchedule
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import DiscreteVP
from weights.families.base import Part, PartName, Programs
from weights.pipelines import LORA_FILE, PipelineModel, plain_config
from weights.quiet import quiet
from weights.unet import GUIDANCE_WIDTH, UNet, UNetDenoiser

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SCALE_WEIGHT = "time_embedding.cond_proj.weight"
WHOLE = 1e-3
"""How far from a whole number a timestep may be: times may have gone through float32."""


class _TextEncoder(nn.Module):
    """Maps tokens, and their mask ``(B, L)`` if the pipeline uses it, to hidden states ``(B, L, D)``."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.text_encoder(ids, mask)[0])


class StableDiffusion(PipelineModel):
    """A `StableDiffusionPipeline` in parts."""

    family = "stable_diffusion"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    network_class: ClassVar[type[ModelMixin]] = UNet2DConditionModel
    network_module: ClassVar[type[nn.Module]] = UNet
    known_as: ClassVar[str] = "Stable Diffusion 1 and 2, and their fine-tunes"
    usual_guidance: ClassVar[float] = 7.5
    network_name = "unet"
    fixed: ClassVar[frozenset[str]] = frozenset(
        {"sample_size", "in_channels", "out_channels", "cross_attention_dim", "time_cond_proj_dim"}
    )
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
        super().__init__(pipeline, network, card, programs)
        self.tokenizer = self.pipeline.tokenizer
        self.text_encoder = self.pipeline.text_encoder
        self._encode_tokens = self._programs.get("text_encoder", _TextEncoder(self.text_encoder))

    @classmethod
    def _load_settings(cls, _folder: Path) -> Mapping[str, Any]:
        # The server has its own hook for a safety checker.
        return {"safety_checker": None, "requires_safety_checker": False}

    def _denoiser(self, network: nn.Module) -> UNetDenoiser:
        return UNetDenoiser(network, *self._noise(), self._programs.get("network"))

    def _noise(self) -> tuple[DiscreteVP, Prediction]:
        """The noise schedule, and what the network predicts."""
        scheduler = self.pipeline.scheduler
        prediction = scheduler.config.get("prediction_type")
        if prediction not in _PREDICTIONS:
            raise ValueError(f"the scheduler's prediction_type is {prediction!r}: use one of {', '.join(_PREDICTIONS)}")
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"the scheduler, {type(scheduler).__name__}, does not preserve variance: use one with alphas_cumprod, such "
                "as a DDPMScheduler or an EulerDiscreteScheduler"
            )
        if prediction == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
            raise ValueError(
                "the scheduler's prediction_type is 'epsilon', but with rescale_betas_zero_snr it starts from pure noise, "
                "in which eps says nothing about the image: use 'v_prediction' if the network predicts v, or turn "
                "rescale_betas_zero_snr off"
            )
        return DiscreteVP(scheduler.alphas_cumprod), _PREDICTIONS[prediction]

    def components(self) -> dict[str, nn.Module]:
        return {**super().components(), "text_encoder": self.text_encoder}

    def _multiple(self) -> int:
        return int(self.scale * 2 ** (len(self._own_network.config.block_out_channels) - 1))

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
        """Whether the text encoder receives the attention mask: diffusers' own rule, so that pixels agree."""
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
        if self.text_encoder.config.model_type == "bert":  # sentence transformers use the mean over tokens
            weight = mask.unsqueeze(-1).float()
            pooled = (output[0].float() * weight).sum(1) / weight.sum(1)
        else:
            pooled = output.pooler_output.float()
        return nn.functional.normalize(pooled, dim=-1)

    def parts(self) -> dict[PartName, Part]:
        encoder = self.text_encoder
        text = Part(module=_TextEncoder(encoder), example=self._text_example, config=plain_config(encoder))
        return {**super().parts(), "text_encoder": text}

    def _text_example(self, rows: int) -> tuple[Tensor, ...]:
        return self._text_inputs([f"a picture of {row}" for row in range(rows)])

    @quiet
    def with_guidance_embedding(self) -> Self:
        """See `TextToImage.with_guidance_embedding`: LCM's ``time_cond_proj``, initialised to zero."""
        network = cast(Any, self.network)
        told = UNet2DConditionModel.from_config({**network.config, "time_cond_proj_dim": GUIDANCE_WIDTH})
        told = told.to(self.device, self.dtype).train(network.training)
        missing, unexpected = told.load_state_dict(network.state_dict(), strict=False)
        assert not unexpected and set(missing) <= {_SCALE_WEIGHT}, (missing, unexpected)
        if missing:
            nn.init.zeros_(told.get_parameter(_SCALE_WEIGHT))
        return self.with_network(told)

    def _merge_adapters(self, network: Any, folder: Path) -> None:
        pipeline = cast(Any, self.pipeline_class)
        state, alphas, metadata = pipeline.lora_state_dict(
            folder,
            weight_name=LORA_FILE,
            use_safetensors=True,
            return_lora_metadata=True,
            unet_config=network.config,
        )
        pipeline.load_lora_into_unet(state, alphas, network, metadata=metadata)

    def _student_scheduler(self, schedule: StepSchedule) -> Any:
        if schedule.network_times[1:] != schedule.timesteps[1:]:
            raise ValueError(
                f"the student's network is told t = {schedule.network_times} for states at {schedule.timesteps}, but after "
                "the first step diffusers' LCMScheduler tells it the time to which the step before has noised the state: "
                "serve it, or export a schedule whose conditioning times differ in the first step alone"
            )
        timesteps = self._timesteps(schedule.network_times)
        config = {k: v for k, v in self.pipeline.scheduler.config.items() if not k.startswith("_")}
        config |= {"thresholding": False, "clip_sample": False}  # a student's x_0 is not clipped
        config |= self._ending_at(timesteps[0])
        scheduler = LCMScheduler.from_config(config, original_inference_steps=len(timesteps))
        scheduler.set_timesteps(len(timesteps))
        if scheduler.timesteps.tolist() != timesteps:
            raise ValueError(
                f"diffusers' LCMScheduler runs {len(timesteps)} steps at {scheduler.timesteps.tolist()}, this student at "
                f"{timesteps}: export more steps, at evenly spaced times, and give that pipeline timesteps={timesteps} "
                "in place of num_inference_steps"
            )
        return scheduler

    def _timesteps(self, times: list[float]) -> list[int]:
        """The network's timesteps, which LCMScheduler knows as whole numbers alone."""
        count = self.denoiser.schedule.num_train
        off = [t for t in times if abs(t * count - round(t * count)) > WHOLE]
        if off:
            raise ValueError(
                f"the student's network is told t = {off}, between two of the {count} timesteps that diffusers' "
                f"LCMScheduler knows: serve it, or export a step count whose times are multiples of 1 / {count}"
            )
        return [round(t * count) - 1 for t in times]

    def _ending_at(self, timestep: int) -> dict[str, Any]:
        """Settings of a scheduler whose last timestep, at which LCMScheduler takes its first step, is this one.

        That step's state is unit noise whatever the timestep: the schedule preserves variance. So a student whose first
        step is told an earlier time needs no more than a shorter schedule.
        """
        betas = self.pipeline.scheduler.betas
        if timestep == len(betas) - 1:
            return {}
        kept = betas[: timestep + 1].tolist()
        # The betas are those already rescaled, if any are.
        return {"num_train_timesteps": len(kept), "trained_betas": kept, "rescale_betas_zero_snr": False}
