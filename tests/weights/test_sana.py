"""What SANA has beside the other families: masked states after an instruction, a linear transformer, a DPM-Solver's flow.

Pixels are held against diffusers' in test_stable_diffusion.py too, which runs on SANA's classes as on the others'.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from distillers.tangents import jvp_along
from tests.helpers import student_manifest, tiny_sana_pipeline
from weights import prompts as prompt_encoding
from weights.contracts import GuidanceConvention, StepSchedule
from weights.diffusion.guidance import EmbeddedGuidance
from weights.diffusion.samplers import trailing_times
from weights.diffusion.schedules import RectifiedFlow
from weights.drawing import draw, draw_base
from weights.export import export
from weights.families import load
from weights.families.sana import Sana
from weights.linear_transformer import MASK
from weights.pipelines import LORA_FILE
from weights.store import Store
from weights.students import load_student

PROMPT = "red apple, noto"
FOUR = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])
SCHEDULER = "scheduler/scheduler_config.json"
AS_ASKED = {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sana_pipeline(tmp_path_factory.mktemp("base"))


def opened(folder: Path, **more: Any) -> Sana:
    model = load("sana", folder, **more)
    assert isinstance(model, Sana)
    return model


@pytest.fixture(scope="module")
def base(folder: Path) -> Sana:
    return opened(folder)


def theirs(folder: Path) -> SanaPipeline:
    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def changed(folder: Path, to: Path, file: str, **changes: object) -> Path:
    """A copy of the pipeline with a configuration of other values."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


def asked(model: Sana, *prompts: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents, times and conditions of two pictures."""
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([0.5, 1.0]), model.encode_prompts(list(prompts) or [PROMPT, ""])


# Prompts


def test_prompts_are_encoded_as_the_pipeline_does_when_it_draws(
    base: Sana, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own call gives the instruction, which calling ``encode_prompt`` alone leaves out."""
    pipeline, given = theirs(folder), {}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    encode = pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda *args, **named: given.setdefault(args[0], encode(*args, **named))
    )
    for prompt in ("Red Apple ", "blue dog"):
        pipeline(prompt, num_inference_steps=1, **AS_ASKED)
    (red, red_mask, empty, empty_mask), (blue, blue_mask, _, _) = given.values()
    for at_once in (64, 2, 1):
        monkeypatch.setattr(prompt_encoding, "PROMPTS_AT_ONCE", at_once)
        cond = base.encode_prompts(["Red Apple ", "", "blue dog", " "])
        assert cond[MASK].dtype == torch.bool
        assert torch.equal(cond[MASK].long(), torch.cat([red_mask, empty_mask, blue_mask, empty_mask]))
        wanted = torch.cat([red, empty, blue, empty])
        torch.testing.assert_close(cond["encoder_hidden_states"], wanted, atol=1e-4, rtol=1e-5)
    assert {name: tuple(each.shape) for name, each in cond.items()} == {
        "encoder_hidden_states": (4, 300, 12), MASK: (4, 300),
    }  # fmt: skip


def test_long_prompts_are_cut_off(base: Sana, folder: Path) -> None:
    long = "a, " * 400
    states, mask, *_ = theirs(folder).encode_prompt(long, False, complex_human_instruction=base._instruction)
    cond = base.encode_prompts([long])
    torch.testing.assert_close(cond["encoder_hidden_states"], states, atol=1e-4, rtol=1e-5)
    assert torch.equal(cond[MASK].long(), mask) and mask.all()


def test_the_network_sees_what_the_mask_lets_it_see(base: Sana) -> None:
    x_t, t, cond = asked(base)
    answer = base.denoiser(x_t, t, cond)
    states = torch.where(cond[MASK].unsqueeze(-1), cond["encoder_hidden_states"], 7.0)
    torch.testing.assert_close(base.denoiser(x_t, t, {**cond, "encoder_hidden_states": states}), answer)
    others = base.encode_prompts(["blue dog", "a sun"])
    for name in cond:
        assert not torch.allclose(base.denoiser(x_t, t, {**cond, name: others[name]}), answer, atol=1e-5), name


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "rms_norm_across_heads", "patch_size": 1, "timestep_scale": 0.001},
        {"out_channels": 16, "attention_bias": True},
    ],
    ids=["as SANA 1.5 and Sprint are", "with a variance"],
)
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_other_networks_draw_what_diffusers_draws(tmp_path: Path, changes: dict[str, Any], guidance: float) -> None:
    folder = tiny_sana_pipeline(tmp_path, **changes)
    model, pipeline = opened(folder), theirs(folder)
    drawing = draw_base(model, model.encode_prompts([PROMPT]), model.encode_prompts([""]), [5], 3, guidance)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times, generator = trailing_times(3)[:-1], torch.Generator().manual_seed(5)
    pixels = pipeline(PROMPT, sigmas=times, guidance_scale=guidance, generator=generator, **AS_ASKED).images
    assert torch.allclose((model.decode(drawing.latents) + 1) / 2, pixels, atol=1e-4)


