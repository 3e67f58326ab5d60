"""What several students are for: small networks that share a ring's eight conditions draw better than one does alone."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillers.clustering import balanced_kmeans
from distillers.methods.base import Batch, Setup
from distillers.methods.consistency import Consistency, ConsistencyConfig
from distillers.seeds import generator_of
from tests.distillers.mixtures import VP, MixtureFeed, mixture_setup, trainer_of, wasserstein
from weights.contracts import StepSchedule
from weights.diffusion.samplers import few_step, initial_state
from weights.families.gaussian_mixture import MLP, AnalyticDenoiser, GaussianMixture, fit
from weights.router import route

ONE = StepSchedule(timesteps=[1.0])
ITERATIONS, BATCH, POINTS = 250, 256, 1024


def parts_of_ring(mixture_means: Tensor, parts: int) -> Tensor:
    """Each label's part, by balanced k-means of the labels' means: the toy's text encoder."""
    return balanced_kmeans(torch.nn.functional.normalize(mixture_means, dim=1), parts, generator_of("ring")).labels


class PartFeed(MixtureFeed):
    """Exact samples of some labels."""

    def __init__(self, setup: Setup, batch_size: int, labels: Tensor) -> None:
        super().__init__(setup, batch_size)
        self.labels = labels

    def batch(self, iteration: int, micro: int = 0, rank: int = 0) -> Batch:
        assert isinstance(self.base, GaussianMixture)
        generator = generator_of("part", iteration, micro, rank)
        label = self.labels[torch.randint(len(self.labels), (self.batch_size,), generator=generator)]
        real = self.base.mixture.sample(label, generator).float()
        return Batch(cond={"label": label}, real=real, real_cond={"label": label})


def distance(parts: int, folder: Path) -> float:
    """Mean over the labels of the distance between what their student draws in one step and exact samples.

    K students see a K-th of the batch each, so that all K cost what one does.
    """
    setup = mixture_setup("ring")
    assert isinstance(setup.base, GaussianMixture)
    mixture = setup.base.mixture
    torch.manual_seed(0)
    start = GaussianMixture(mixture, VP, "v", MLP(2, 8, width=8, depth=1))
    fit(start.denoiser, AnalyticDenoiser(mixture, VP), iterations=200, batch=256)  # teacher score matching comes first
    label_parts = parts_of_ring(mixture.means, parts) if parts > 1 else torch.zeros(8, dtype=torch.int64)
    found = []
    for part in range(parts):

        def new_student() -> GaussianMixture:
            student = start.with_network(copy.deepcopy(start.network))
            student.network.requires_grad_(True).train()
            return student

        config = ConsistencyConfig(schedules={1: ONE}, guidance_scale=1.0, lr=1e-2, solver_steps=8, target_decay=0.9)
        method = Consistency(config, replace(setup, new_student=new_student))
        labels = (label_parts == part).nonzero()[:, 0]
        trainer = trainer_of(method, setup, folder / f"{parts}-{part}", iterations=ITERATIONS)
        trainer.feed = PartFeed(setup, BATCH // parts, labels)
        trainer.run()
        with trainer.averaged(), torch.no_grad():
            for label in labels.tolist():
                cond = {"label": torch.full((POINTS,), label)}
                noise = torch.randn(POINTS, 2, 1, 1, generator=generator_of("noise", label))
                x = initial_state(noise, VP, 1.0)
                drawn = few_step(method.student.denoiser, x, ONE, cond, None).flatten(1)
                exact = mixture.sample(cond["label"], generator_of("exact", label)).flatten(1)
                found.append(wasserstein(drawn, exact))
    return sum(found) / len(found)


@pytest.mark.slow
def test_more_small_students_come_closer_to_the_data(tmp_path: Path) -> None:
    assert distance(4, tmp_path) < 0.75 * distance(1, tmp_path)  # 0.23 and 0.39


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_router_finds_the_ring_s_parts(noise: float) -> None:
    setup = mixture_setup("ring")
    assert isinstance(setup.base, GaussianMixture)
    means = torch.nn.functional.normalize(setup.base.mixture.means, dim=1)
    found = balanced_kmeans(means, 4, generator_of("ring"))
    for part in range(4):
        first, second = (found.labels == part).nonzero()[:, 0].tolist()
        assert second - first in (1, 7), "neighbours on the ring"
    prompts = means.repeat(50, 1)
    prompts = prompts + noise * torch.randn(prompts.shape, generator=generator_of("prompts"), dtype=prompts.dtype)
    prompts = torch.nn.functional.normalize(prompts, dim=1)
    assert torch.equal(route(prompts, found.centroids, found.prices), found.labels.repeat(50))
