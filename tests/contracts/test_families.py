"""What every family keeps, found by being there: a new file in weights/families is tested by this one.

Whether a family draws what diffusers draws is held in tests/weights.
"""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import TINY_FAMILIES
from weights.denoiser import GUIDANCE, cond_cat, cond_rows
from weights.families import TextToImage, families, family_of, load
from weights.families.base import PartName
from weights.modules import storages

FAMILIES = sorted(families())
SCALE = 3.5
Asked = tuple[Tensor, Tensor, dict[str, Tensor]]


def test_every_family_has_a_tiny_instance() -> None:
    missing = sorted(set(FAMILIES) - TINY_FAMILIES.keys())
    assert not missing, (
        f"families {missing} are tested by nothing here: give each a maker of a tiny pipeline and three of its prompts in "
        "TINY_FAMILIES, tests/helpers.py"
    )
    assert TINY_FAMILIES.keys() <= set(FAMILIES), "a maker without its family"


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name in TINY_FAMILIES])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    source = TINY_FAMILIES[request.param].make(tmp_path_factory.mktemp("base"))
    if families()[request.param].pipeline_name() is not None:
        assert family_of(source) == request.param, "which needs not to be named"
    return load(request.param, source)


@pytest.fixture(scope="module")
def prompts(base: TextToImage) -> list[str]:
    return TINY_FAMILIES[base.family].prompts


@pytest.fixture(scope="module")
def student(base: TextToImage) -> TextToImage:
    """With a network of its own: an analytic teacher denoises without one."""
    return base.copy()


