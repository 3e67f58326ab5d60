"""What SDXL has beside Stable Diffusion: two text encoders, sizes, an autoencoder that float16 is too small for.

Pixels are held against diffusers' in test_stable_diffusion.py, which runs on SDXL's classes too.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_sdxl_pipeline
from weights import prompts as prompt_encoding
from weights.families import load
from weights.families.stable_diffusion_xl import StableDiffusionXL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder: Path) -> StableDiffusionXL:
    model = load("stable_diffusion_xl", folder)
    assert isinstance(model, StableDiffusionXL)
    return model


def changed(folder: Path, to: Path, file: str, **changes: object) -> Path:
    """A copy of the pipeline with a configuration of other values."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


def test_prompts_are_encoded_as_diffusers_does_whoever_shares_the_batch(
    base: StableDiffusionXL, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["red apple", "", "blue dog"]
    red, empty, red_vector, empty_vector = base.pipeline.encode_prompt("red apple")
    blue, _, blue_vector, _ = base.pipeline.encode_prompt("blue dog")
    for at_once in (64, 2, 1):
        monkeypatch.setattr(prompt_encoding, "PROMPTS_AT_ONCE", at_once)
        ours = base.encode_prompts(prompts)
        assert {name: tuple(each.shape) for name, each in ours.items()} == {
            "encoder_hidden_states": (3, 24, 16 + 8), "text_embeds": (3, 12),
        }  # fmt: skip
        torch.testing.assert_close(ours["encoder_hidden_states"], torch.cat([red, empty, blue]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ours["text_embeds"], torch.cat([red_vector, empty_vector, blue_vector]), atol=1e-5, rtol=1e-5
        )


def test_the_empty_prompt_is_zeros_only_where_the_pipeline_says_so(
    base: StableDiffusionXL, folder: Path, tmp_path: Path
) -> None:
    assert not any(bool(each.any()) for each in base.encode_prompts([""]).values())
    other = changed(folder, tmp_path / "other", "model_index.json", force_zeros_for_empty_prompt=False)
    assert all(bool(each.any()) for each in load("stable_diffusion_xl", other).encode_prompts([""]).values())
    assert bool(base.embed_prompts([""]).any()), "a point of length 1, as every prompt"


def test_the_network_is_told_the_size_that_is_drawn_heights_first(base: StableDiffusionXL) -> None:
    told: list[Tensor] = []
    network = base.network
    handle = network.register_forward_pre_hook(
        lambda _, __, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    base.denoiser(torch.randn(2, 4, 8, 12), torch.tensor([1.0, 0.5]), base.encode_prompts(["red apple", ""]))
    handle.remove()
    wide = base.pipeline._get_add_time_ids((32, 48), (0, 0), (32, 48), torch.float32, text_encoder_projection_dim=12)
    assert torch.equal(told[0], wide.repeat(2, 1))


def test_the_network_listens_to_the_vector_and_to_the_sizes(base: StableDiffusionXL) -> None:
    x_t, t, cond = torch.randn(1, *base.latent_shape()), torch.tensor([0.5]), base.encode_prompts(["red apple"])
    answer = base.denoiser(x_t, t, cond)
    other = {**cond, "text_embeds": base.encode_prompts(["blue dog"])["text_embeds"]}
    assert not torch.allclose(base.denoiser(x_t, t, other), answer, atol=1e-4)
    inputs = list(base.denoiser.inputs(x_t, t, cond))
    module = base.parts()["network"].module
    same = module(*inputs)
    inputs[4] = inputs[4] * 2
    assert not torch.allclose(module(*inputs), same, atol=1e-5)


def test_the_autoencoder_stays_in_float32_unless_it_is_made_for_less(folder: Path, tmp_path: Path) -> None:
    model = load("stable_diffusion_xl", folder, dtype=torch.float16)
    assert {name: next(each.parameters()).dtype for name, each in model.components().items()} == {
        "unet": torch.float16, "vae": torch.float32, "text_encoder": torch.float16, "text_encoder_2": torch.float16,
    }  # fmt: skip
    assert next(model.to("cpu", torch.bfloat16).components()["vae"].parameters()).dtype == torch.bfloat16
    assert next(model.to("cpu", torch.float16).components()["vae"].parameters()).dtype == torch.float32
    mended = changed(folder, tmp_path / "mended", "vae/config.json", force_upcast=False)
    model = load("stable_diffusion_xl", mended, dtype=torch.float16)
    assert next(model.components()["vae"].parameters()).dtype == torch.float16


def test_an_autoencoder_with_means_is_refused(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "other", "vae/config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match=f"{other}: its autoencoder shifts latents by latents_mean"):
        load("stable_diffusion_xl", other)


def test_text_encoders_are_no_part_that_another_program_runs(base: StableDiffusionXL) -> None:
    assert set(base.parts()) == set(base.part_names) == {"network", "decoder"}
    with pytest.raises(ValueError, match="text_encoder"):
        base.with_programs({"text_encoder": base.text_encoder})
