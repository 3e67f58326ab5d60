"""The families of pipelines against diffusers itself: the same pixels, from a base, a student and an export.

What only UNets have is checked on UNets' families; what only SD3's, SANA's or FLUX.1's has, in test_stable_diffusion_3.py,
test_sana.py and test_flux.py.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.helpers import (
    student_manifest,
    tiny_flux_pipeline,
    tiny_pipeline,
    tiny_sana_pipeline,
    tiny_sd3_pipeline,
    tiny_sd15_pipeline,
    tiny_sdxl_pipeline,
)
from weights import autoencoder
from weights.contracts import BaseReference, GuidanceConvention, StepSchedule
from weights.diffusion.guidance import EmbeddedGuidance
from weights.diffusion.samplers import trailing_times
from weights.diffusion.schedules import RectifiedFlow
from weights.drawing import draw, draw_base
from weights.export import export
from weights.families import AUTO, load
from weights.families.sana import Sana
from weights.families.stable_diffusion import StableDiffusion
from weights.pipelines import LORA_FILE, PipelineModel
from weights.store import NotFound, Store, digest_base
from weights.students import WrongBase, check_base, load_student

PROMPT = "red apple, noto"
FOUR = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])


UNETS = {"bundled": tiny_pipeline, "sd15": tiny_sd15_pipeline, "sdxl": tiny_sdxl_pipeline}
"""Of the bundled teacher's classes, of Stable Diffusion 1's, and of SDXL's."""
EVERY = {**UNETS, "sd3": tiny_sd3_pipeline, "sana": tiny_sana_pipeline, "flux": tiny_flux_pipeline}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A pipeline's folder by its name in `EVERY`."""
    return cache(lambda name: EVERY[name](tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def opened() -> Callable[[Path], PipelineModel]:
    return cache(open_base)


@pytest.fixture(scope="module", params=EVERY)
def base_folder(request: pytest.FixtureRequest, made: Callable[[str], Path]) -> Path:
    return made(request.param)


@pytest.fixture(scope="module")
def base(base_folder: Path, opened: Callable[[Path], PipelineModel]) -> PipelineModel:
    return opened(base_folder)


@pytest.fixture(scope="module", params=UNETS)
def unet_folder(request: pytest.FixtureRequest, made: Callable[[str], Path]) -> Path:
    return made(request.param)


@pytest.fixture(scope="module")
def unet_base(unet_folder: Path, opened: Callable[[Path], PipelineModel]) -> StableDiffusion:
    model = opened(unet_folder)
    assert isinstance(model, StableDiffusion)
    return model


def open_base(folder: Path) -> PipelineModel:
    model = load(AUTO, folder)
    assert isinstance(model, PipelineModel)
    return model


def published(store: Store, model: PipelineModel, base_folder: Path, tmp_path: Path, **changes: object) -> None:
    student = model.copy()
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.mul_(1.05)
    student.save_network(tmp_path / "work", torch.float32)
    store.publish(student_manifest(base_folder, **{"family": model.family, **changes}), tmp_path / "work")


def diffusers_pixels(
    pipeline: DiffusionPipeline, steps: int, guidance: float, seed: int, **more: object
) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator: torch.Generator | None = torch.Generator().manual_seed(seed)
    if isinstance(pipeline, StableDiffusion3Pipeline | FluxPipeline):  # which hand no generator on to their scheduler
        torch.manual_seed(seed)
        generator = None
    if isinstance(pipeline, SanaPipeline):  # which draws 1024 pixels unless told, and sizes of its table alone
        more = {"height": 32, "width": 32, "use_resolution_binning": False, **more}
    asked = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, "output_type": "pt"}
    if isinstance(pipeline, FluxPipeline):  # which knows no usual size of its own
        asked |= {"height": 32, "width": 32}
    return pipeline(PROMPT, **{**asked, **more}).images


def test_the_base_draws_what_diffusers_draws(base: PipelineModel, base_folder: Path) -> None:
    drawing = draw_base(base, base.encode_prompts([PROMPT]), base.encode_prompts([""]), [5], 5, 3.0)
    pipeline = DiffusionPipeline.from_pretrained(base_folder, dtype=torch.float32)
    times: dict[str, object] = {}
    if isinstance(base, Sana):  # whose own scheduler is of second order
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    if isinstance(base.denoiser.schedule, RectifiedFlow):
        times["sigmas"] = trailing_times(5)[:-1]  # before their shift
    else:
        ending_clean = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **ending_clean)
    theirs = diffusers_pixels(pipeline, 5, 3.0, seed=5, **times)
    assert drawing.evaluations == (5 if isinstance(pipeline, FluxPipeline) else 10)
    assert torch.allclose((base.decode(drawing.latents) + 1) / 2, theirs, atol=1e-4)


