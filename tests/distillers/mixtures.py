"""Training on a Gaussian mixture, whose scores are exact: whole methods in seconds, checked against closed forms."""

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from distillers.events import Reporter
from distillers.identity import Identity
from distillers.methods.base import Batch, Method, Setup, Step
from distillers.seeds import generator_of
from distillers.trainer import Trainer
from weights.contracts import StepSchedule, TrainSpec
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.samplers import few_step, initial_state
from weights.diffusion.schedules import DiscreteVP, Schedule
from weights.families.base import TextToImage
from weights.families.gaussian_mixture import MLP, PRESETS, AnalyticDenoiser, GaussianMixture, fit

QUIET = {"checkpoint_every": 10_000, "sample_every": 10_000}
Loss = Callable[..., Tensor]
HINGE_SWAPPED: dict[str, Callable[[Loss], Loss]] = {
    "hinge_generator_loss": lambda right: lambda fake: -right(fake),
    "hinge_discriminator_loss": lambda right: lambda real, fake: right(fake, real),
}
"""One side's loss turned round, for tests that show that it matters."""
VP = DiscreteVP.from_betas("cosine", zero_terminal_snr=True)


@lru_cache(maxsize=8)
def fitted(preset: str, schedule: Schedule, prediction: Prediction) -> GaussianMixture:
    """The preset with an MLP that has learned to denoise: what a copied teacher is elsewhere."""
    mixture = PRESETS[preset]()
    with torch.random.fork_rng(devices=[]):  # whoever asks first must find the random state as those do who ask later
        torch.manual_seed(0)
        model = GaussianMixture(mixture, schedule, prediction, MLP(mixture.dim, mixture.num_labels, width=64, depth=2))
        fit(model.denoiser, AnalyticDenoiser(mixture, schedule), iterations=200, batch=256)
    return model


def mixture_setup(preset: str = "line", schedule: Schedule = VP, prediction: Prediction = "v") -> Setup:
    """An exact teacher, with students and fake scores that start fitted to it."""
    start = fitted(preset, schedule, prediction)
    exact = GaussianMixture(PRESETS[preset](), schedule, prediction)
    exact.network.requires_grad_(False)

    def new_network(adapters: bool) -> TextToImage:
        model = start.with_network(copy.deepcopy(start.network))
        model.network.requires_grad_(True).train()
        return model

    return Setup(
        base=exact,
        uncond=exact.encode_prompts([""]),
        latent_shape=exact.latent_shape(),
        new_network=new_network,
        new_student=lambda: new_network(True),
        device=torch.device("cpu"),
    )


class MixtureFeed:
    """Unconditional conditions and exact samples."""

    def __init__(self, setup: Setup, batch_size: int = 256) -> None:
        self.base = setup.base
        self.batch_size = batch_size

    def batch(self, iteration: int, micro: int = 0, rank: int = 0) -> Batch:
        assert isinstance(self.base, GaussianMixture)
        cond = {"label": torch.full((self.batch_size,), -1)}
        real = self.base.mixture.sample(cond["label"], generator_of("feed", iteration, micro, rank)).float()
        return Batch(cond=cond, real=real, real_cond=cond)


def step_of(setup: Setup, size: int, iteration: int = 0, name: str = "", scratch: dict[str, Any] | None = None) -> Step:
    """One micro-batch of ``size`` exact samples, for the turn of that name."""
    return Step(
        iteration=iteration,
        micro=0,
        batch=MixtureFeed(setup, size).batch(iteration),
        shared=generator_of("shared", name, iteration),
        local=generator_of("local", name, iteration),
        scratch={} if scratch is None else scratch,
    )


def trainer_of(method: Method, setup: Setup, folder: Path, *, batch_size: int = 256, **train: Any) -> Trainer:
    """A trainer of the method on samples of its own mixture."""
    spec = TrainSpec.model_validate({"log_every": 10_000, "precision": "float32", "ema_decay": 0.99, **train})
    reporter = Reporter(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        method,
        MixtureFeed(setup, batch_size),
        spec,
        accelerator=Accelerator(cpu=True),
        folder=folder,
        reporter=reporter,
        identity=Identity({"of": "the test"}, frozenset(), "test"),
    )


@torch.no_grad()
def student_samples(method: Method, schedule: StepSchedule, count: int = 4096) -> Tensor:
    """What the student draws without a label, ``(count, D)``."""
    student = method.student
    generator = torch.Generator().manual_seed(7)
    shape = (count, *student.latent_shape())

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator)

    x = initial_state(noise(), student.denoiser.schedule, schedule.timesteps[0])
    cond = {"label": torch.full((count,), -1)}
    return few_step(student.denoiser, x, schedule, cond, noise).flatten(1)


def wasserstein(ours: Tensor, theirs: Tensor) -> float:
    """Mean over 64 directions of the 1-D Wasserstein-1 distance of equally many points ``(N, D)``."""
    directions = torch.randn(ours.shape[1], 64, generator=torch.Generator().manual_seed(0)).double()
    directions = directions / directions.norm(dim=0)
    left, right = ((points.double() @ directions).sort(dim=0).values for points in (ours, theirs))
    return (left - right).abs().mean().item()


def distance_to_data(method: Method, schedule: StepSchedule, setup: Setup, count: int = 4096) -> float:
    """`wasserstein` of the student's samples to exact ones."""
    assert isinstance(setup.base, GaussianMixture)
    real = setup.base.mixture.sample(torch.full((count,), -1), torch.Generator().manual_seed(8)).flatten(1)
    return wasserstein(student_samples(method, schedule, count), real)


def distances(
    method: Method,
    setup: Setup,
    folder: Path,
    iterations: int,
    schedules: list[StepSchedule] | None = None,
    **train: Any,
) -> tuple[float, float]:
    """The student's `distance_to_data` before and after training: the largest of these schedules, or its one-step one's."""
    chosen = schedules or [method.schedules()[1]]

    def distance() -> float:
        return max(distance_to_data(method, schedule, setup) for schedule in chosen)

    before = distance()
    trainer = trainer_of(method, setup, folder, iterations=iterations, **{**QUIET, **train})
    trainer.run()
    with trainer.averaged():
        return before, distance()
