"""Settings of the discriminator (`distillers.adversary`)."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from distillers.backbones import BackboneName
from distillers.methods.base import Betas, MethodConfig


class AdversaryConfig(MethodConfig):
    """Settings of the discriminator, for methods that have one. The defaults are SANA-Sprint's."""

    features: BackboneName | None = Field(
        None, description="pretrained image network that judges decoded images, without noise, in place of the teacher"
    )
    feature_size: int | None = Field(
        None, ge=8, description="size to which images are resized for 'features'; that network's own if left out"
    )
    matching_weight: float = Field(
        0.0, ge=0, description="weight w of the matcher, which judges prompt alignment with 'features'; 0 turns it off"
    )
    blocks: list[str] | None = Field(
        None,
        min_length=1,
        description="the teacher's blocks that get a head each, such as a UNet's 'mid_block' or a transformer's "
        "'transformer_blocks.8'; all if left out",
    )
    head_kernel: int = Field(
        3, ge=1, description="kernel size of the residual block; 3 has the nine taps of the published head"
    )
    prompted: bool = Field(
        True,
        description="condition the discriminator on the prompt; if false, images are judged without their prompts",
    )
    critic_noise_mean: float = Field(
        0.1, description="mean of ln(sigma / alpha) that the discriminator sees, for latents of unit variance"
    )
    critic_noise_std: float = Field(1.0, ge=0, description="its standard deviation")
    mismatched_share: float = Field(
        0.5, ge=0, lt=1, description="share of the fakes that are real images with another's prompt; 0 turns it off"
    )
    r1_weight: float = Field(0.0, ge=0, description="weight of the approximate R1 penalty (usually 100 to 1000)")
    r1_noise: float = Field(0.1, gt=0, description="standard deviation of the noise in that penalty")
    head_lr: float = Field(2e-6, gt=0, description="the heads' learning rate")
    head_betas: Betas = Field(
        (0.0, 0.999), description="AdamW's betas for the heads; beta1 = 0 makes adversarial training more stable"
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
                f"feature_size: {self.feature_size} has an effect only with features: set features, or leave both out"
            )
        if self.features is None and self.matching_weight > 0:
            raise ValueError(
                f"matching_weight: {self.matching_weight} has an effect only with features: set features, or use "
                "mismatched_share instead, which also teaches the heads to use the prompt"
            )
        if self.features is not None and (self.prompted or self.blocks is not None):
            raise ValueError(
                f"features: {self.features} takes no prompt and has none of the teacher's blocks: set prompted to false "
                "and mismatched_share to 0, and leave blocks out"
            )
        if not self.prompted and self.mismatched_share > 0:
            raise ValueError(
                f"mismatched_share: {self.mismatched_share} must be 0 if prompted is false, since no prompt is used"
            )
        return self
