"""What FLUX.1 has beside the other families: packed latents, an embedded guidance scale, a shift that follows from the size.

Pixels of dev's classes are held against diffusers' in test_stable_diffusion.py too; schnell's, and other shapes, here.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import student_manifest, tiny_flux_pipeline, tiny_schnell_pipeline
from weights import prompts as prompt_encoding
from weights.contracts import Diversity, StepSchedule
from weights.denoiser import GUIDANCE
from weights.diffusion.guidance import EmbeddedGuidance
from weights.diffusion.samplers import ImageNoise, sample_ode, trailing_times
from weights.diffusion.schedules import RectifiedFlow
from weights.drawing import CannotDraw, draw, draw_base, guided
from weights.export import export
from weights.families import load
from weights.families.flux import Flux
from weights.flux import packed, unpacked
from weights.pipelines import LORA_FILE
from weights.rectified_flow import student_scheduler
from weights.store import Store
from weights.students import load_student

PROMPT = "red apple, noto"
KINDS = ("dev", "schnell")
LENGTHS = {"dev": 512, "schnell": 256}
FOUR = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("flux")
    return {"dev": tiny_flux_pipeline(made / "dev"), "schnell": tiny_schnell_pipeline(made / "schnell")}


def opened(folder: Path, **more: Any) -> Flux:
    model = load("flux", folder, **more)
    assert isinstance(model, Flux)
    return model


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Flux]:
    return {name: opened(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def base(models: dict[str, Flux]) -> Flux:
    return models["dev"]


def theirs(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_card(folder: Path, to: Path, **card: object) -> Path:
    shutil.copytree(folder, to)
    (to / "fewstep.json").write_text(json.dumps(card))
    return to


def asked(model: Flux, *prompts: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents, times and conditions of two pictures."""
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    cond = model.encode_prompts(list(prompts) or [PROMPT, ""])
    return x_t, torch.tensor([0.5, 1.0]), {**cond, GUIDANCE: torch.tensor([3.5, 2.0])}


# Against diffusers


def test_latents_are_packed_as_diffusers_packs_them() -> None:
    latents = torch.arange(2 * 16 * 6 * 4.0).reshape(2, 16, 6, 4)
    tokens = packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 6, 4))
    assert torch.equal(unpacked(tokens, 6, 4), latents)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_as_diffusers_does_whoever_shares_the_batch(
    kind: str, folders: dict[str, Path], models: dict[str, Flux], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["red apple", "", "blue dog"]
    states, pooled, _ = theirs(folders[kind]).encode_prompt(prompts, max_sequence_length=LENGTHS[kind])
    for at_once in (64, 2):
        monkeypatch.setattr(prompt_encoding, "PROMPTS_AT_ONCE", at_once)
        cond = models[kind].encode_prompts(prompts)
        torch.testing.assert_close(cond["encoder_hidden_states"], states, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(cond["text_embeds"], pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_draws_what_diffusers_draws_at_another_shape(
    kind: str, folders: dict[str, Path], models: dict[str, Flux]
) -> None:
    """Of as many tokens as the usual size has, so that diffusers shifts alike."""
    model, (height, width) = models[kind], (64, 16)
    denoiser = EmbeddedGuidance(model.denoiser, 2.5) if kind == "dev" else model.denoiser
    noise = ImageNoise([5], model.latent_shape(height, width))()
    latents = sample_ode(denoiser, noise, trailing_times(4), model.encode_prompts([PROMPT]))
    pixels = theirs(folders[kind])(
        PROMPT,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=LENGTHS[kind],
        output_type="pt",
    ).images
    assert torch.allclose((model.decode(latents) + 1) / 2, pixels, atol=1e-4)


def test_schnell_is_told_no_scale_and_drawn_as_diffusers_does(
    folders: dict[str, Path], models: dict[str, Flux], tmp_path: Path
) -> None:
    model, store = models["schnell"], Store(tmp_path / "store")
    assert (model.default_steps, model.default_guidance) == (4, 1.0)
    assert not model.denoiser.embeds_guidance
    with pytest.raises(TypeError, match="'flux' cannot be conditioned on a guidance scale"):
        model.with_guidance_embedding()
    student = model.copy()
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.mul_(1.05)
    student.save_network(tmp_path / "work", torch.float32)
    store.publish(student_manifest(folders["schnell"], family="flux"), tmp_path / "work")
    pipeline = theirs(export(store, "student", tmp_path / "out", 4))
    torch.manual_seed(7)
    pixels = pipeline(
        PROMPT, num_inference_steps=4, height=32, width=32, max_sequence_length=256, output_type="pt"
    ).images
    drawing = draw(load_student(store.open("student"), model), model.encode_prompts([PROMPT]), None, [7], FOUR)
    torch.testing.assert_close((model.decode(drawing.latents) + 1) / 2, pixels, atol=1e-4, rtol=0)


def test_a_step_is_told_a_thousand_sigma_and_the_scale_itself(base: Flux) -> None:
    x_t, t, cond = asked(base)
    schedule = base.denoiser.schedule
    _, timestep, _, _, scale = base.denoiser.inputs(x_t, t, cond)
    torch.testing.assert_close(timestep, 1000 * schedule.sigma(t))
    assert scale.tolist() == [3.5, 2.0]
    answer = base.denoiser(x_t, t, cond)
    others = {**base.encode_prompts(["blue dog", "a sun"]), GUIDANCE: torch.tensor([4.0, 3.0])}
    for name in cond:
        assert not torch.allclose(base.denoiser(x_t, t, {**cond, name: others[name]}), answer, atol=1e-5), name


# Noise and sizes


def test_a_shift_by_the_size_is_that_of_the_usual_one(folders: dict[str, Path], base: Flux, tmp_path: Path) -> None:
    def shift(model: Flux) -> float:
        assert isinstance(model.denoiser.schedule, RectifiedFlow)
        return model.denoiser.schedule.shift

    slope = (1.15 - 0.5) / (4096 - 256)
    assert shift(base) == pytest.approx(math.exp(0.5 + slope * (16 - 256)))
    usual = opened(with_card(folders["dev"], tmp_path / "usual"))
    assert usual.size == 128 * 4 and shift(usual) == pytest.approx(math.exp(1.15)), "of 4096 tokens"
    assert shift(opened(folders["schnell"])) == 1
    for size in (36, 0):
        with pytest.raises(ValueError, match=rf"fewstep\.json: size {size} must be a positive multiple of 8"):
            opened(with_card(folders["dev"], tmp_path / str(size), size=size))


def test_latents_are_not_packed_outside(base: Flux) -> None:
    assert base.latent_shape() == (16, 8, 8) and base.size == 32
    assert base.latent_shape(48, 16) == (16, 12, 4)
    with pytest.raises(ValueError, match=r"^size 12x16: width and height must be positive multiples of 8$"):
        base.latent_shape(16, 12)


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.9], [1.0, 0.5], [1 - step / 7 for step in range(7)]])
def test_an_exported_scheduler_draws_evenly_spaced_times(times: list[float]) -> None:
    schedule = RectifiedFlow(3.158)
    scheduler = student_scheduler(schedule, times, spaced_by_pipeline=True)
    wanted = schedule.sigma(torch.tensor([*times, 0.0], dtype=torch.float64))
    torch.testing.assert_close(scheduler.sigmas.double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("times", [[0.9], [1.0, 0.9, 0.1]])
def test_times_that_no_exported_scheduler_draws_at_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"export a step count whose times are evenly spaced from 1 down"):
        student_scheduler(RectifiedFlow(3.158), times, spaced_by_pipeline=True)