def test_an_exported_student_draws_the_same_pixels_with_diffusers_alone(
    base: PipelineModel, base_folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    published(store, base, base_folder, tmp_path)
    student = load_student(store.open("student"), base)
    ours = (student.decode(draw(student, base.encode_prompts([PROMPT]), None, [7], FOUR).latents) + 1) / 2
    exported = export(store, "student", tmp_path / "out", 4)
    pipeline = DiffusionPipeline.from_pretrained(exported, dtype=torch.float32)
    theirs = diffusers_pixels(pipeline, 4, 1.0, seed=7)
    assert (ours - theirs).abs().mean() * 255 < 0.01
    assert exported.stat().st_mode == tmp_path.joinpath("store").stat().st_mode, (
        "whoever may read the store may read it"
    )
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in exported.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}, "also the weights"
    for written in (exported, store.open("student").path):
        configs = {path.relative_to(written): path.read_text() for path in written.rglob("*.json")}
        named = [name for name, text in configs.items() if name.name != "student.json" and str(tmp_path.parent) in text]
        assert configs and not named, "they tell where the base lay on this machine"
    base_pixels = (base.decode(draw(base, base.encode_prompts([PROMPT]), None, [7], FOUR).latents) + 1) / 2
    assert (ours - base_pixels).abs().mean() * 255 > 0.01, "the student's own weights must show"


@pytest.mark.parametrize(
    "changes",
    [{"thresholding": True, "sample_max_value": 0.5}, {"num_train_timesteps": 500}],
    ids=["of which no more is taken than its noise", "of fewer timesteps"],
)
def test_a_base_of_another_scheduler_exports(base_folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    settings = other / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **changes}))
    base = load(AUTO, other)
    store = Store(tmp_path / "store")
    published(store, base, other, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(export(store, "student", tmp_path / "out", 4), dtype=torch.float32)
    student = load_student(store.open("student"), base)
    ours = (student.decode(draw(student, base.encode_prompts([PROMPT]), None, [7], FOUR).latents) + 1) / 2
    assert (ours - diffusers_pixels(pipeline, 4, 1.0, seed=7)).abs().mean() * 255 < 0.01


@pytest.mark.parametrize("index", ["{", "[]", "{}", "null"])
def test_an_index_that_names_no_class_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model_index.json").write_text(index)
    for family in (AUTO, "stable_diffusion"):
        with pytest.raises(ValueError, match=r"model_index\.json is not a pipeline's index"):
            load(family, tmp_path)


def test_an_unknown_prediction_is_refused(unet_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(unet_folder, other)
    path = other / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "flow_prediction"}))
    with pytest.raises(ValueError, match="'flow_prediction': use one of eps"):
        load(AUTO, other)