# Noise


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' solver, under NumPy 2
def test_a_multistep_solvers_shift_is_read(base: Sana, folder: Path) -> None:
    schedule = base.denoiser.schedule
    assert isinstance(schedule, RectifiedFlow) and schedule.shift == 3
    timesteps = base.denoiser.inputs(*asked(base))[1]
    assert timesteps.dtype == torch.float32
    torch.testing.assert_close(timesteps, torch.tensor([750.0, 1000.0]))
    scheduler = theirs(folder).scheduler
    scheduler.set_timesteps(4)  # from the last training step down, in even steps
    times = torch.linspace(0.999, 0, 5, dtype=torch.float64)[:-1]
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), schedule.sigma(times), atol=1e-6, rtol=0)


@settings(max_examples=10)
@given(shift=st.floats(0.2, 8))
def test_a_flow_matching_schedulers_shift_is_read(base: Sana, shift: float) -> None:
    parts = {**base.pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift)}
    schedule = Sana(SanaPipeline(**parts)).denoiser.schedule
    assert isinstance(schedule, RectifiedFlow) and schedule.shift == pytest.approx(shift)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prediction_type": "epsilon"}, r"has \{'prediction_type': 'epsilon'.*set .*'flow_prediction'"),
        ({"use_flow_sigmas": False}, r"'use_flow_sigmas': False.*: set .*'use_flow_sigmas': True"),
        ({"use_karras_sigmas": True}, r"\{'use_karras_sigmas': True\} make .* leave them out"),
        ({"use_lu_lambdas": True}, "use_lu_lambdas"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"flow_shift": 0}, r"shift=0\.0 must be positive"),
    ],
)
def test_noise_that_the_shift_alone_does_not_tell_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        opened(changed(folder, tmp_path / "other", SCHEDULER, **changes))


def test_a_scheduler_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "other", "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    UniPCMultistepScheduler().save_pretrained(other / "scheduler")
    with pytest.raises(ValueError, match=r"is a UniPCMultistepScheduler, .* want .*, DPMSolverMultistepScheduler$"):
        opened(other)


def test_a_network_with_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"interpolation_scale is 1\.0: it has a position embedding, .* has null there"
    ):
        opened(tiny_sana_pipeline(tmp_path, interpolation_scale=1.0))


# Students


def test_layers_that_jobs_adapt_survive_the_file(base: Sana, tmp_path: Path) -> None:
    adapted = base.copy()
    targets = base.lora_targets
    adapted.network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    names = [name for name, _ in adapted.network.named_parameters() if "lora_A" in name]
    assert not [target for target in targets if not any(f".{target}.lora_A" in f".{name}" for name in names)]
    x_t, t, cond = asked(base)
    told = adapted.denoiser(x_t, t, cond)
    config = adapted.network.peft_config["default"].to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    base.save_adapters(tmp_path, get_peft_model_state_dict(adapted.network), config)
    before = base.denoiser(x_t, t, cond)
    merged = base.load_network(tmp_path)
    torch.testing.assert_close(merged.denoiser(x_t, t, cond), told, atol=1e-4, rtol=1e-4)
    assert torch.equal(base.denoiser(x_t, t, cond), before), "the base itself must stay as it was"
    assert merged.text_encoder is base.text_encoder and merged.vae is base.vae


def test_public_adapters_are_merged_at_their_scale(base: Sana, tmp_path: Path) -> None:
    layer = "transformer_blocks.0.attn2.to_q"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    layers = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    merged = base.with_loras([(tmp_path, 0.5), (tmp_path, 0.25)])
    change = merged.network.get_parameter(f"{layer}.weight") - base.network.get_parameter(f"{layer}.weight")
    torch.testing.assert_close(change, 0.75 * (up @ down), atol=1e-5, rtol=1e-4)
    save_file({"unet.mid_block.lora_A.weight": down}, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=rf"{LORA_FILE} has no adapters for a SanaTransformer2DModel: .*'transformer'"):
        base.with_loras([(tmp_path, 1.0)])