def test_what_a_text_encoder_is_missing_is_told(base: Flux) -> None:
    pipeline = FluxPipeline(**{**base.pipeline.components, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match=r"has no text_encoder; a FLUX\.1 needs both"):
        Flux(pipeline)


# A base that embeds guidance


def test_a_base_goes_without_the_prompt_by_the_empty_one(base: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale 0, which stands for that elsewhere, is none that the network knows."""
    told: list[tuple[float, bool]] = []
    empty, cond = base.encode_prompts([""]), base.encode_prompts([PROMPT])
    inputs = base.denoiser.inputs

    def seen(x_t: Tensor, t: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        told.append((float(given[GUIDANCE]), torch.equal(given["text_embeds"], empty["text_embeds"])))
        return inputs(x_t, t, given)

    monkeypatch.setattr(base.denoiser, "inputs", seen)
    diversity = Diversity(base_steps=2, base_guidance=2.5, unprompted=0.2)
    drawing = draw(base.copy(), cond, empty, [5], FOUR, guidance_scale=3.5, base=base, diversity=diversity)
    assert told == [(1.0, True), (2.5, False)]
    assert drawing.evaluations == 2 + 3
    with pytest.raises(CannotDraw, match="needs the empty prompt's condition"):
        draw(base.copy(), cond, None, [5], FOUR, guidance_scale=3.5, base=base, diversity=diversity)


def test_any_scale_costs_one_evaluation_and_needs_no_empty_prompt(base: Flux) -> None:
    x_t, t, cond = asked(base)
    rows: list[int] = []
    handle = base.network.register_forward_hook(lambda _, __, output: rows.append(len(output[0])))
    answers = [guided(base.denoiser, None, scale)(x_t, t, cond) for scale in (1.0, 3.5)]
    handle.remove()
    assert rows == [2, 2] and not torch.allclose(*answers)
    assert base.with_guidance_embedding().network is not base.network
    assert (base.default_steps, base.default_guidance) == (50, 3.5)


# Students


def test_all_layers_that_jobs_adapt_survive_the_file(base: Flux, tmp_path: Path) -> None:
    adapted, targets = base.copy(), base.lora_targets
    adapted.network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    names = [name for name, _ in adapted.network.named_parameters() if "lora_A" in name]
    assert not [target for target in targets if not any(f".{target}.lora_A" in f".{name}" for name in names)]
    x_t, t, cond = asked(base)
    told = adapted.denoiser(x_t, t, cond)
    config = adapted.network.peft_config["default"].to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    base.save_adapters(tmp_path, get_peft_model_state_dict(adapted.network), plain)
    assert all(name.startswith("transformer.") for name in load_file(tmp_path / LORA_FILE))
    merged = base.load_network(tmp_path)
    torch.testing.assert_close(merged.denoiser(x_t, t, cond), told, atol=1e-4, rtol=1e-4)
    assert merged.text_encoder is base.text_encoder
    pipeline = FluxPipeline(**{**base.copy().pipeline.components, "transformer": base.copy().network})
    pipeline.load_lora_weights(tmp_path)
    x0 = base.with_network(pipeline.transformer).denoiser(x_t, t, cond)
    torch.testing.assert_close(x0, told, atol=1e-4, rtol=1e-4)


def test_public_adapters_are_merged_at_their_scale(base: Flux, tmp_path: Path) -> None:
    """Some files say how strong they are, some change text encoders too, which stay as they are."""
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    layers = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.alpha": torch.tensor(1.0)}
    save_file(layers, tmp_path / LORA_FILE)
    merged = base.with_loras([(tmp_path, 0.5), (tmp_path, 0.25)])
    name = f"{layer.removeprefix('transformer.')}.weight"
    change = merged.network.get_parameter(name) - base.network.get_parameter(name)
    torch.testing.assert_close(change, 0.75 * (1 / 2) * (up @ down), atol=1e-5, rtol=1e-4)
    save_file({"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}, tmp_path / LORA_FILE)
    with pytest.raises(
        ValueError, match=rf"{LORA_FILE} has no adapters for a FluxTransformer2DModel: .* 'transformer'"
    ):
        base.load_network(tmp_path)


def test_a_network_of_another_size_survives_the_store(base: Flux, folders: dict[str, Path], tmp_path: Path) -> None:
    small = base.with_random_network({"num_layers": 1, "num_attention_heads": 1})
    small.save_network(tmp_path / "work", torch.float32)
    store = Store(tmp_path / "store")
    store.publish(student_manifest(folders["dev"], family=base.family), tmp_path / "work")
    student, cond = load_student(store.open("student"), base), base.encode_prompts([PROMPT])
    ours, others = (draw(each, cond, None, [7], FOUR, guidance_scale=3.5).latents for each in (student, small))
    assert torch.allclose(ours, others, atol=1e-5) and ours.shape == (1, *base.latent_shape())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": 1}, r"\['colour'\] cannot be changed.*num_single_layers"),
        ({"guidance_embeds": False, "in_channels": 16}, r"\['guidance_embeds', 'in_channels'\]"),
        ({"num_attention_heads": "two"}, "no FluxTransformer2DModel has"),
    ],
)
def test_a_network_that_cannot_be_is_refused(base: Flux, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        base.with_random_network(changes)


# Critics


def test_blocks_are_read_as_maps_in_one_evaluation_that_ends_after_the_last(base: Flux) -> None:
    x_t, t, cond = asked(base)
    x_t = x_t[:, :, :, :6]
    names = base.denoiser.feature_blocks
    assert names == [f"{kind}transformer_blocks.{index}" for kind in ("", "single_") for index in range(2)]
    calls: list[str] = []
    seen: dict[str, Tensor] = {}

    def called(name: str, output: Any) -> None:
        calls.append(name)
        seen[name] = output[1] if isinstance(output, tuple) else output

    handles = [
        base.network.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: called(name, output))
        for name in (*names, "norm_out")
    ]
    every = base.denoiser.block_features(x_t, t, cond, names)
    assert calls == names, "each block once, and nothing after the last"
    assert [tuple(each.shape) for each in every] == [(2, 16, 4, 3)] * 4
    for name, each in zip(names, every, strict=True):
        assert torch.equal(each[0, :, 3, 1], seen[name][0, -12:][3 * 3 + 1]), "a token a square, row by row"
    calls.clear()
    (early,) = base.denoiser.features(x_t, t, cond)
    assert calls == names[:2], "half of the blocks"
    for handle in handles:
        handle.remove()
    x0, (late,) = base.denoiser.with_features(x_t, t, cond)
    assert torch.equal(early, every[1]) and torch.equal(late, early)
    assert torch.equal(x0, base.denoiser(x_t, t, cond))
    assert base.denoiser.feature_channels == [16]
    assert not any(block._forward_hooks for block in base.network.modules()), "reading leaves nothing behind"


# The way in and out


def test_all_runs_in_half_precision_but_what_overflows_in_it(folders: dict[str, Path]) -> None:
    for model in (opened(folders["dev"], dtype=torch.float16), opened(folders["dev"]).to("cpu", torch.float16)):
        kept = {
            f"{part}.{name}"
            for part, module in model.components().items()
            for name, tensor in module.named_parameters()
            if tensor.dtype != torch.float16
        }
        assert kept == {"text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo.weight"}
        assert {each.dtype for each in model.encode_prompts([PROMPT]).values()} == {torch.float16}
    assert set(model.components()) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    latents = draw_base(model, model.encode_prompts([PROMPT]), None, [1], 2, 3.5).latents
    assert latents.dtype == torch.float32
    assert model.decode(latents).isfinite().all()
