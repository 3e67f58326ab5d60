"""The latent discriminator: its losses against closed forms, its heads, and where its gradients go."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import distillers.adversary as module
from distillers.adversary import Adversary, LatentHead, UnitConv, mismatched_rows, prompt_vectors
from distillers.adversary_settings import AdversaryConfig
from distillers.eyes import PictureEye, TeacherEye
from distillers.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from distillers.methods.base import Setup
from distillers.seeds import generator_of
from tests.distillers.mixtures import VP, fitted, mixture_setup
from tests.helpers import tiny_unet
from weights.denoiser import Cond, Denoiser
from weights.unet import UNetDenoiser

CLEAN = {"critic_noise_mean": -30.0, "critic_noise_std": 0.0}
"""At no noise at all, so that what is shown is what was given."""


class Mirror(Denoiser):
    """Its only block gives back what it is shown, plus the label; it remembers what that was."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = VP
        self.asked: list[tuple[Tensor, Tensor, Cond]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x_t

    @property
    def feature_blocks(self) -> list[str]:
        return ["all"]

    def block_features(self, x_t: Tensor, t: Tensor, cond: Cond, blocks: Sequence[str]) -> list[Tensor]:
        self.asked.append((x_t, t, cond))
        return [x_t + cond["label"].reshape(-1, 1, 1, 1) for _ in blocks]


def mirrored(**config: Any) -> tuple[Adversary, Mirror]:
    """A discriminator whose logit is the picture plus its label."""
    mirror = Mirror()
    setup = replace(mixture_setup(), base=SimpleNamespace(denoiser=mirror))
    adversary = Adversary(AdversaryConfig(**config), setup)
    adversary.heads = nn.ModuleList([nn.Identity()])
    mirror.asked.clear()
    return adversary, mirror


def points(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def labels(*values: int) -> dict[str, Tensor]:
    return {"label": torch.tensor(values)}


def unet_setup() -> Setup:
    torch.manual_seed(0)
    denoiser = UNetDenoiser(tiny_unet().requires_grad_(False), VP, "v")
    uncond = {"encoder_hidden_states": torch.randn(1, 5, 16)}
    base: Any = SimpleNamespace(denoiser=denoiser)
    return replace(mixture_setup(), base=base, uncond=uncond, latent_shape=(4, 8, 8))


def shown(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cond = {"encoder_hidden_states": torch.randn(count, 5, 16, generator=generator)}
    return torch.randn(count, 4, 8, 8, generator=generator), cond


# Losses


def test_hinge_losses_are_their_formulas_and_let_settled_logits_be() -> None:
    real, fake = torch.tensor([[0.5, 3.0], [-1.0, 1.0]]), torch.tensor([-2.0, 0.5])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx((0.5 + 0 + 2.0 + 0) / 4 + (0 + 1.5) / 2)
    assert float(hinge_generator_loss(fake)) == pytest.approx(0.75)
    real.requires_grad_(True), fake.requires_grad_(True)
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert torch.equal(real.grad, torch.tensor([[-0.25, 0.0], [-0.25, 0.0]]))  # 1 itself is settled
    assert torch.equal(fake.grad, torch.tensor([0.0, 0.5]))
    half = torch.ones(3, dtype=torch.bfloat16)
    assert hinge_generator_loss(half).dtype == hinge_discriminator_loss(half, half).dtype == torch.float32


def test_a_critic_that_is_told_no_prompt_sees_the_empty_one_with_every_picture() -> None:
    adversary, mirror = mirrored(**CLEAN, mismatched_share=0.0, prompted=False)
    real, fake = points(0.5, 0.25), points(-0.5, 0.25)
    found = adversary.critic_loss(fake, labels(0, 1), real, labels(1, 0), generator_of("look"))
    student = adversary.student_loss(fake, labels(0, 1), generator_of("look"))
    empty = adversary.setup.uncond["label"]
    assert [cond["label"].tolist() for *_, cond in mirror.asked] == [empty.tolist() * 4, empty.tolist() * 2]
    true, false = real.flatten() + empty, fake.flatten() + empty
    assert float(found.loss) == pytest.approx(float((1 - true).relu().mean() + (1 + false).relu().mean()), abs=1e-6)
    assert float(student) == pytest.approx(-float(false.mean()), abs=1e-6)
    with pytest.raises(ValidationError, match=r"mismatched_share: 0\.5 must be 0 if prompted is false"):
        AdversaryConfig(prompted=False)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_heads_loss_is_the_hinge_with_a_share_of_mismatched_pairs(share: float) -> None:
    adversary, mirror = mirrored(**CLEAN, mismatched_share=share)
    real, fake = points(0.5, 0.25, 0.75), points(-0.5, -0.5, 0.5)
    found = adversary.critic_loss(fake, labels(0, 1, 1), real, labels(0, 1, 1), generator_of("look"))
    # The second picture's neighbour has label 0 and the first's has 1; the third's has its own.
    wrong = torch.tensor([0.75 + 0, 0.5 + 1])
    true, false = torch.tensor([0.5, 1.25, 1.75]), torch.tensor([-0.5, 0.5, 1.5])
    apart = share * 2 / 3
    expected = (1 - true).relu().mean() + (1 - apart) * (1 + false).mean() + apart * (1 + wrong).mean()
    assert float(found.loss) == pytest.approx(float(expected), abs=1e-6)
    assert len(mirror.asked) == 1, "one evaluation shows the critic everything"
    assert len(mirror.asked[0][0]) == (8 if share else 6)
    assert ("critic/mismatched_logits" in found.metrics) == bool(share)
    assert float(found.metrics["critic/real_logits"]) == pytest.approx(float(true.mean()))


def test_pictures_of_one_prompt_are_no_mismatch() -> None:
    assert mismatched_rows(labels(3, 3, 3, 3)).tolist() == []
    assert mismatched_rows(labels(3, 5, 5, 3)).tolist() == [1, 3]
    assert mismatched_rows(labels(3)).tolist() == []
    words = torch.zeros(3, 2, 4)
    words[1, 1, 3] = 1.0
    assert mismatched_rows({**labels(1, 1, 1), "encoder_hidden_states": words}).tolist() == [1, 2]


def test_the_students_loss_is_the_mean_logit_over_positions_then_heads() -> None:
    adversary, _ = mirrored(**CLEAN)
    x = points(0.5, -1.0)
    loss = adversary.student_loss(x, labels(0, 1), generator_of("look"))
    assert float(loss) == pytest.approx(-(0.5 - 1.0 + 1) / 2, abs=1e-6)
    sizes = [torch.full((2, 1, 4, 4), 1.0), torch.full((2, 1, 1, 1), 4.0)]
    assert float(module._over_heads(torch.mean, sizes)) == 2.5


def test_pictures_are_shown_at_log_normal_times_with_fresh_noise() -> None:
    adversary, mirror = mirrored(critic_noise_mean=0.7, critic_noise_std=0.5, mismatched_share=0.0)
    real, cond = torch.zeros(2000, 1, 1, 1), {"label": torch.zeros(2000, dtype=torch.int64)}
    adversary.critic_loss(real, cond, real, cond, generator_of("look"))
    x_t, t, _ = mirror.asked[0]
    assert torch.equal(t[:2000], t[2000:])
    level = -VP.log_snr(t[:2000].double())
    assert (level.mean().item(), level.std().item()) == pytest.approx((0.7, 0.5), abs=0.05)
    noise = x_t.flatten() / VP.sigma(t)
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)
    assert abs(float((noise[:2000] * noise[2000:]).mean())) < 0.1


def test_r1_is_added_by_its_weight() -> None:
    losses = {}
    for weight in (0.0, 2.0):
        adversary, _ = mirrored(**CLEAN, r1_weight=weight, r1_noise=0.5)
        torch.manual_seed(0)
        x = points(*[0.1] * 4000)
        cond = {"label": torch.zeros(4000, dtype=torch.int64)}
        losses[weight] = adversary.critic_loss(x, cond, x, cond, generator_of("look"))
    assert "critic/r1" not in losses[0.0].metrics
    assert float(losses[2.0].metrics["critic/r1"]) == pytest.approx(0.25, rel=0.1)  # |dD/dx| = 1
    gained = float(losses[2.0].loss - losses[0.0].loss)
    assert gained == pytest.approx(2.0 * float(losses[2.0].metrics["critic/r1"]), rel=1e-4)


# Heads


@pytest.mark.parametrize(("size", "kernel", "taps"), [(1, 3, 1), (2, 3, 3), (4, 9, 7), (8, 3, 3), (8, 1, 1)])
def test_a_head_judges_every_position_and_no_tap_meets_padding_alone(size: int, kernel: int, taps: int) -> None:
    torch.manual_seed(0)
    head = LatentHead(16, size, kernel)
    logits = head(torch.randn(3, 16, size, size + 1, dtype=torch.bfloat16))
    assert logits.shape == (3, 1, size, size + 1) and logits.dtype == torch.float32
    (around,) = [layer for layer in head.around if isinstance(layer, nn.Conv2d)]
    assert around.kernel_size == (taps, taps)
    logits.square().sum().backward()
    assert around.weight.grad is not None
    assert (around.weight.grad.flatten(2).abs().sum((0, 1)) > 0).all()


def test_the_last_layers_spectral_norm_is_one() -> None:
    torch.manual_seed(0)
    layer, features = UnitConv(24), torch.randn(5, 24, 2, 2)
    assert isinstance(layer.bias, Tensor)
    matrix = layer.weight.detach().reshape(1, 24)
    exact = matrix / torch.linalg.matrix_norm(matrix, ord=2)
    expected = torch.einsum("c,bchw->bhw", exact[0], features) + layer.bias
    torch.testing.assert_close(layer(features)[:, 0], expected)
    before = layer(features)
    with torch.no_grad():
        layer.weight.mul_(7.0)
    torch.testing.assert_close(layer(features), before)


def test_a_pictures_logits_do_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    head, features = LatentHead(16, 4), torch.randn(6, 16, 4, 4)
    torch.testing.assert_close(head(features)[:2], head(features[:2]))


def test_heads_keep_no_state_but_their_weights() -> None:
    """Nothing of a head is changed by looking, so that a checkpoint of its weights is all of it."""
    adversary = Adversary(AdversaryConfig(), unet_setup())
    assert not list(adversary.heads.buffers())
    x, cond = shown(2)
    before = {name: value.clone() for name, value in adversary.heads.state_dict().items()}
    adversary.critic_loss(x, cond, x, cond, generator_of("look"))
    assert all(torch.equal(before[name], value) for name, value in adversary.heads.state_dict().items())


# The critic


def test_every_block_of_the_teacher_gets_a_head_and_the_graph_runs_through_it() -> None:
    setup = unet_setup()
    adversary = Adversary(AdversaryConfig(), setup)
    assert isinstance(adversary.eye, TeacherEye) and adversary.eye.critic is setup.teacher
    assert len(adversary.heads) == 7  # three down, one in the middle, three up
    x, cond = shown(2)
    x.requires_grad_(True)
    adversary.student_loss(x, cond, generator_of("look")).backward()
    assert x.grad is not None and x.grad.abs().amin() > 0
    assert all(weight.grad is None for weight in setup.teacher.parameters())
    assert all(weight.grad is not None for weight in adversary.heads.parameters())


def test_the_heads_loss_reaches_only_the_heads() -> None:
    setup = unet_setup()
    adversary = Adversary(AdversaryConfig(r1_weight=1.0), setup)
    x, cond = shown(3)
    x.requires_grad_(True)
    adversary.critic_loss(x, cond, x.detach(), cond, generator_of("look")).loss.backward()
    assert x.grad is None
    assert all(weight.grad is not None for weight in adversary.heads.parameters())


def test_chosen_blocks_are_all_that_is_run() -> None:
    setup = unet_setup()
    adversary = Adversary(AdversaryConfig(blocks=["mid_block", "down_blocks.1"]), setup)
    assert isinstance(adversary.eye, TeacherEye) and adversary.eye.blocks == ["down_blocks.1", "mid_block"]
    calls = []
    unet = setup.teacher.get_submodule("network")
    for name in ("conv_in", "up_blocks.0"):
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    x, cond = shown(2)
    adversary.student_loss(x, cond, generator_of("look"))
    assert calls == ["conv_in"]


def test_a_block_that_is_not_the_teachers_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"blocks: this teacher has no \['block.5'\].*up_blocks.2"):
        Adversary(AdversaryConfig(blocks=["mid_block", "block.5"]), unet_setup())


def test_a_teacher_without_features_lends_a_frozen_copy_of_what_students_start_from() -> None:
    setup = mixture_setup()
    adversary = Adversary(AdversaryConfig(), setup)
    assert isinstance(adversary.eye, TeacherEye)
    critic = adversary.eye.critic
    assert critic is not setup.teacher and critic.feature_blocks == ["blocks.0", "blocks.1"]
    assert not any(weight.requires_grad for weight in critic.parameters())
    start = fitted("line", VP, "v").denoiser.state_dict()
    assert all(torch.equal(start[name], value) for name, value in critic.state_dict().items())


# A critic of pictures

PICTURES: dict[str, Any] = {"features": "random", "prompted": False, "mismatched_share": 0.0}


class Decoder:
    """A base that only decodes: latents doubled, in three channels."""

    def render(self, latents: Tensor) -> Tensor:
        return 2 * latents[:, :3]


def picture_setup() -> Setup:
    base: Any = Decoder()
    return replace(mixture_setup(), base=base, latent_shape=(4, 8, 8))


def test_pictures_are_judged_decoded_and_without_noise() -> None:
    adversary = Adversary(AdversaryConfig(**PICTURES), picture_setup())
    assert isinstance(adversary.eye, PictureEye)
    x, _ = shown(3)
    t = adversary.eye.times(3, generator_of("look"))
    assert torch.equal(adversary.eye.shown(x, t, generator_of("look")), x)
    for own, expected in zip(adversary.eye.maps(x, t, {}), adversary.eye.backbone(2 * x[:, :3]), strict=True):
        torch.testing.assert_close(own, expected)


def test_both_losses_of_a_critic_of_pictures() -> None:
    adversary = Adversary(AdversaryConfig(r1_weight=1.0, **PICTURES), picture_setup())
    x, _ = shown(4)
    cond = labels(0, 1, 0, 1)
    fake, real = x.clone().requires_grad_(True), -x
    adversary.student_loss(fake, cond, generator_of("look")).backward()
    assert fake.grad is not None and torch.isfinite(fake.grad).all()
    adversary.heads.zero_grad()
    found = adversary.critic_loss(fake, cond, real, cond, generator_of("look"))
    found.loss.backward()
    assert set(found.metrics) == {"critic/discriminator", "critic/fake_logits", "critic/real_logits", "critic/r1"}
    assert all(weight.grad is not None for weight in adversary.heads.parameters())
    assert isinstance(adversary.eye, PictureEye)
    assert not any(weight.requires_grad for weight in adversary.eye.backbone.parameters())


def matched(iterations: int = 60) -> tuple[Adversary, Any]:
    """A matcher that has seen some of a ring's points beside their labels, and the ring."""
    setup = mixture_setup("ring")
    torch.manual_seed(0)
    adversary = Adversary(AdversaryConfig(matching_weight=1.0, **PICTURES), setup)
    optimizer = torch.optim.Adam(adversary.trained(0.0, 0).module.parameters(), 2e-3, betas=(0.0, 0.99))
    mixture = setup.base.mixture  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    for iteration in range(iterations):
        cond = {"label": torch.randint(8, (64,), generator=generator)}
        real = mixture.sample(cond["label"], generator).float()
        optimizer.zero_grad()
        adversary.critic_loss(real, cond, real, cond, generator_of("look", iteration)).loss.backward()
        optimizer.step()
    return adversary, mixture


def test_a_matcher_learns_which_pictures_show_what_was_asked_for() -> None:
    adversary, mixture = matched()
    cond = {"label": torch.arange(8).repeat(32)}
    x, t = mixture.sample(cond["label"], torch.Generator().manual_seed(1)).float(), torch.zeros(256)
    opposite = {"label": (cond["label"] + 4) % 8}
    assert adversary.matcher is not None
    with torch.no_grad():
        own, other = (float(adversary.matcher(adversary.eye.maps(x, t, {}), each).mean()) for each in (cond, opposite))
    assert own > other + 1, (own, other)
    leads = []
    for asked in (cond, opposite):
        moved = x.clone().requires_grad_(True)
        adversary.student_loss(moved, asked, generator_of("look")).backward()
        assert moved.grad is not None
        leads.append(moved.grad)
    assert not torch.allclose(*leads), "where the student is led depends on the prompt"


def test_the_matchers_loss_is_hinge_on_own_and_other_prompts_and_leaves_equal_ones_out() -> None:
    adversary, mixture = matched(5)
    assert adversary.matcher is not None
    cond = labels(0, 1, 1, 2)
    x = mixture.sample(cond["label"], torch.Generator().manual_seed(1)).float()
    found = adversary.critic_loss(x, cond, x, cond, generator_of("look"))
    maps = adversary.eye.maps(x, torch.zeros(4), cond)
    own, other = (adversary.matcher(maps, each).detach() for each in (cond, labels(2, 0, 1, 1)))
    expected = (1 - own).relu().mean() + (1 + other).relu()[[0, 1, 3]].mean()
    assert float(found.metrics["critic/matching"]) == pytest.approx(float(expected), rel=1e-5)
    plain = float(found.metrics["critic/discriminator"])
    assert float(found.loss.detach()) == pytest.approx(plain + float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"features": None, "matching_weight": 1.0, "prompted": True},
            "matching_weight: 1.0 has an effect only with features",
        ),
        ({"prompted": True}, "features: random takes no prompt"),
        ({"blocks": ["mid_block"]}, "leave blocks out"),
        ({"features": None, "feature_size": 64}, "feature_size: 64 has an effect only with features"),
        ({"features": "vgg"}, "features"),
    ],
)
def test_a_critic_of_pictures_refuses_what_it_cannot_use(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        AdversaryConfig(**{**PICTURES, **changes})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blocks", []),
        ("head_kernel", 2),
        ("mismatched_share", 1.0),
        ("critic_noise_std", -1.0),
        ("r1_noise", 0.0),
        ("head_betas", (1.0, 0.9)),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        AdversaryConfig.model_validate({field: value})
    assert field in str(error.value)


# What mismatched pairs are for


def prompt_gap(share: float) -> float:
    """How much more real a picture looks beside its own label, to heads trained against perfect fakes."""
    setup = mixture_setup("ring")
    torch.manual_seed(0)
    adversary = Adversary(AdversaryConfig(mismatched_share=share), setup)
    optimizer = torch.optim.Adam(adversary.heads.parameters(), 2e-3, betas=(0.0, 0.99))
    mixture = setup.base.mixture  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    for iteration in range(40):
        cond = {"label": torch.randint(8, (64,), generator=generator)}
        fake, real = (mixture.sample(cond["label"], generator).float() for _ in range(2))
        optimizer.zero_grad()
        adversary.critic_loss(fake, cond, real, cond, generator_of("look", iteration)).loss.backward()
        optimizer.step()
    cond = {"label": torch.randint(8, (512,), generator=generator)}
    x, t = mixture.sample(cond["label"], generator).float(), torch.full((512,), 0.1)
    opposite = {"label": (cond["label"] + 4) % 8}
    with torch.no_grad():
        own, other = (
            module._over_heads(torch.mean, adversary._logits(adversary.eye.maps(x, t, c))) for c in (cond, opposite)
        )
    return float(own - other)


def test_mismatched_pairs_teach_the_heads_to_look_at_the_prompt() -> None:
    assert prompt_gap(0.5) > 0.5
    assert abs(prompt_gap(0.0)) < 0.2


def test_with_real_and_fake_swapped_they_teach_the_opposite(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.hinge_discriminator_loss
    monkeypatch.setattr(module, "hinge_discriminator_loss", lambda real, fake: right(fake, real))
    assert prompt_gap(0.5) < -0.5


def test_padding_is_no_part_of_a_prompts_vector() -> None:
    states, mask = torch.randn(2, 5, 3), torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    vectors = prompt_vectors({"encoder_hidden_states": states, "encoder_attention_mask": mask})
    torch.testing.assert_close(vectors, torch.stack([states[0, :2].mean(0), states[1].mean(0)]))
