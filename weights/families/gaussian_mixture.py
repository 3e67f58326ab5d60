r"""Gaussian mixtures: a teacher whose x_0, score and density are known in closed form.

Losses, samplers and whole methods are tested against it. The formulas are in `weights.diffusion.mixture`; points are
"latents" of shape ``(B, D, 1, 1)``, and ``cond`` is ``{"label": (B,)}``, where -1 is unconditional.

A mixture has no trainable network, so the family provides a small MLP denoiser for students and fake scores, which
`fit` trains to match a mixture.
"""

import copy as copying
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weights.contracts import StepSchedule
from weights.denoiser import GUIDANCE, Cond, Denoiser
from weights.diffusion.mixture import UNCONDITIONAL, Mixture, log_ratio
from weights.diffusion.parameterizations import Prediction, to_x0
from weights.diffusion.schedules import DiscreteVP, Schedule, add_noise, expand
from weights.families.base import TextToImage

__all__ = [
    "MLP",
    "PRESETS",
    "UNCONDITIONAL",
    "AnalyticDenoiser",
    "GaussianMixture",
    "MLPDenoiser",
    "Mixture",
    "fit",
    "log_ratio",
]

_FILE = "diffusion_pytorch_model.safetensors"


def _line() -> Mixture:
    return Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-0.5], [1.0]]), torch.tensor([0.1, 0.2]), torch.arange(2))


def _ring() -> Mixture:
    angles = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    means = 1.4 * torch.stack([angles.cos(), angles.sin()], dim=1)  # with std 0.15, unit variance per coordinate
    return Mixture(torch.ones(8), means, torch.full((8,), 0.15), torch.arange(8))


PRESETS: dict[str, Callable[[], Mixture]] = {"line": _line, "ring": _ring}
"""By name: ``line`` is 1-D, weights .3/.7, means -.5/1, std .1/.2; ``ring`` is 2-D, 8 Gaussians, one label each."""


class AnalyticDenoiser(Denoiser):
    """The exact ``E[x_0 | x_t, label]`` of a mixture, in any schedule. It has no parameters."""

    def __init__(self, mixture: Mixture, schedule: Schedule) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The posterior mean; ``cond["label"]`` is ``(B,)``. float64 if ``x_t`` is, else float32."""
        alpha, sigma = self.schedule.alpha(t.double()), self.schedule.sigma(t.double())
        return self.mixture.x0(x_t, alpha, sigma, cond.get("label"))


class MLP(nn.Module):
    """A small residual network on points, conditioned on the noise level and a label.

    Args:
        dim: D.
        num_labels: L; label -1 has an embedding of its own.
        width: width of the hidden layers.
        depth: number of residual blocks.
        told_guidance: whether the network also embeds a guidance scale.
    """

    def __init__(self, dim: int, num_labels: int, width: int = 96, depth: int = 3, told_guidance: bool = False) -> None:
        super().__init__()
        self.config = {
            "dim": dim, "num_labels": num_labels, "width": width, "depth": depth, "told_guidance": told_guidance
        }  # fmt: skip
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.arange(-2, 4).float(), persistent=False)
        self.enter = nn.Linear(dim, width)
        self.embed_noise = nn.Sequential(nn.Linear(12, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_label = nn.Embedding(num_labels + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.leave = nn.Sequential(nn.SiLU(), nn.Linear(width, dim))
        self.embed_guidance: nn.Module | None = None
        if told_guidance:
            enter, leave = nn.Linear(1, width), nn.Linear(width, width)
            nn.init.zeros_(leave.weight)
            nn.init.zeros_(leave.bias)
            self.embed_guidance = nn.Sequential(enter, nn.SiLU(), leave)

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor, guidance_scale: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The output ``(B, D)`` and every block's ``(B, width)`` for x ``(B, D)``; the other arguments are ``(B,)``."""
        phase = c_noise.unsqueeze(1) * self.frequencies
        noise = self.embed_noise(torch.cat([phase.sin(), phase.cos()], dim=1).to(x.dtype))
        told = noise + self.embed_label(label % self.embed_label.num_embeddings)
        if self.embed_guidance is not None:
            assert guidance_scale is not None, "a network that embeds guidance is always told it"
            told = told + self.embed_guidance(guidance_scale.unsqueeze(1).to(x.dtype) - 1)
        hidden, features = self.enter(x), []
        for block in self.blocks:
            hidden = hidden + block(hidden + told)
            features.append(hidden)
        return self.leave(hidden), features


