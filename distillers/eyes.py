"""The feature networks of a discriminator (`distillers.adversary`): the teacher, or one pretrained on images."""

import torch
from torch import Tensor

from distillers.adversary_settings import AdversaryConfig
from distillers.backbones import BackboneName, backbone
from distillers.methods.base import Setup
from distillers.rollout import draw_lognormal_times, draw_noise
from weights.denoiser import Cond, Denoiser
from weights.diffusion.schedules import add_noise


class TeacherEye:
    """Sees noised latents through the teacher's blocks.

    A teacher without features, such as the exact one of a Gaussian mixture, is replaced by a frozen copy of the network
    that its students start from.

    Raises:
        ValueError: ``blocks`` names blocks that the teacher does not have.
    """

    def __init__(self, config: AdversaryConfig, setup: Setup) -> None:
        self.config, self.device = config, setup.device
        self.critic = _critic(setup)
        self.blocks = _chosen(config.blocks, self.critic.feature_blocks)

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws times of the noise, ``(count,)``."""
        mean, std = self.config.critic_noise_mean, self.config.critic_noise_std
        return draw_lognormal_times(count, mean, std, self.critic.schedule, generator, self.device)

    def shown(self, x: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """The network's input for images x: x noised to t."""
        return add_noise(self.critic.schedule, x, draw_noise(tuple(x.shape), generator, x.device), t)

    def maps(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Feature maps of the chosen blocks."""
        return self.critic.block_features(x_t, t, cond, self.blocks)


class PictureEye:
    """Sees decoded images, without noise, through a network pretrained on images.

    Raises:
        Unavailable: the network needs a package or weights that are not available.
        ValueError: it does not accept images of this kind.
    """

    def __init__(self, name: BackboneName, size: int | None, setup: Setup) -> None:
        self.base = setup.base
        with torch.no_grad():
            channels = self.base.render(torch.zeros(1, *setup.latent_shape, device=setup.device)).shape[1]
        self.backbone = backbone(name, size, channels, setup.device)

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        """See `TeacherEye.times`; zeros, since there is no noise."""
        return torch.zeros(count, device=generator.device)

    def shown(self, x: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """See `TeacherEye.shown`."""
        return x

    def maps(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """See `TeacherEye.maps`."""
        return self.backbone(self.base.render(x_t))


def _critic(setup: Setup) -> Denoiser:
    """The teacher, or the frozen network that replaces one without features."""
    if setup.teacher.feature_blocks:
        return setup.teacher
    stand_in = setup.new_network(False)
    stand_in.network.requires_grad_(False).eval()
    return stand_in.denoiser


def _chosen(asked: list[str] | None, available: list[str]) -> list[str]:
    """The requested blocks in execution order; all if None."""
    unknown = set(asked or ()) - set(available)
    if unknown:
        raise ValueError(f"blocks: this teacher has no {sorted(unknown)}; available: {available}")
    return [block for block in available if asked is None or block in asked]
