"""What SD3 has beside the other families: a transformer, a shifted flow, a third text encoder that may be absent.

Pixels are held against diffusers' in test_stable_diffusion.py too, which runs on SD3's classes as on the others'.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchLCMScheduler, StableDiffusion3Pipeline, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from tests.helpers import student_manifest, tiny_sd3_pipeline
from weights import prompts as prompt_encoding
from weights.contracts import StepSchedule
from weights.diffusion.samplers import trailing_times
from weights.diffusion.schedules import RectifiedFlow
from weights.drawing import draw, draw_base
from weights.export import export
from weights.families import load
from weights.families.stable_diffusion_3 import StableDiffusion3
from weights.pipelines import LORA_FILE
from weights.rectified_flow import student_scheduler
from weights.store import Store
from weights.students import load_student

PROMPT = "red apple, noto"
FOUR = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])
ABSENT = {"text_encoder_3": None, "tokenizer_3": None}
"""What diffusers itself wants to be told of a pipeline that was saved without T5."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without T5."""
    return tiny_sd3_pipeline(tmp_path_factory.mktemp("bare"), with_t5=False)


def opened(folder: Path, **more: Any) -> StableDiffusion3:
    model = load("stable_diffusion_3", folder, **more)
    assert isinstance(model, StableDiffusion3)
    return model


@pytest.fixture(scope="module")
def base(folder: Path) -> StableDiffusion3:
    return opened(folder)


@pytest.fixture(scope="module")
def bare(bare_folder: Path) -> StableDiffusion3:
    return opened(bare_folder)