def test_a_network_of_another_size_survives_the_store(base: Sana, folder: Path, tmp_path: Path) -> None:
    small = base.with_random_network({"num_layers": 1, "num_attention_heads": 1})
    assert small.network.config.cross_attention_dim == 8, "which follows"
    small.save_network(tmp_path / "work", torch.float32)
    store = Store(tmp_path / "store")
    store.publish(student_manifest(folder, family=base.family), tmp_path / "work")
    student, cond = load_student(store.open("student"), base), base.encode_prompts([PROMPT])
    ours, wanted = (draw(each, cond, None, [7], FOUR).latents for each in (student, small))
    assert torch.allclose(ours, wanted, atol=1e-5) and ours.shape == (1, *base.latent_shape())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": 1}, r"\['colour'\] cannot be changed.*num_layers"),
        ({"timestep_scale": 0.001, "caption_channels": 4}, r"\['caption_channels', 'timestep_scale'\]"),
        ({"mlp_ratio": "wide"}, "no SanaTransformer2DModel has"),
    ],
)
def test_a_network_that_cannot_be_is_refused(base: Sana, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        base.with_random_network(changes)


# Guidance that the network is told


def told_guidance(base: Sana) -> Sana:
    """A student of the base that is told a scale, and answers to it."""
    student = base.with_guidance_embedding()
    torch.manual_seed(0)
    torch.nn.init.normal_(student.network.get_parameter("time_embed.guidance_embedder.linear_2.weight"), std=0.5)
    return student


def test_being_told_a_scale_changes_nothing_at_first(base: Sana) -> None:
    told = base.with_guidance_embedding()
    assert told.denoiser.embeds_guidance and not base.denoiser.embeds_guidance
    x_t, t, cond = asked(base)
    assert torch.equal(EmbeddedGuidance(told.denoiser, 4.0)(x_t, t, cond), base.denoiser(x_t, t, cond))
    told.network.requires_grad_(True)
    EmbeddedGuidance(told.denoiser, 4.0)(x_t, t, cond).square().mean().backward()
    learned = told.network.get_parameter("time_embed.guidance_embedder.linear_2.weight").grad
    assert learned is not None and learned.any(), "but it can be learned"
    other = told_guidance(base)
    first, second = (EmbeddedGuidance(other.denoiser, scale)(x_t, t, cond) for scale in (2.0, 4.0))
    assert not torch.allclose(first, second, atol=1e-4)
    kept = EmbeddedGuidance(other.with_guidance_embedding().denoiser, 4.0)(x_t, t, cond)
    assert torch.equal(kept, second), "learned weights are kept"


def test_a_student_that_is_told_its_guidance_is_served_and_not_exported(
    base: Sana, folder: Path, tmp_path: Path
) -> None:
    store, student = Store(tmp_path / "store"), told_guidance(base)
    student.save_network(tmp_path / "work", torch.float32)
    guidance = GuidanceConvention(trained_scale=5.0, default_scale=5.0, embedded=(2.0, 8.0))
    store.publish(student_manifest(folder, family=base.family, guidance=guidance), tmp_path / "work")
    loaded, cond = load_student(store.open("student"), base), base.encode_prompts([PROMPT])
    ours, wanted = (draw(each, cond, None, [7], FOUR, guidance_scale=5.0) for each in (loaded, student))
    assert ours.evaluations == 4, "no unconditional evaluation"
    torch.testing.assert_close(ours.latents, wanted.latents)
    with pytest.raises(ValueError, match="SanaPipeline does not give it: serve the student"):
        export(store, "student", tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


# Critics, and derivatives


def test_blocks_are_read_as_maps_in_one_evaluation_that_ends_after_the_last(base: Sana) -> None:
    x_t, t, cond = asked(base)
    x_t = x_t[:, :, :, :6]
    names = base.denoiser.feature_blocks
    assert names == [f"transformer_blocks.{index}" for index in range(3)]
    calls: list[str] = []
    tokens: list[Tensor] = []

    def seen(name: str, output: Tensor) -> None:
        calls.append(name)
        tokens.append(output)

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


def test_the_networks_exact_derivative_is_that_of_its_differences(base: Sana) -> None:
    """Linear attention, masked attention and the network's norms all have a forward-mode derivative."""
    x_t, t, cond = asked(base)
    velocity = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    network = base.copy().network.double()
    states, mask = (cond[name].double() for name in ("encoder_hidden_states", MASK))

    def predicted(x_t: Tensor, t: Tensor) -> Tensor:
        return base.denoiser.evaluate(network, x_t, t, states, mask)

    place, along = (x_t.double(), 750 * t.double()), velocity.double()
    _, exact = jvp_along(predicted, *place, along)
    step = 1e-3
    ahead, behind = (predicted(place[0] + h * along, place[1] + h) for h in (step, -step))
    torch.testing.assert_close(exact, (ahead - behind) / (2 * step), atol=1e-2 * float(exact.abs().max()), rtol=0)


# The way in and out


def test_sizes_are_multiples_of_the_autoencoders_scale_and_a_patch(base: Sana) -> None:
    assert (base.size, base.scale, base.default_steps, base.default_guidance) == (32, 4, 20, 4.5)
    assert base.latent_shape(48, 16) == (8, 12, 4)
    x_t = torch.randn(1, *base.latent_shape(48, 16))
    assert base.denoiser(x_t, torch.ones(1), base.encode_prompts([""])).shape == x_t.shape
    assert base.decode(x_t).shape == (1, 3, 48, 16)


def test_autoencoder_and_text_encoder_run_in_bfloat16_where_float16_is_requested(folder: Path) -> None:
    wanted = {"transformer": torch.float16, "vae": torch.bfloat16, "text_encoder": torch.bfloat16}
    for model in (opened(folder, dtype=torch.float16), opened(folder).to("cpu", torch.float16)):
        kinds = {name: {w.dtype for w in module.parameters()} for name, module in model.components().items()}
        assert kinds == {name: {dtype} for name, dtype in wanted.items()}
        frequencies = {name: each.dtype for name, each in model.text_encoder.named_buffers() if "inv_freq" in name}
        assert set(frequencies.values()) == {torch.float32}
    latents = draw_base(model, model.encode_prompts([PROMPT]), None, [1], 2, 1.0).latents
    assert latents.dtype == torch.float32
    assert model.decode(latents).isfinite().all()