def asked(model: TextToImage, prompts: list[str], *times: float) -> Asked:
    """Latents, times and conditions, a row each."""
    x_t = torch.randn(len(times), *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    cond = model.encode_prompts(prompts[: len(times)])
    return x_t, torch.tensor(times), {**cond, GUIDANCE: torch.full((len(times),), SCALE)}


def changed(model: TextToImage) -> TextToImage:
    """A copy with other weights."""
    other = model.copy()
    with torch.no_grad():
        for weight in other.network.parameters():
            weight.mul_(1.05)
    return other


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# The denoiser


@torch.no_grad()
def test_the_denoiser_returns_x0(base: TextToImage, student: TextToImage, prompts: list[str]) -> None:
    """Without noise x_0 is known, whatever an untrained network says of eps, v or the flow; at t = 1 it says something."""
    for denoiser in (base.denoiser, student.denoiser):
        x_t, t, cond = asked(base, prompts, 0.0, 1.0)
        x0 = denoiser(x_t, t, cond)
        torch.testing.assert_close(x0[0], x_t[0], atol=2e-3, rtol=0)
        assert (x0[1] - x_t[1]).abs().max() > 0.1


@torch.no_grad()
def test_the_denoiser_returns_float32_in_any_precision(student: TextToImage, prompts: list[str]) -> None:
    x_t, t, cond = asked(student, prompts, 0.3, 0.9)
    plain = student.denoiser(x_t, t, cond)
    half = student.copy()
    half.network.to(torch.bfloat16)
    rough = half.denoiser(x_t, t, cond)
    for x0 in (plain, rough):
        assert (x0.shape, x0.dtype) == (x_t.shape, torch.float32) and x0.isfinite().all()
    assert half.dtype == torch.bfloat16 and student.dtype == torch.float32
    assert not torch.equal(plain, rough)


@torch.no_grad()
def test_a_row_depends_on_nothing_but_itself(base: TextToImage, student: TextToImage, prompts: list[str]) -> None:
    for denoiser in (base.denoiser, student.denoiser):
        x_t, t, cond = asked(base, prompts, 0.9, 0.5, 0.2)
        together = denoiser(x_t, t, cond)
        for row in range(3):
            one = slice(row, row + 1)
            close(denoiser(x_t[one], t[one], cond_rows(cond, one)), together[one])


@torch.no_grad()
def test_the_denoiser_listens_to_the_prompt_and_to_the_time(student: TextToImage, prompts: list[str]) -> None:
    x_t, t, cond = asked(student, prompts, 0.9, 0.9)
    x0 = student.denoiser(x_t, t, cond)
    swapped = student.denoiser(x_t, t, cond_rows(cond, torch.tensor([1, 0])))
    assert not torch.allclose(swapped, x0, atol=1e-5)
    assert not torch.allclose(student.denoiser(x_t, t - 0.3, cond), x0, atol=1e-3)


@torch.no_grad()
def test_blocks_are_read_by_name_in_one_evaluation(student: TextToImage, prompts: list[str]) -> None:
    x_t, t, cond = asked(student, prompts, 0.5, 1.0)
    denoiser = student.denoiser
    names = denoiser.feature_blocks
    assert len(names) >= 3 and len(set(names)) == len(names)
    assert all(isinstance(student.network.get_submodule(name), nn.Module) for name in names)
    every = denoiser.block_features(x_t, t, cond, names)
    assert len(every) == len(names)
    assert all(each.ndim == 4 and len(each) == 2 and each.isfinite().all() for each in every)
    some = denoiser.block_features(x_t, t, cond, [names[0], names[-1]])
    assert torch.equal(some[0], every[0]) and torch.equal(some[1], every[-1])
    x0, features = denoiser.with_features(x_t, t, cond)
    assert torch.equal(x0, denoiser(x_t, t, cond)), "reading changes nothing"
    assert [each.shape[1] for each in features] == denoiser.feature_channels
    for early, late in zip(denoiser.features(x_t, t, cond), features, strict=True):
        assert torch.equal(early, late) and any(torch.equal(late, each) for each in every)


# Prompts


def test_a_prompt_has_a_row_that_does_not_depend_on_the_others(base: TextToImage, prompts: list[str]) -> None:
    mixed = [prompts[0], "", prompts[1]]
    together = base.encode_prompts(mixed)
    assert together and {len(each) for each in together.values()} == {3}
    alone = [base.encode_prompts([prompt]) for prompt in mixed]
    for name, tensor in cond_cat(alone).items():
        close(tensor.float(), together[name].float())
    red, empty, blue = (torch.cat([each.float().flatten() for each in cond.values()]) for cond in alone)
    for one, other in ((red, empty), (red, blue), (blue, empty)):
        assert not torch.allclose(one, other, atol=1e-3), "the empty prompt is one of its own"


def test_prompts_are_points_of_length_one(base: TextToImage, prompts: list[str]) -> None:
    points = base.embed_prompts([prompts[0], prompts[1], prompts[0], ""])
    assert points.ndim == 2 and points.dtype == torch.float32
    close(points.norm(dim=1), torch.ones(4))
    close(points[0], points[2])
    assert not torch.allclose(points[0], points[1], atol=1e-3)


# Latents and pictures


def test_pictures_and_latents_have_the_shapes_that_are_told(base: TextToImage) -> None:
    shape = base.latent_shape()
    assert shape == base.latent_shape(base.size, base.size)
    latents = 20 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    pictures = base.decode(latents)
    assert pictures.dtype == torch.float32 and len(pictures) == 2
    assert base.encode(pictures).shape == latents.shape
    if base.pipeline_name() is not None:  # points have neither three channels nor a range
        assert pictures.shape == (2, 3, base.size, base.size)
        assert pictures.abs().max() == 1, "cut off where the decoder goes beyond"


def test_latents_are_scaled_as_the_autoencoder_says(base: TextToImage) -> None:
    if base.pipeline_name() is None:
        points = torch.randn(2, *base.latent_shape())
        assert torch.equal(base.decode(base.encode(points)), points)
        return
    vae = cast(Any, base.components()["vae"])
    pictures = torch.rand(2, 3, base.size, base.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        output = vae.encode(pictures)
        plain = output.latent_dist.mode() if hasattr(output, "latent_dist") else output[0]
        decoded = vae.decode(plain, return_dict=False)[0].clamp(-1, 1)
    latents = base.encode(pictures)
    close(latents, (plain - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor)
    close(base.decode(latents), decoded)


def test_rendering_is_decoding_with_a_gradient_also_where_it_is_cut_off(base: TextToImage) -> None:
    latents = 20 * torch.randn(2, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    latents.requires_grad_(True)
    pictures = base.render(latents)
    decoded = base.decode(latents)
    torch.testing.assert_close(pictures.detach(), decoded.detach(), atol=1e-5, rtol=1e-5)
    outside = decoded.abs() >= 1
    assert outside.any()
    pictures[outside].sum().backward()
    assert latents.grad is not None and latents.grad.abs().amax() > 0


# Networks


def test_a_copy_shares_everything_but_the_network(base: TextToImage) -> None:
    copy = base.copy()
    assert storages([copy.network]).keys().isdisjoint(storages([base.network]))
    assert [name for name, _ in copy.network.named_parameters()] == [n for n, _ in base.network.named_parameters()]
    mine, theirs = copy.components(), base.components()
    assert mine.keys() == theirs.keys() and mine[base.network_name] is copy.network
    assert not [name for name in mine if name != base.network_name and mine[name] is not theirs[name]]
    assert not [name for name, module in theirs.items() if any(p.requires_grad for p in module.parameters())]
    assert type(copy) is type(base) and type(copy.denoiser.schedule) is type(base.denoiser.schedule)


@torch.no_grad()
def test_a_model_denoises_with_the_network_that_it_is_given(
    base: TextToImage, student: TextToImage, prompts: list[str]
) -> None:
    x_t, t, cond = asked(base, prompts, 0.9)
    before = student.denoiser(x_t, t, cond)
    other = changed(student)
    given = base.with_network(other.network)
    assert given.network is other.network
    assert torch.equal(given.denoiser(x_t, t, cond), other.denoiser(x_t, t, cond))
    assert not torch.equal(given.denoiser(x_t, t, cond), before)
    assert torch.equal(student.denoiser(x_t, t, cond), before), "what it was copied from stays as it was"


@torch.no_grad()
def test_a_network_survives_its_file_to_the_bit(
    base: TextToImage, student: TextToImage, prompts: list[str], tmp_path: Path
) -> None:
    other = changed(student)
    other.save_network(tmp_path / "whole", torch.float32)
    assert {path.suffix for path in (tmp_path / "whole").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    read = base.load_network(tmp_path / "whole")
    wanted, found = other.network.state_dict(), read.network.state_dict()
    assert wanted.keys() == found.keys() and not [name for name in wanted if not torch.equal(wanted[name], found[name])]
    assert not read.network.training and not any(weight.requires_grad for weight in read.network.parameters())
    x_t, t, cond = asked(base, prompts, 0.9)
    assert torch.equal(read.denoiser(x_t, t, cond), other.denoiser(x_t, t, cond))
    other.save_network(tmp_path / "half")
    halves = base.load_network(tmp_path / "half").network.state_dict()
    floats = {name: weight for name, weight in wanted.items() if weight.is_floating_point()}
    assert not [name for name, weight in floats.items() if not torch.equal(halves[name], weight.half().float())]


# Parts that another program runs


@torch.no_grad()
def test_a_part_run_by_position_is_what_the_model_itself_runs(base: TextToImage, prompts: list[str]) -> None:
    parts = base.parts()
    assert parts.keys() == set(base.part_names)
    json.dumps({name: dict(part.config) for name, part in parts.items()})
    x_t, t, cond = asked(base, prompts, 0.9, 0.4)
    for name, part in parts.items():
        inputs = part.example(3)
        assert all(torch.equal(one, other) for one, other in zip(inputs, part.example(3), strict=True))
        together = part.module(*inputs)
        assert len(together) == 3
        for row in range(3):
            close(part.module(*(each[row : row + 1] for each in inputs)), together[row : row + 1])
        calls: list[int] = []
        handle = part.module.register_forward_hook(lambda _, given, __, calls=calls: calls.append(len(given)))
        swapped = base.with_programs({name: part.module}, keep_network=name != "network")
        answers = {
            "network": lambda model: model.denoiser(x_t, t, cond),
            "decoder": lambda model: model.decode(x_t),
            "text_encoder": lambda model: model.encode_prompts(prompts)["encoder_hidden_states"],
        }
        assert torch.equal(answers[name](swapped), answers[name](base)) and calls == [len(inputs)]
        handle.remove()
        assert {weight.is_meta for weight in swapped.network.parameters()} == {name == "network"}
        assert swapped.programs == {name: part.module} and not base.programs


def test_what_is_no_part_is_refused(base: TextToImage) -> None:
    refused = r"^programs for .*: give some of .*network|^family .* has no parts that another program"
    with pytest.raises(ValueError, match=refused):
        base.with_programs({cast(PartName, "scheduler"): nn.Identity()})
    with pytest.raises(ValueError, match=refused):
        base.with_programs({}, keep_network=False)