def theirs(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, **({} if (folder / "text_encoder_3").is_dir() else ABSENT)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def changed(folder: Path, to: Path, file: str, **changes: object) -> Path:
    """A copy of the pipeline with a configuration of other values."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


def asked(model: StableDiffusion3, *prompts: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents, times and conditions of two pictures."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *model.latent_shape(), generator=generator)
    return x_t, torch.tensor([0.5, 1.0]), model.encode_prompts(list(prompts) or [PROMPT, ""])


# Prompts


@pytest.mark.parametrize("kind", ["folder", "bare_folder"])
def test_prompts_are_encoded_as_diffusers_does_whoever_shares_the_batch(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(kind)
    pipeline, model = theirs(folder), opened(folder)
    red, empty, red_vector, empty_vector = pipeline.encode_prompt("red apple", None, None)
    blue, _, blue_vector, _ = pipeline.encode_prompt("blue dog", None, None)
    for at_once in (64, 2, 1):
        monkeypatch.setattr(prompt_encoding, "PROMPTS_AT_ONCE", at_once)
        cond = model.encode_prompts(["red apple", "", "blue dog"])
        _, _, states, pooled = model.denoiser.inputs(torch.zeros(3, *model.latent_shape()), torch.ones(3), cond)
        torch.testing.assert_close(states, torch.cat([red, empty, blue]), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(pooled, torch.cat([red_vector, empty_vector, blue_vector]), atol=1e-5, rtol=1e-5)


def test_zeros_are_not_kept(base: StableDiffusion3, bare: StableDiffusion3) -> None:
    shapes = {name: tuple(each.shape) for name, each in base.encode_prompts([PROMPT]).items()}
    clips = {"encoder_hidden_states": (1, 24, 16 + 8), "text_embeds": (1, 12 + 10)}
    assert shapes == {**clips, "t5_hidden_states": (1, 256, 32)}
    assert {name: tuple(each.shape) for name, each in bare.encode_prompts([PROMPT]).items()} == clips
    assert not bare.denoiser.inputs(*asked(bare))[2][:, 24:].any(), "what diffusers puts in T5's place"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_base_without_t5_draws_what_diffusers_draws(
    bare: StableDiffusion3, bare_folder: Path, guidance: float
) -> None:
    drawing = draw_base(bare, bare.encode_prompts([PROMPT]), bare.encode_prompts([""]), [5], 3, guidance)
    generator, times = torch.Generator().manual_seed(5), trailing_times(3)[:-1]
    pixels = theirs(bare_folder)(
        PROMPT, sigmas=times, guidance_scale=guidance, generator=generator, output_type="pt"
    ).images
    assert torch.allclose((bare.decode(drawing.latents) + 1) / 2, pixels, atol=1e-4)


def test_t5_is_left_out_by_leaving_out_its_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "text_encoder_3")
    assert opened(tmp_path / "other").text_encoder_3 is None


def test_the_clips_cannot_be_left_out(bare: StableDiffusion3) -> None:
    pipeline = StableDiffusion3Pipeline(**{**bare.pipeline.components, "text_encoder_2": None, "tokenizer_2": None})
    with pytest.raises(ValueError, match=r"has no text_encoder_2; .* only text_encoder_3 may be left out"):
        StableDiffusion3(pipeline)


def test_the_network_listens_to_all_that_it_is_told(base: StableDiffusion3) -> None:
    x_t, t, cond = asked(base)
    answer = base.denoiser(x_t, t, cond)
    others = base.encode_prompts(["blue dog", "a sun"])
    for name in cond:
        assert not torch.allclose(base.denoiser(x_t, t, {**cond, name: others[name]}), answer, atol=1e-5), name


# Noise


def test_the_network_is_told_a_thousand_sigma(base: StableDiffusion3) -> None:
    assert isinstance(base.denoiser.schedule, RectifiedFlow) and base.denoiser.schedule.shift == 3
    timesteps = base.denoiser.inputs(*asked(base))[1]
    assert timesteps.dtype == torch.float32
    torch.testing.assert_close(timesteps, torch.tensor([750.0, 1000.0]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shift_terminal": 0.1}, r"'shift_terminal': 0\.1.* leave them out"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"shift": 0}, r"shift=0\.0 must be positive"),
    ],
)
def test_noise_that_shift_alone_does_not_tell_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        opened(changed(folder, tmp_path / "other", "scheduler/scheduler_config.json", **changes))


@pytest.mark.parametrize(("kind", "shift"), [("exponential", 1.583), ("linear", 0.4594)])
def test_a_shift_by_the_size_is_that_of_the_models_own(bare: StableDiffusion3, kind: str, shift: float) -> None:
    """It is what diffusers draws that size with."""
    config = {**bare.pipeline.scheduler.config, "use_dynamic_shifting": True, "time_shift_type": kind}
    pipeline = StableDiffusion3Pipeline(
        **{**bare.pipeline.components, "scheduler": FlowMatchLCMScheduler.from_config(config)}
    )
    schedule = StableDiffusion3(pipeline).denoiser.schedule
    assert isinstance(schedule, RectifiedFlow) and schedule.shift == pytest.approx(shift, abs=1e-3)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPT, sigmas=[1.0, 0.5], output_type="latent")
    assert pipeline.scheduler.sigmas[1] == pytest.approx(schedule.shift / (1 + schedule.shift), abs=1e-6)


def test_a_scheduler_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "other", "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    UniPCMultistepScheduler().save_pretrained(other / "scheduler")
    with pytest.raises(
        ValueError, match=r"is a UniPCMultistepScheduler, .* want one of FlowMatchEulerDiscreteScheduler"
    ):
        opened(other)


@settings(max_examples=50)
@given(shift=st.floats(0.2, 8), steps=st.integers(1, 12), num_train=st.sampled_from([500, 1000]))
def test_an_exported_scheduler_draws_evenly_spaced_times_at_any_shift(shift: float, steps: int, num_train: int) -> None:
    schedule = RectifiedFlow(shift, num_train)
    times = [1 - step / steps for step in range(steps)]
    scheduler = student_scheduler(schedule, times)
    wanted = schedule.sigma(torch.tensor([*times, 0.0], dtype=torch.float64))
    torch.testing.assert_close(scheduler.sigmas.double(), wanted, atol=1e-6, rtol=0)
    told = schedule.native_index(torch.tensor(times, dtype=torch.float64))
    torch.testing.assert_close(scheduler.timesteps.double(), told, atol=1e-3, rtol=0)


@pytest.mark.parametrize("times", [[0.9], [1.0, 0.9, 0.1], [0.9, 0.4]])
def test_times_that_no_exported_scheduler_draws_at_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"export a step count whose times are evenly spaced from 1 down"):
        student_scheduler(RectifiedFlow(3.0), times)


def test_two_steps_may_be_anywhere() -> None:
    sigmas = student_scheduler(RectifiedFlow(3.0), [1.0, 0.9]).sigmas
    assert sigmas.tolist() == pytest.approx([1, 2.7 / 2.8, 0])


# Students


def published(store: Store, model: StableDiffusion3, folder: Path, work: Path) -> StableDiffusion3:
    student = model.copy()
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.mul_(1.05)
    student.save_network(work, torch.float32)
    store.publish(student_manifest(folder, family=model.family), work)
    loaded = load_student(store.open("student"), model)
    assert isinstance(loaded, StableDiffusion3)
    return loaded


def test_an_export_draws_as_the_student_from_torchs_own_generator(
    bare: StableDiffusion3, bare_folder: Path, tmp_path: Path
) -> None:
    """diffusers' pipeline gives its generator to the first latents alone, and re-noises from torch's."""
    store = Store(tmp_path / "store")
    student = published(store, bare, bare_folder, tmp_path / "work")
    assert {path.name for path in (tmp_path / "store" / "student").iterdir()} == {"student.json", "transformer"}
    ours = (student.decode(draw(student, bare.encode_prompts([PROMPT]), None, [7], FOUR).latents) + 1) / 2
    pipeline = theirs(export(store, "student", tmp_path / "out", 4))

    def pixels(**more: Any) -> Tensor:
        drawn: Tensor = pipeline(PROMPT, num_inference_steps=4, guidance_scale=1.0, output_type="pt", **more).images
        return drawn

    torch.manual_seed(7)
    torch.testing.assert_close(pixels(), ours, atol=1e-5, rtol=0)
    assert (pixels(generator=torch.Generator().manual_seed(7)) - ours).abs().max() > 1e-3


def test_public_adapters_are_merged_at_their_scale(base: StableDiffusion3, tmp_path: Path) -> None:
    """Some are of text encoders too, which stay as they are."""
    layer = "transformer_blocks.0.attn.to_q"
    width = base.denoiser.feature_channels[0]
    down, up = torch.randn(2, width), torch.randn(width, 2)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers={f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up},
        text_encoder_lora_layers={"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 16)},
    )
    merged = base.with_loras([(tmp_path, 0.5), (tmp_path, 0.25)])
    change = merged.network.get_parameter(f"{layer}.weight") - base.network.get_parameter(f"{layer}.weight")
    torch.testing.assert_close(change, 0.75 * (up @ down), atol=1e-5, rtol=1e-4)
    assert merged.text_encoder is base.text_encoder


def test_adapters_of_another_network_are_refused(base: StableDiffusion3, tmp_path: Path) -> None:
    layers = {"mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 16)}
    base.pipeline_class.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    with pytest.raises(ValueError, match=rf"{LORA_FILE} has no adapters for a SD3Transformer2DModel: .* 'transformer'"):
        base.load_network(tmp_path)


def test_all_layers_that_jobs_adapt_survive_the_file(base: StableDiffusion3, tmp_path: Path) -> None:
    adapted = base.copy()
    targets = base.lora_targets
    adapted.network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    names = [name for name, _ in adapted.network.named_parameters() if "lora_A" in name]
    assert not [target for target in targets if not any(f".{target}.lora_A" in f".{name}" for name in names)]
    x_t, t, cond = asked(base)
    told = adapted.denoiser(x_t, t, cond)
    state = get_peft_model_state_dict(adapted.network)
    config = {
        k: sorted(v) if isinstance(v, set) else v for k, v in adapted.network.peft_config["default"].to_dict().items()
    }
    base.save_adapters(tmp_path, state, config)
    torch.testing.assert_close(base.load_network(tmp_path).denoiser(x_t, t, cond), told, atol=1e-4, rtol=1e-4)


def test_a_network_of_another_size_survives_the_store(base: StableDiffusion3, folder: Path, tmp_path: Path) -> None:
    small = base.with_random_network({"num_layers": 1, "num_attention_heads": 1})
    assert small.network.config.caption_projection_dim == 8, "which follows"
    small.save_network(tmp_path / "work", torch.float32)
    store = Store(tmp_path / "store")
    store.publish(student_manifest(folder, family=base.family), tmp_path / "work")
    student, cond = load_student(store.open("student"), base), base.encode_prompts([PROMPT])
    ours, theirs = (draw(each, cond, None, [7], FOUR).latents for each in (student, small))
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.shape == (1, *base.latent_shape())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": 1}, r"\['colour'\] cannot be changed.*num_layers"),
        ({"patch_size": 4}, "patch_size"),
        ({"attention_head_dim": 3, "num_attention_heads": 1}, "no SD3Transformer2DModel has"),
    ],
)
def test_a_network_that_cannot_be_is_refused(base: StableDiffusion3, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        base.with_random_network(changes)


def test_no_network_of_sd3_is_told_a_scale(base: StableDiffusion3) -> None:
    assert not base.denoiser.embeds_guidance
    with pytest.raises(TypeError, match="'stable_diffusion_3' cannot be conditioned on a guidance scale"):
        base.with_guidance_embedding()


# Critics


def test_blocks_are_read_as_maps_in_one_evaluation_that_ends_after_the_last(base: StableDiffusion3) -> None:
    x_t, t, cond = asked(base)
    x_t = x_t[:, :, :, :6]
    names = base.denoiser.feature_blocks
    assert names == [f"transformer_blocks.{index}" for index in range(3)]
    calls: list[str] = []
    tokens: list[Tensor] = []

    def seen(name: str, output: Any) -> None:
        calls.append(name)
        tokens.append(output[1])

    handles = [
        base.network.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen(name, output))
        for name in (*names, "proj_out")
    ]
    every = base.denoiser.block_features(x_t, t, cond, names)
    assert calls == names, "each block once, and nothing after the last"
    assert [tuple(each.shape) for each in every] == [(2, 16, 4, 3)] * 3
    assert torch.equal(every[2][0, :, 3, 1], tokens[2][0, 3 * 3 + 1]), "a token a patch, row by row"
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


def test_blocks_are_read_alike_where_activations_are_computed_again(base: StableDiffusion3) -> None:
    """Hooks run inside of what is computed again, and the pass is ended there."""
    gradients = []
    for checkpointed in (False, True):
        model = base.copy()
        model.network.requires_grad_(True).train()
        if checkpointed:
            model.network.enable_gradient_checkpointing()
        x_t, t, cond = asked(model)
        features = model.denoiser.block_features(x_t, t, cond, ["transformer_blocks.0", "transformer_blocks.1"])
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, "nothing is left behind"
        x0, (again,) = model.denoiser.with_features(x_t, t, cond)
        (sum(each.square().mean() for each in (*features, again)) + x0.square().mean()).backward()
        gradients.append({name: weight.grad for name, weight in model.network.named_parameters()})
    plain, recomputed = gradients
    assert sum(each is not None for each in plain.values()) > 60
    assert not [name for name, each in plain.items() if each is not None and not torch.equal(each, recomputed[name])]


# The way in and out


def test_a_small_autoencoder_takes_its_place(base: StableDiffusion3) -> None:
    """As TAESD3 does."""
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=16,
    )
    model = StableDiffusion3(StableDiffusion3Pipeline(**{**base.pipeline.components, "vae": small}))
    assert model.scale == 4 and model.size == 32
    assert model.decode(model.encode(torch.zeros(1, 3, 16, 24))).shape == (1, 3, 16, 24)


def test_sizes_are_as_large_as_the_network_has_positions_for(base: StableDiffusion3) -> None:
    assert base.latent_shape() == (16, 8, 8)
    assert base.latent_shape(48, 16) == (16, 12, 4)
    x_t = torch.randn(1, *base.latent_shape(48, 16))
    assert base.denoiser(x_t, torch.ones(1), base.encode_prompts([""])).shape == x_t.shape
    with pytest.raises(ValueError, match=r"^size 16x56: width and height must be at most 48, since"):
        base.latent_shape(56, 16)


def test_all_runs_in_half_precision_but_what_overflows_in_it(folder: Path) -> None:
    """As diffusers runs the autoencoder, and transformers T5."""
    for model in (opened(folder, dtype=torch.float16), opened(folder).to("cpu", torch.float16)):
        kept = {
            f"{part}.{name}"
            for part, module in model.components().items()
            for name, tensor in module.named_parameters()
            if tensor.dtype != torch.float16
        }
        assert kept == {"text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo.weight"}
        assert {each.dtype for each in model.encode_prompts([PROMPT]).values()} == {torch.float16}
    assert set(model.components()) == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    latents = draw_base(model, model.encode_prompts([PROMPT]), None, [1], 2, 1.0).latents
    assert latents.dtype == torch.float32
    assert model.decode(latents).isfinite().all()