class MLPDenoiser(Denoiser):
    """An `MLP` as a denoiser, for any prediction type and schedule.

    Args:
        network: the MLP.
        schedule: its noise schedule.
        prediction: what the network predicts.
        sigma_data: the data's standard deviation, which scales the input, and for ``edm`` the output (EDM's table 1).
    """

    def __init__(self, network: MLP, schedule: Schedule, prediction: Prediction = "v", sigma_data: float = 1.0) -> None:
        super().__init__()
        self.network, self.schedule, self.prediction, self.sigma_data = network, schedule, prediction, sigma_data

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The estimate of x_0; ``cond["label"]`` is ``(B,)``."""
        return self._run(x_t, t, cond)[0]

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        """The estimate, and the middle block's output ``(B, width, 1, 1)``."""
        x0, features = self._run(x_t, t, cond)
        return x0, [features[len(features) // 2]]

    def block_features(self, x_t: Tensor, t: Tensor, cond: Cond, blocks: Sequence[str]) -> list[Tensor]:
        """These blocks' outputs, each ``(B, width, 1, 1)``."""
        features = dict(zip(self.feature_blocks, self._run(x_t, t, cond)[1], strict=True))
        return [features[block] for block in blocks]

    def _run(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        """The estimate, and every block's output."""
        alpha, sigma = self.schedule.alpha(t.double()), self.schedule.sigma(t.double())
        # Inputs of unit variance, and the noise level as an angle, which unlike the log-SNR is finite at both ends.
        c_in = torch.rsqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        dtype = self.network.enter.weight.dtype
        points = (expand(c_in, x_t) * x_t.double()).flatten(1).to(dtype)
        c_noise = torch.atan2(sigma, alpha * self.sigma_data).float()
        output, features = self.network(points, c_noise, cond["label"], cond.get(GUIDANCE))
        x0 = to_x0(output.reshape(x_t.shape), x_t, alpha, sigma, self.prediction, self.sigma_data)
        return x0, [feature.reshape(*feature.shape, 1, 1) for feature in features]

    @property
    def feature_channels(self) -> list[int]:
        return [int(self.network.config["width"])]

    @property
    def embeds_guidance(self) -> bool:
        return self.network.embed_guidance is not None

    @property
    def feature_blocks(self) -> list[str]:
        return [f"blocks.{index}" for index in range(len(self.network.blocks))]


def fit(
    denoiser: Denoiser,
    teacher: AnalyticDenoiser,
    iterations: int = 300,
    batch: int = 512,
    seed: int = 0,
    learning_rate: float = 3e-3,
) -> float:
    """Regress a denoiser's x_0 on the analytic one, to initialise a student as a copy of the teacher would.

    Labels are drawn uniformly from -1..L-1, times uniformly from [0, 1], and points from the mixture. The optimizer is
    AdamW with cosine decay. The denoiser is left in training mode, with gradients on.

    Returns:
        The mean squared error over the last tenth of the iterations.
    """
    generator = torch.Generator().manual_seed(seed)
    denoiser.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    errors: list[float] = []
    for _ in range(iterations):
        label = torch.randint(-1, teacher.mixture.num_labels, (batch,), generator=generator)
        x0 = teacher.mixture.sample(label, generator)
        t = torch.rand(batch, generator=generator)
        x_t = add_noise(teacher.schedule, x0, torch.randn(x0.shape, generator=generator), t)
        cond = {"label": label}
        loss = (denoiser(x_t, t, cond) - teacher(x_t, t, cond)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        errors.append(float(loss.detach()))
    last = errors[-max(1, iterations // 10) :]
    return sum(last) / len(last)


class GaussianMixture(TextToImage):
    """A mixture as a text-to-image model: the prompt "class 3" is label 3, the empty prompt is unconditional.

    As loaded, it denoises exactly, and its network is an untrained MLP. `with_network` and `copy` return a model that
    denoises with the MLP instead. "Images" are the points themselves.
    """

    family = "gaussian_mixture"
    network_name = "unet"
    size = 1
    default_steps = 50
    default_guidance = 1.0

    def __init__(
        self,
        mixture: Mixture,
        schedule: Schedule | None = None,
        prediction: Prediction = "v",
        network: MLP | None = None,
    ) -> None:
        self.mixture = mixture
        self.schedule = schedule or DiscreteVP.from_betas(zero_terminal_snr=True)
        self.prediction: Prediction = prediction
        self.denoiser: Denoiser = AnalyticDenoiser(mixture, self.schedule)
        if network is None:
            with torch.random.fork_rng(devices=[]):  # reproducible, and leaves the global random state alone
                torch.manual_seed(0)
                self._network = MLP(mixture.dim, mixture.num_labels)
        else:
            self._network = network
            self.denoiser = MLPDenoiser(network, self.schedule, prediction)

    @classmethod
    def check_source(cls, source: str | Path) -> None:
        if str(source) not in PRESETS:
            raise ValueError(f"no mixture is named {str(source)!r}; available: {', '.join(sorted(PRESETS))}")

    @classmethod
    def load(cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Load a preset by name.

        Raises:
            ValueError: no preset has that name.
        """
        cls.check_source(source)
        model = cls(PRESETS[str(source)]()).to(device, dtype)
        model.network.eval().requires_grad_(False)
        return model

    @property
    def network(self) -> nn.Module:
        return self._network

    def components(self) -> dict[str, nn.Module]:
        return {self.network_name: self._network}

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        if (height or 1, width or 1) != (1, 1):
            raise ValueError(f"size {width}x{height}: a mixture's points are 1x1")
        return self.mixture.dim, 1, 1

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Labels ``(N,)``: "class K" is K, "" is -1.

        Raises:
            ValueError: a prompt is neither.
        """
        return {"label": torch.tensor([self._label(prompt) for prompt in prompts], device=self.device)}

    def _label(self, prompt: str) -> int:
        found = re.fullmatch(r"class (\d+)", prompt)
        if prompt == "":
            return UNCONDITIONAL
        if found is None or int(found[1]) >= self.mixture.num_labels:
            raise ValueError(f"prompt {prompt!r}: give '' or 'class K' with K in 0..{self.mixture.num_labels - 1}")
        return int(found[1])

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """One-hot ``(N, L + 1)``; the last column is the empty prompt's."""
        labels = self.encode_prompts(prompts)["label"] % (self.mixture.num_labels + 1)
        return nn.functional.one_hot(labels, self.mixture.num_labels + 1).float()

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, latents: Tensor) -> Tensor:
        """Return the points unchanged: a mixture has no pixels to clamp to [-1, 1]."""
        return latents

    def render(self, latents: Tensor) -> Tensor:
        return latents

    def with_network(self, network: nn.Module) -> Self:
        """A model that denoises with this `MLP`, in the same schedule.

        Raises:
            TypeError: the network is not an MLP.
        """
        if not isinstance(network, MLP):
            raise TypeError(f"a Gaussian mixture's network is an MLP, got {type(network).__name__}")
        return type(self)(self.mixture, self.schedule, self.prediction, network)

    def copy(self) -> Self:
        return self.with_network(copying.deepcopy(self._network))

    def with_random_network(self, changes: Mapping[str, Any]) -> Self:
        """See `TextToImage.with_random_network`; ``width`` and ``depth`` can change."""
        unknown = sorted(set(changes) - {"width", "depth"})
        if unknown:
            raise ValueError(f"network: {unknown} cannot be changed in an MLP; use some of depth, width")
        config: dict[str, Any] = {**self._network.config, **changes}
        return self.with_network(MLP(**config).to(self.device, self.dtype))

    def with_guidance_embedding(self) -> Self:
        """See `TextToImage.with_guidance_embedding`."""
        config: dict[str, Any] = {**self._network.config, "told_guidance": True}
        told = MLP(**config).to(self.device, self.dtype)
        told.load_state_dict(self._network.state_dict(), strict=False)
        return self.with_network(told)

    def save_network(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        target = folder / self.network_name
        target.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self._network.state_dict().items()}
        save_file(state, target / _FILE)
        config: dict[str, Any] = {"_class_name": "MLP", **self._network.config}
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def load_network(self, folder: Path) -> Self:
        source = folder / self.network_name
        config = json.loads((source / "config.json").read_text())
        network = MLP(**{key: value for key, value in config.items() if not key.startswith("_")})
        network.load_state_dict(load_file(source / _FILE))
        return self.with_network(network.to(self.device, self.dtype).eval().requires_grad_(False))

    def export(self, folder: Path, schedule: StepSchedule) -> None:
        """Always raises a ValueError: diffusers has no pipeline for a mixture."""
        raise ValueError(f"a Gaussian mixture cannot be exported to {folder}: diffusers has no pipeline for it")
