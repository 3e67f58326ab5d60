"""Settings of the discriminator (`distillers.adversary`)."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from distillers.backbones import BackboneName
from distillers.methods.base import Betas, MethodConfig


class AdversaryConfig(MethodConfig):
    """Settings of the discriminator, for methods that have one. The defaults are SANA-Sprint's."""

    features: BackboneName | None = Field(
        None, description="a network of pictures to judge decoded pictures by, without noise, in place of the teacher"
    )
    feature_size: int | None = Field(
        None, ge=8, description="side to resize decoded pictures to for 'features'; that network's own when left out"
    )
    matching_weight: float = Field(
        0.0, ge=0, description="w, of whether a picture shows what was asked for, with 'features'; 0 is off"
    )
    blocks: list[str] | None = Field(
        None,
        min_length=1,
        description="teacher's blocks that get a head each, such as a UNet's 'mid_block' or a transformer's "
        "'transformer_blocks.8'; all when left out",
    )
    head_kernel: int = Field(
        3, ge=1, description="side of the residual block's kernel; 3 has the nine taps of the published head"
    )
    prompted: bool = Field(
        True,
        description="tell the critic what was asked for; off: pictures are judged by themselves, whatever the prompts",
    )
    critic_noise_mean: float = Field(
        0.1, description="mean of ln(sigma / alpha) shown to the discriminator, for latents of unit variance"
    )
    critic_noise_std: float = Field(1.0, ge=0, description="standard deviation of it")
    mismatched_share: float = Field(
        0.5, ge=0, lt=1, description="share of the fakes that are real pictures under another's prompt; 0 is off"
    )
    r1_weight: float = Field(0.0, ge=0, description="approximate R1 penalty (100 to 1000 where used); 0 is off")
    r1_noise: float = Field(0.1, gt=0, description="standard deviation of R1's disturbance")
    head_lr: float = Field(2e-6, gt=0, description="heads' learning rate")
    head_betas: Betas = Field(
        (0.0, 0.999), description="AdamW's betas of the heads; beta1 = 0 steadies the game of two"
    )

    @field_validator("head_kernel")
    @classmethod
    def _has_a_middle(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"{kernel} must be odd")
        return kernel

    @model_validator(mode="after")
    def _mismatches_are_seen(self) -> Self:
        if self.features is None and self.feature_size is not None:
            raise ValueError(
                f"feature_size: {self.feature_size} is for features, which is left out: set that, or neither"
            )
        if self.features is None and self.matching_weight > 0:
            raise ValueError(
                f"matching_weight: {self.matching_weight} is for features, which is left out: without it, mismatched_share "
                "is what teaches the heads to look at the prompt"
            )
        if self.features is not None and (self.prompted or self.blocks is not None):
            raise ValueError(
                f"features: {self.features} is told no prompt and has no teacher's blocks: set prompted to false and "
                "mismatched_share to 0, and leave blocks out"
            )
        if not self.prompted and self.mismatched_share > 0:
            raise ValueError(
                f"mismatched_share: {self.mismatched_share} must be 0 where prompted is off: no prompt is there to mismatch"
            )
        return self
