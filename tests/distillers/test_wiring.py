"""What methods pass to the formulas in losses/: the loss that each method itself computes, against one written out here.

The formulas are tested by themselves; a method could still call them with the wrong weight, sign, switch or graph.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from distillers.methods import method
from distillers.methods.base import Turn
from distillers.methods.few_step import FewStepMethod
from distillers.methods.hybrid import Hybrid
from distillers.methods.ladd import LADD
from distillers.methods.score_distillation import Noised, ScoreDistillation
from tests.distillers.mixtures import VP, mixture_setup, step_of
from weights.denoiser import Cond, Denoiser

B = 8
STUDENT = Turn(name="student", trains=("student",))


class Seen:
    """A student's turn of a method of the family: the matching loss, the images, and the scores at the noised images."""

    def __init__(self, name: str, **config: Any) -> None:
        setup = mixture_setup("ring")
        torch.manual_seed(0)
        self.built = method(name)(method(name).Config(**{"guidance_scale": 1.0, **config}), setup)
        assert isinstance(self.built, ScoreDistillation)
        built = self.built
        with torch.no_grad():  # otherwise the fake score is the teacher, whose estimate it was fitted to
            for weight in built.fake_score_network.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        built.fake_score_network.requires_grad_(False)
        self.x = torch.randn(B, *setup.latent_shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
        built._sample = lambda step: (self.x, step.batch.cond)  # type: ignore[method-assign]
        given: list[tuple[Noised, Tensor]] = []
        right = built.matching

        def spy(noised: Noised) -> Tensor:
            given.append((noised, right(noised)))
            return given[-1][1]

        built.matching = spy  # type: ignore[method-assign]
        for _ in range(3):  # the averages of ratios are of the first time, those of weights of the second
            built.after_step(STUDENT, 0)
            step = step_of(setup, B)
            built.loss(STUDENT, step)
        (noised, self.loss), self.cond = given[-1], step.batch.cond
        (self.found,) = torch.autograd.grad(self.loss, self.x)
        self.t = noised.t
        alpha, sigma = (value.reshape(B, 1, 1, 1).float() for value in (VP.alpha(self.t), VP.sigma(self.t)))
        eps = ((noised.x_t - alpha * self.x) / sigma).detach()
        self.x_t = alpha * self.x + sigma * eps
        self.fake, features = built.fake_score.with_features(self.x_t, self.t, self.cond)
        self.teacher = built.teacher(self.x_t, self.t, self.cond)
        self.ratio = torch.ones(B)
        if built.heads is not None:
            ratio = built.heads(features).flatten(1).mean(1).exp()
            self.ratio = ratio / ratio.detach().mean()  # of one bin without a memory

    def distance(self) -> Tensor:
        """``mean|x - F_T|`` of each image, without a graph."""
        return (self.x - self.teacher).detach().abs().mean(dim=(1, 2, 3), keepdim=True)

    def expects(self, loss: Tensor) -> None:
        """The method's loss and its gradient at the images are this one's."""
        torch.testing.assert_close(self.loss, loss, rtol=1e-3, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss, self.x)
        torch.testing.assert_close(self.found, gradient, rtol=1e-3, atol=1e-5)

    def expects_gradient(self, gradient: Tensor) -> None:
        """The gradient is this one, over the number of elements, and has no part through the scores."""
        torch.testing.assert_close(self.found * self.x.numel(), gradient.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.2, 0.7])
@pytest.mark.parametrize("normalize", [True, False])
def test_sid(alpha: float, normalize: bool) -> None:
    seen = Seen("sid", alpha=alpha, normalize=normalize)
    gap = seen.teacher - seen.fake
    terms = (1 - alpha) * gap.square() + gap * (seen.fake - seen.x)
    seen.expects((terms / seen.distance() if normalize else terms).mean())