def test_eps_in_pure_noise_is_refused(unet_folder: Path, tmp_path: Path) -> None:
    """x_0 = (x_t - sigma eps) / alpha, and alpha is 0 there."""
    other = tmp_path / "other"
    shutil.copytree(unet_folder, other)
    index = json.loads((other / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (other / "model_index.json").write_text(json.dumps(index))
    usual = {"steps_offset": 1, "clip_sample": False}  # diffusers warns of others
    DDIMScheduler(rescale_betas_zero_snr=True, **usual).save_pretrained(other / "scheduler")
    with pytest.raises(ValueError, match="or turn rescale_betas_zero_snr off"):
        load(AUTO, other)
    DDIMScheduler(**usual).save_pretrained(other / "scheduler")
    load(AUTO, other)


def test_a_scheduler_of_another_kind_of_noise_is_refused(unet_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(unet_folder, other)
    EDMEulerScheduler().save_pretrained(other / "scheduler")
    index = json.loads((other / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="EDMEulerScheduler, does not preserve variance: use one with alphas"):
        load(AUTO, other)


def test_other_precisions_alone_are_no_base(base_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    for path in other.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(NotFound, match=r"save the pipeline again with safe_serialization=True and without a variant"):
        digest_base(other)


def test_an_export_finds_a_base_that_has_moved(base: PipelineModel, base_folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    gone = BaseReference(id=str(tmp_path / "gone"), sha256=digest_base(base_folder))
    published(store, base, base_folder, tmp_path, base=gone)
    with pytest.raises(FileNotFoundError, match="gone"):
        export(store, "student", tmp_path / "out", 4)
    with pytest.raises(WrongBase, match="made from base"):
        export(store, "student", tmp_path / "out", 4, base=str(tiny_pipeline(tmp_path / "other", seed=1)))
    exported = export(store, "student", tmp_path / "out", 2, base=str(base_folder))  # it was trained for four alone
    assert (exported / "model_index.json").is_file()


def test_an_export_keeps_the_terms_of_its_base_alone(
    made: Callable[[str], Path], opened: Callable[[Path], PipelineModel], tmp_path: Path
) -> None:
    base_folder, store, plain = tmp_path / "base", Store(tmp_path / "store"), opened(made("bundled"))
    shutil.copytree(made("bundled"), base_folder)
    names = ["LICENSE", "LICENSE.md", "licenses-of-parts.txt", "NOTICE"]
    for name in (*names, "README.md"):
        (base_folder / name).write_text(name)
    (base_folder / "NOTICES").mkdir()
    (base_folder / "unet" / "LICENSE").touch()
    (base_folder / "NOTICE").chmod(0o600)
    published(store, plain, base_folder, tmp_path)
    exported = export(store, "student", tmp_path / "out", 4)
    files = {path.name: path for path in exported.iterdir() if path.is_file()}
    assert files.keys() == {*names, "model_index.json", "student.json"}
    assert [files[name].read_text() for name in names] == names
    assert files["NOTICE"].stat().st_mode == files["model_index.json"].stat().st_mode


@pytest.mark.parametrize(
    ("family", "kind", "says"),
    [
        ("stable_diffusion", "StableDiffusionXLPipeline", r"fine-tunes\): family 'stable_diffusion_xl' takes it$"),
        ("stable_diffusion_xl", "StableDiffusionPipeline", r"not its refiner\): family 'stable_diffusion' takes it$"),
        ("stable_diffusion_xl", "StableDiffusion3Pipeline", r"refiner\): family 'stable_diffusion_3' takes it$"),
        ("stable_diffusion_xl", "FluxPipeline", r"refiner\): family 'flux' takes it$"),
        ("flux", "FluxKontextPipeline", r"holds a FluxKontextPipeline, and family 'flux' .* fine-tunes\)$"),
        ("auto", "FluxKontextPipeline", r"holds a FluxKontextPipeline, which no family loads; .*: FluxPipeline, Sana"),
    ],
)
def test_another_kind_of_pipeline_is_refused_by_its_name(tmp_path: Path, family: str, kind: str, says: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ValueError, match=says):
        load(family, tmp_path)


def told_guidance(unet_base: StableDiffusion) -> StableDiffusion:
    """A student of the base that is told a scale, and answers to it."""
    student = unet_base.with_guidance_embedding()
    torch.manual_seed(0)
    torch.nn.init.normal_(student.network.get_parameter("time_embedding.cond_proj.weight"), std=0.1)
    return student


def test_being_told_a_scale_changes_nothing_at_first(unet_base: StableDiffusion) -> None:
    told = unet_base.with_guidance_embedding()
    assert told.denoiser.embeds_guidance and not unet_base.denoiser.embeds_guidance
    cond = unet_base.encode_prompts([PROMPT])
    x_t, t = torch.randn(1, *unet_base.latent_shape(), generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    plain = unet_base.denoiser(x_t, t, cond)
    assert torch.allclose(EmbeddedGuidance(told.denoiser, 4.0)(x_t, t, cond), plain, atol=1e-5)
    other = told_guidance(unet_base).denoiser
    first, second = (EmbeddedGuidance(other, scale)(x_t, t, cond) for scale in (2.0, 4.0))
    assert not torch.allclose(first, second)
    again = told_guidance(unet_base).with_guidance_embedding()
    kept = EmbeddedGuidance(again.denoiser, 4.0)(x_t, t, cond)
    assert torch.allclose(kept, second, atol=1e-5), "learned weights are kept"


def test_a_student_that_is_told_its_guidance_survives_the_store_and_exports(
    unet_base: StableDiffusion, unet_folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    told_guidance(unet_base).save_network(tmp_path / "work", torch.float32)
    guidance = GuidanceConvention(trained_scale=5.0, default_scale=5.0, embedded=(2.0, 8.0))
    store.publish(student_manifest(unet_folder, family=unet_base.family, guidance=guidance), tmp_path / "work")
    student = load_student(store.open("student"), unet_base)
    drawing = draw(student, unet_base.encode_prompts([PROMPT]), None, [7], FOUR, guidance_scale=5.0)
    assert drawing.evaluations == 4, "no unconditional evaluation"
    exported = export(store, "student", tmp_path / "out", 4)
    pipeline = DiffusionPipeline.from_pretrained(exported, dtype=torch.float32)
    ours = (student.decode(drawing.latents) + 1) / 2
    assert (ours - diffusers_pixels(pipeline, 4, 5.0, seed=7)).abs().mean() * 255 < 0.01
    assert (ours - diffusers_pixels(pipeline, 4, 3.0, seed=7)).abs().mean() * 255 > 0.01


@pytest.mark.parametrize(
    ("told", "plain", "timesteps"),
    [
        # SDXL's published one-step DMD2 student starts from pure noise as if it were t = 0.4.
        (StepSchedule(timesteps=[1.0], conditioning=[0.4]), StepSchedule(timesteps=[1.0]), [399]),
        (StepSchedule(timesteps=[0.4]), StepSchedule(timesteps=[1.0]), [399]),
        (
            StepSchedule(timesteps=[1.0, 0.49], conditioning=[0.98, 0.49]),
            StepSchedule(timesteps=[1.0, 0.49]),
            [979, 489],
        ),
    ],
)
def test_a_student_whose_first_step_is_told_another_time_exports(
    unet_base: StableDiffusion,
    unet_folder: Path,
    tmp_path: Path,
    told: StepSchedule,
    plain: StepSchedule,
    timesteps: list[int],
) -> None:
    store, cond, steps = Store(tmp_path / "store"), unet_base.encode_prompts([PROMPT]), len(timesteps)
    published(store, unet_base, unet_folder, tmp_path, schedules={steps: told})
    student = load_student(store.open("student"), unet_base)
    pipeline = DiffusionPipeline.from_pretrained(export(store, "student", tmp_path / "out", steps), dtype=torch.float32)
    theirs = diffusers_pixels(pipeline, steps, 1.0, seed=7)
    ours, other = ((student.decode(draw(student, cond, None, [7], s).latents) + 1) / 2 for s in (told, plain))
    assert (ours - theirs).abs().mean() * 255 < 0.01
    assert (other - theirs).abs().mean() * 255 > 0.01, "the time must show"
    assert pipeline.scheduler.timesteps.tolist() == timesteps


def test_a_network_of_another_size_survives_the_store(
    unet_base: StableDiffusion, unet_folder: Path, tmp_path: Path
) -> None:
    small = unet_base.with_random_network({"block_out_channels": (4, 8, 8)})
    assert 4 * sum(w.numel() for w in small.network.parameters()) < 3 * sum(
        w.numel() for w in unet_base.network.parameters()
    )
    small.save_network(tmp_path / "work", torch.float32)
    store = Store(tmp_path / "store")
    store.publish(student_manifest(unet_folder, family=unet_base.family), tmp_path / "work")
    student, cond = load_student(store.open("student"), unet_base), unet_base.encode_prompts([PROMPT])
    ours, theirs = (draw(each, cond, None, [7], FOUR).latents for each in (student, small))
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.shape == (1, *unet_base.latent_shape())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": 1}, r"\['colour'\] cannot be changed.*block_out_channels"),
        ({"in_channels": 3}, "in_channels"),
        ({"block_out_channels": [4, 8]}, "no UNet2DConditionModel has"),
    ],
)
def test_a_network_that_cannot_be_is_refused(unet_base: StableDiffusion, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unet_base.with_random_network(changes)


def test_export_refuses_what_diffusers_cannot_run(base: PipelineModel, base_folder: Path, tmp_path: Path) -> None:
    flow = isinstance(base.denoiser.schedule, RectifiedFlow)
    schedules = {
        1: StepSchedule(timesteps=[1.0], conditioning=[0.4 if flow else 0.4005]),
        2: StepSchedule(timesteps=[1.0, 0.5], sampler="ddim"),
        3: StepSchedule(timesteps=[1.0, 0.9, 0.8]),
        5: StepSchedule(timesteps=[1.0, 0.8, 0.6, 0.4, 0.2], conditioning=[0.4, 0.3, 0.2, 0.1, 0.05]),
    }
    store = Store(tmp_path / "store")
    published(store, base, base_folder, tmp_path, schedules=schedules)
    for steps, message in (
        (1, r"t = \[0\.4\] for states at \[1\.0\], but" if flow else r"t = \[0\.4005\], between two of the 1000"),
        (2, "consistency"),
        (3, "runs 3 steps at"),
        (5, r"t = \[0\.4, .* tells? it .* export .* conditioning times"),
        (6, "1 to 5, not 6"),
    ):
        with pytest.raises(ValueError, match=message):
            export(store, "student", tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out-*")), "a refused export leaves nothing behind"
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="new folder"):
        export(store, "student", tmp_path / "out", 4)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/out cannot be made \(Not a directory\): export to"):
        export(store, "student", tmp_path / "file" / "out", 4)


def test_lora_adapters_are_merged_into_a_copy_of_the_network(unet_base: StableDiffusion, tmp_path: Path) -> None:
    adapted = unet_base.copy()
    adapted.network.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "conv1"], init_lora_weights=False)
    )
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(adapted.network), unet_lora_adapter_metadata=None
    )
    assert (tmp_path / LORA_FILE).is_file()
    x_t, t, cond = torch.randn(1, *unet_base.latent_shape()), torch.tensor([0.5]), unet_base.encode_prompts([PROMPT])
    with torch.no_grad():
        before = unet_base.denoiser(x_t, t, cond)
        merged = unet_base.load_network(tmp_path)
        assert not torch.allclose(merged.denoiser(x_t, t, cond), before, atol=1e-3)
        assert torch.equal(unet_base.denoiser(x_t, t, cond), before), "the base itself must stay as it was"
    assert merged.text_encoder is unet_base.text_encoder
    assert merged.vae is unet_base.vae


def test_features_stop_early_and_are_the_same(unet_base: StableDiffusion) -> None:
    x_t, t, cond = (
        torch.randn(2, *unet_base.latent_shape()),
        torch.tensor([0.5, 1.0]),
        unet_base.encode_prompts([PROMPT, ""]),
    )
    calls = []
    handle = unet_base.network.conv_out.register_forward_hook(lambda *_: calls.append(1))
    x0, features = unet_base.denoiser.with_features(x_t, t, cond)
    assert len(calls) == 1
    early = unet_base.denoiser.features(x_t, t, cond)
    handle.remove()
    assert len(calls) == 1, "features alone must not run the up blocks"
    assert torch.equal(early[0], features[0])
    assert torch.equal(x0, unet_base.denoiser(x_t, t, cond))
    assert [f.shape[1] for f in early] == unet_base.denoiser.feature_channels


def test_blocks_are_read_in_one_evaluation_that_ends_after_the_last(unet_base: StableDiffusion) -> None:
    x_t, t, cond = (
        torch.randn(2, *unet_base.latent_shape()),
        torch.tensor([0.5, 1.0]),
        unet_base.encode_prompts([PROMPT, ""]),
    )
    names = unet_base.denoiser.feature_blocks
    sides = [[f"{side}_blocks.{index}" for index in range(3)] for side in ("down", "up")]
    assert names == [*sides[0], "mid_block", *sides[1]]
    calls: list[str] = []
    handles = [
        unet_base.network.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        for name in (*names, "conv_out")
    ]
    every = unet_base.denoiser.block_features(x_t, t, cond, names)
    assert calls == names, "each block once, and nothing after the last"
    assert [tuple(each.shape) for each in every] == [
        (2, 8, 4, 4), (2, 16, 2, 2), (2, 16, 2, 2), (2, 16, 2, 2), (2, 16, 4, 4), (2, 16, 8, 8), (2, 8, 8, 8),
    ]  # fmt: skip
    calls.clear()
    some = unet_base.denoiser.block_features(x_t, t, cond, ["down_blocks.1", "mid_block"])
    for handle in handles:
        handle.remove()
    assert calls == names[:4]
    assert torch.equal(some[0], every[1]) and torch.equal(some[1], every[3])
    assert torch.equal(every[3], unet_base.denoiser.features(x_t, t, cond)[0])
    assert not any(block._forward_hooks for block in unet_base.network.modules()), "reading leaves nothing behind"


def test_points_of_a_clip_are_of_length_one_too(
    made: Callable[[str], Path], opened: Callable[[Path], PipelineModel]
) -> None:
    points = opened(made("sd15")).embed_prompts([PROMPT, "blue dog", PROMPT])
    assert torch.allclose(points.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(points[0], points[2])
    assert not torch.allclose(points[0], points[1], atol=1e-3)


def test_large_pictures_go_through_the_autoencoder_a_few_at_a_time(
    base: PipelineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = torch.rand(5, 3, 32, 32) * 2 - 1
    latents = base.encode(pictures)
    decoded = base.decode(latents)
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 2 * 32 * 32 + 5)
    rows: list[int] = []
    handles = [
        getattr(base.vae, side).register_forward_hook(lambda _, __, output: rows.append(len(output)))
        for side in ("encoder", "decoder")
    ]
    torch.testing.assert_close(base.encode(pictures), latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(base.decode(latents), decoded)
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 5)
    base.decode(latents[:2])
    for handle in handles:
        handle.remove()
    assert rows == [2, 2, 1, 2, 2, 1, 1, 1], "one at least, however large"


@pytest.mark.parametrize(("height", "width"), [(30, 32), (32, 12), (-32, 32)])
def test_a_size_that_cannot_be_drawn_is_refused(base: PipelineModel, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=r"multiples of (16|8)$"):
        base.latent_shape(height, width)


def test_a_student_is_refused_another_base(base: PipelineModel, base_folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    published(store, base, base_folder, tmp_path)
    folder = store.open("student")
    check_base(folder, digest_base(base_folder))
    with pytest.raises(WrongBase, match="was made from base"):
        check_base(folder, digest_base(tiny_pipeline(tmp_path / "other", seed=1)))
    published(store, base, base_folder, tmp_path / "b", name="stranger", family="gaussian_mixture")
    with pytest.raises(WrongBase, match="of family"):
        load_student(store.open("stranger"), base)


def test_a_guided_base_at_the_first_trailing_time_sees_pure_noise(unet_base: StableDiffusion) -> None:
    assert trailing_times(4)[0] == 1.0
    rescaled = unet_base.pipeline.scheduler.config.get("rescale_betas_zero_snr", False)
    assert (float(unet_base.denoiser.schedule.alpha(torch.tensor([1.0]))) < 1e-6) == rescaled, "it must survive loading"