@pytest.mark.parametrize("huber", [0.1, 2.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_sim(huber: float, normalize: bool) -> None:
    seen = Seen("sim", huber=huber, normalize=normalize)
    gap = seen.fake - seen.teacher
    terms = -gap / (gap.square().mean(dim=(1, 2, 3), keepdim=True) + huber**2).sqrt() * (seen.fake - seen.x)
    seen.expects((terms / seen.distance() if normalize else terms).mean())


WEIGHTS = {
    "reverse_kl": lambda r: r**0,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "neyman_chi2": lambda r: 1 / r,
}
UNBOUNDED: dict[str, Any] = {"ratio_bins": 1, "ratio_decay": 0.0, "ratio_range": (1e-4, 1e4)}


@pytest.mark.parametrize("divergence", WEIGHTS)
@pytest.mark.parametrize("normalize_weights", [True, False])
def test_uni_instruct(divergence: str, normalize_weights: bool) -> None:
    seen = Seen(
        "uni_instruct", divergence=divergence, normalize_weights=normalize_weights, normalize=False, **UNBOUNDED
    )
    r, h = seen.ratio, WEIGHTS[divergence](seen.ratio)
    (slope,) = torch.autograd.grad(h.sum(), r, create_graph=True)
    alpha = (1 + r * slope / h) / 2
    gap = seen.teacher - seen.fake
    terms = (1 - alpha).reshape(B, 1, 1, 1) * gap.square() + gap * (seen.fake - seen.x)
    weight = h / h.detach().mean() if normalize_weights else h
    seen.expects((weight.reshape(B, 1, 1, 1) * terms).mean())
    assert seen.ratio.std() > 0.01


def test_uni_instruct_is_normalized_as_sid_is() -> None:
    seen = Seen("uni_instruct", divergence="reverse_kl", **UNBOUNDED)
    gap = seen.teacher - seen.fake
    seen.expects(((gap.square() / 2 + gap * (seen.fake - seen.x)) / seen.distance()).mean())


def test_diff_instruct_moves_along_the_plain_difference() -> None:
    seen = Seen("diff_instruct")
    seen.expects_gradient(seen.fake - seen.teacher)


def test_dmd2_divides_the_difference_by_the_distance() -> None:
    seen = Seen("dmd2", gan_weight=0.0)
    seen.expects_gradient((seen.fake - seen.teacher) / seen.distance())


@pytest.mark.parametrize("divergence", WEIGHTS)
@pytest.mark.parametrize("normalize_weights", [True, False])
def test_f_distill_multiplies_dmd2_by_its_weight(divergence: str, normalize_weights: bool) -> None:
    seen = Seen("f_distill", divergence=divergence, normalize_weights=normalize_weights, **UNBOUNDED)
    h = WEIGHTS[divergence](seen.ratio)
    weight = (h / h.mean() if normalize_weights else h).reshape(B, 1, 1, 1)
    seen.expects_gradient(weight * (seen.fake - seen.teacher) / seen.distance())


def times(built: FewStepMethod, sample: Any) -> Tensor:
    """Times that the student is asked at while sampling, ``(rows,)``."""
    asked: list[Tensor] = []
    right = built.student.denoiser.forward

    def spy(x_t: Tensor, t: Tensor, cond: Any) -> Any:
        asked.append(t)
        return right(x_t, t, cond)

    built.student.denoiser.forward = spy  # type: ignore[method-assign]
    sample()
    return torch.cat(asked)


@pytest.mark.parametrize("name", ["ladd", "hybrid"])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_as_many_pictures_start_from_noise_as_the_setting_says(name: str, share: float) -> None:
    setup = mixture_setup("ring")
    built = method(name)(method(name).Config(noise_share=share), setup)
    step = step_of(setup, 400)
    assert isinstance(built, LADD | Hybrid)
    if isinstance(built, LADD):
        asked = times(built, lambda: built._sample(step))
    else:
        asked = times(built, lambda: built._sample(*step.batch.pictures, step))
    assert (asked == 1).float().mean().item() == pytest.approx(share, abs=0.0 if share in (0.0, 1.0) else 0.1)


@pytest.mark.parametrize(("name", "weight"), [("dmd2", "dm_weight"), ("dmd2", "gan_weight"), ("tscd", "gan_weight")])
def test_a_term_counts_as_much_as_its_weight_says(name: str, weight: str) -> None:
    part = {"dm_weight": "student/matching", "gan_weight": "student/adversarial"}[weight]
    losses, parts = [], []
    for value in (0.5, 2.0):
        setup = mixture_setup("ring")
        torch.manual_seed(0)
        built = method(name)(method(name).Config(**{"guidance_scale": 3.0, weight: value}), setup)
        found = built.loss(STUDENT, step_of(setup, B))
        losses.append(found.loss.detach())
        parts.append(found.metrics[part])
    assert torch.equal(parts[0], parts[1]) and abs(parts[0]) > 1e-4
    torch.testing.assert_close(losses[1] - losses[0], 1.5 * parts[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "iteration"), [("dmd2", 4), ("sid", 0), ("consistency", 0), ("tscd", 0), ("scm", 0), ("hybrid", 0)]
)
def test_the_teacher_is_guided_as_far_as_the_setting_says(
    name: str, iteration: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, scales = mixture_setup("ring"), []

    def spy(teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, scale: float, *_: Any) -> Tensor:
        scales.append(scale)
        answer: Tensor = teacher(x_t, t, cond)
        return answer

    for module in ("distillers.methods.score_distillation", "distillers.methods.few_step"):
        monkeypatch.setattr(f"{module}.guided_x0", spy)
    built = method(name)(method(name).Config(guidance_scale=3.5), setup)
    built.loss(built.turns(iteration)[0], step_of(setup, B, iteration))
    assert set(scales) == {3.5}


def test_each_loss_of_the_family_draws_its_own_times() -> None:
    """The student's from ``dm_times``, the fake score's from ``score_times``, the discriminator's from ``gan_times``."""
    setup = mixture_setup("ring")
    ranges: dict[str, Any] = {"dm_times": (0.1, 0.2), "score_times": (0.3, 0.4), "gan_times": (0.5, 0.6)}
    built = method("dmd2")(method("dmd2").Config(**ranges), setup)
    assert isinstance(built, ScoreDistillation) and built.heads is not None
    asked: dict[str, list[Tensor]] = {"forward": [], "features": []}
    for name, seen in asked.items():
        right = getattr(built.fake_score, name)
        setattr(built.fake_score, name, lambda x, t, cond, right=right, seen=seen: seen.append(t) or right(x, t, cond))
    built.loss(STUDENT, step_of(setup, B))
    built.loss(built.critic_turn(), step_of(setup, B, name="critic"))
    matched, scored = asked["forward"]
    assert (matched >= 0.1).all() and (matched <= 0.2).all()
    assert (scored >= 0.3).all() and (scored <= 0.4).all()
    judged = torch.cat(asked["features"])
    assert (judged >= 0.5).all() and (judged <= 0.6).all()


def test_levels_replace_the_fake_scores_times() -> None:
    setup = mixture_setup("ring")
    built = method("diff_instruct")(method("diff_instruct").Config(score_levels=(1.0, 0.01)), setup)
    assert isinstance(built, ScoreDistillation)
    asked: list[Tensor] = []
    right = built.fake_score.forward
    built.fake_score.forward = lambda x, t, cond: asked.append(t) or right(x, t, cond)  # type: ignore[method-assign]
    built.loss(built.critic_turn(), step_of(setup, B))
    assert (-VP.log_snr(asked[0]) - 1.0).abs().max() < 0.1
