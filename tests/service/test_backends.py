"""Backends draw the same pictures, keep what they made, and refuse what cannot be."""

import copy
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from service.engine import backends
from service.engine.backends import compiler, make_backend
from service.engine.backends.base import doubling
from service.engine.backends.cache import Cache
from service.engine.backends.compiler import Compiler
from service.engine.backends.openvino_backend import OpenVinoBackend
from service.engine.backends.program import Program
from service.engine.backends.torch_backend import TorchBackend
from service.settings import BadSettings, Settings, read_settings
from tests.architecture.source import ROOT
from tests.helpers import tiny_pipeline, tiny_sdxl_pipeline
from weights.bundled import STUDENTS
from weights.drawing import draw, draw_base
from weights.families import TextToImage, load
from weights.families.base import Part
from weights.families.stable_diffusion import StableDiffusion
from weights.store import Store
from weights.students import load_student

CPU = torch.device("cpu")
PROMPTS = ["red apple, noto emoji", "happy cat face, fluent 3d emoji"]
LEVEL = 2 / 255
"""One level of 8 bits, in pictures of [-1, 1]."""


def openvino(folder: Path, precision: Any = "f32", most: int = 4) -> OpenVinoBackend:
    return OpenVinoBackend(batches=doubling(most), cache=Cache(folder), precision=precision, threads=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def backend(cache: Path) -> OpenVinoBackend:
    return openvino(cache)


@dataclass(frozen=True)
class Pair:
    """A model as torch runs it, and as OpenVINO does."""

    plain: TextToImage
    prepared: TextToImage

    def apart(self, picture: Callable[[TextToImage], Tensor]) -> Tensor:
        """How far the pictures are from each other, in levels of 8 bits."""
        with torch.inference_mode():
            return (picture(self.plain) - picture(self.prepared)).abs() / LEVEL


@pytest.fixture(scope="module")
def bundled(backend: OpenVinoBackend) -> Pair:
    base = load("stable_diffusion", "emoji-base")
    return Pair(base, backend.prepare(base))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, backend: OpenVinoBackend) -> Pair:
    base = load("stable_diffusion", tiny_pipeline(tmp_path_factory.mktemp("tiny")))
    return Pair(base, backend.prepare(base))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 1.0), (4, 1.0), (4, 3.0)])
def test_the_bundled_teacher_draws_the_same(bundled: Pair, steps: int, guidance_scale: float) -> None:
    def picture(model: TextToImage) -> Tensor:
        cond, uncond = model.encode_prompts(PROMPTS), model.encode_prompts([""])
        return model.decode(draw_base(model, cond, uncond, [1, 2], steps, guidance_scale).latents)

    assert set(bundled.prepared.programs) == {"network", "decoder", "text_encoder"}
    assert bundled.apart(picture).max() <= 2


def test_the_bundled_student_draws_the_same(bundled: Pair, backend: OpenVinoBackend) -> None:
    folder = Store(STUDENTS).open("emoji-average")
    student = load_student(folder, bundled.plain)
    prepared = backend.prepare(load_student(folder, bundled.plain), bundled.prepared)
    for name in ("decoder", "text_encoder"):
        assert prepared.programs[name] is bundled.prepared.programs[name], "shared with the base"
    assert prepared.programs["network"] is not bundled.prepared.programs["network"]
    own, kept = (dict(each.network.named_parameters()) for each in (student, prepared))
    assert {n: (p.shape, p.dtype) for n, p in own.items()} == {n: (p.shape, p.dtype) for n, p in kept.items()}
    assert {p.device.type for p in kept.values()} == {"meta"}, "its program has packed the weights: not kept twice"
    assert (prepared.device, prepared.dtype, prepared.size) == (student.device, student.dtype, student.size)
    assert 0 < prepared.extra_bytes < bundled.prepared.extra_bytes
    for steps in (1, 4):
        schedule = folder.manifest.schedules[steps]
        apart = Pair(student, prepared).apart(
            lambda model, schedule=schedule: model.decode(
                draw(model, model.encode_prompts(PROMPTS), None, [1, 2], schedule).latents
            )
        )
        assert apart.max() <= 2


def test_in_bfloat16_pictures_stay_close(bundled: Pair, cache: Path) -> None:
    prepared = openvino(cache, "bf16").prepare(bundled.plain)

    def picture(model: TextToImage) -> Tensor:
        return model.decode(draw_base(model, model.encode_prompts(PROMPTS), None, [1, 2], 4, 1.0).latents)

    assert Pair(bundled.plain, prepared).apart(picture).mean() < 3


def test_a_network_that_is_told_its_guidance(tiny: Pair, backend: OpenVinoBackend) -> None:
    told = tiny.plain.with_guidance_embedding()
    torch.manual_seed(0)
    nn.init.normal_(told.network.get_parameter("time_embedding.cond_proj.weight"), std=0.1)
    prepared = backend.prepare(told, tiny.prepared)
    assert prepared.denoiser.embeds_guidance

    def picture(model: TextToImage, scale: float = 5.0) -> Tensor:
        return model.decode(draw_base(model, model.encode_prompts(PROMPTS), None, [1, 2], 2, scale).latents)

    assert Pair(told, prepared).apart(picture).max() <= 2
    assert not torch.equal(picture(prepared), picture(prepared, 2.0))


def test_sdxl_draws_the_same_and_keeps_its_text_encoders(tmp_path: Path, backend: OpenVinoBackend) -> None:
    base = load("stable_diffusion_xl", tiny_sdxl_pipeline(tmp_path))
    pair = Pair(base, backend.prepare(base))
    assert set(pair.prepared.programs) == {"network", "decoder"}

    def picture(model: TextToImage) -> Tensor:
        cond, uncond = model.encode_prompts(["red apple", "blue dog"]), model.encode_prompts([""])
        return model.decode(draw_base(model, cond, uncond, [1, 2], 2, 3.0).latents)

    assert pair.apart(picture).max() <= 2
    taller = torch.randn(1, 4, 12, 8)

    def other_size(model: TextToImage) -> Tensor:
        return model.decode(model.denoiser(taller, torch.tensor([0.9]), model.encode_prompts(["red apple"])))

    assert pair.apart(other_size).max() <= 2, "told the size that is drawn"


def test_clips_text_encoder_and_the_large_autoencoder(tiny: Pair, backend: OpenVinoBackend) -> None:
    assert isinstance(tiny.plain, StableDiffusion)
    torch.manual_seed(0)
    pipeline = copy.copy(tiny.plain.pipeline)
    words = len(pipeline.tokenizer)
    pipeline.text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            eos_token_id=words - 1,
        )
    ).eval()
    pipeline.vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    ).eval()
    model = StableDiffusion(pipeline)
    prepared = backend.prepare(model)
    assert set(prepared.programs) == {"network", "decoder", "text_encoder"}

    def picture(model: TextToImage) -> Tensor:
        return model.decode(draw_base(model, model.encode_prompts(PROMPTS), None, [1, 2], 2, 1.0).latents)

    assert Pair(model, prepared).apart(picture).max() <= 2
    prompts = ["red", "green dog", "blue cat and a dog"]
    with torch.inference_mode():
        ours, theirs = (each.encode_prompts(prompts)["encoder_hidden_states"] for each in (prepared, model))
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.equal(prepared.embed_prompts(prompts), model.embed_prompts(prompts))


def test_a_row_is_its_own_in_any_company(bundled: Pair) -> None:
    """Three rows are filled up to four and nine are split; neither shows, and no row sees another."""
    model = bundled.prepared
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(9, *model.latent_shape(), generator=generator)
    t = torch.linspace(1, 0.1, 9)
    with torch.inference_mode():
        cond = model.encode_prompts([f"picture {row}" for row in range(9)])["encoder_hidden_states"]

        def answers(rows: slice) -> Tensor:
            return model.denoiser(x_t[rows], t[rows], {"encoder_hidden_states": cond[rows]})

        alone = torch.cat([answers(slice(row, row + 1)) for row in range(9)])
        assert torch.allclose(answers(slice(0, 9)), alone, atol=1e-3)
        assert torch.equal(answers(slice(4, 7)), answers(slice(4, 8))[:3]), "by the same program, so to the last bit"
        pictures = torch.cat([model.decode(each) for each in x_t.split(1)])
        assert (model.decode(x_t) - pictures).abs().max() / LEVEL <= 2
        texts = model.encode_prompts(["red", "blue", "green"])["encoder_hidden_states"]
        blue = model.encode_prompts(["blue"])["encoder_hidden_states"][0]
        assert torch.allclose(texts[1], blue, atol=1e-4)


def test_one_row_has_the_same_bits_whenever_it_is_drawn(bundled: Pair, cache: Path, monkeypatch: Any) -> None:
    def picture(model: TextToImage) -> Tensor:
        with torch.inference_mode():
            drawing = draw_base(model, model.encode_prompts(PROMPTS[:1]), None, [7], 2, 1.0)
            return model.decode(drawing.latents)

    first = picture(bundled.prepared)
    picture(bundled.prepared)
    assert torch.equal(picture(bundled.prepared), first)

    def made_again(*_: Any) -> None:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(compiler, "convert", made_again)
    monkeypatch.setattr(Compiler, "_compile", made_again)
    assert torch.equal(picture(openvino(cache).prepare(bundled.plain)), first)


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    gc.collect()
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts memory as Linux tells it")
def test_no_more_memory_is_taken_than_is_counted(bundled: Pair, backend: OpenVinoBackend) -> None:
    """A program of its own for each batch size, with the weights packed anew and with what describes every operation."""
    network = bundled.plain.parts()["network"]
    before = anonymous()
    program = Program(backend._compiler, network, backend.batches)
    with torch.inference_mode():
        for batch in backend.batches:
            program(*network.example(batch))
    used = anonymous() - before
    weights = 4 * sum(each.numel() for each in network.module.parameters())
    assert used <= program.most_bytes <= 2.5 * weights * len(backend.batches)
    assert program.most_bytes > 1.3 * weights * len(backend.batches), "which the weights alone are not"


def test_a_cache_that_is_deleted_meanwhile_is_not_missed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = part(nn.Linear(3, 3))
    program = Program(Compiler(Cache(tmp_path), "f32", 1), linear, (1, 2))
    with torch.inference_mode():
        program(*linear.example(1))
        shutil.rmtree(tmp_path)
        assert torch.allclose(program(*linear.example(2)), linear.module(*linear.example(2)), atol=1e-5)


def test_pictures_of_another_size(tiny: Pair) -> None:
    x_t = torch.randn(2, *tiny.plain.latent_shape(64, 32), generator=torch.Generator().manual_seed(0))

    def picture(model: TextToImage) -> Tensor:
        return model.decode(model.denoiser(x_t, torch.tensor([0.9, 0.5]), model.encode_prompts(PROMPTS)))

    assert picture(tiny.prepared).shape == (2, 3, 64, 32)
    assert tiny.apart(picture).max() <= 2


def test_weights_in_bfloat16(tmp_path: Path) -> None:
    model = load("stable_diffusion", tiny_pipeline(tmp_path / "tiny"), dtype=torch.bfloat16)
    network = model.parts()["network"]
    inputs = network.example(2)
    assert inputs[0].dtype == torch.bfloat16
    with torch.inference_mode():
        ours, theirs = Program(Compiler(Cache(tmp_path), "f32", 1), network, (1, 2))(*inputs), network.module(*inputs)
    assert (ours.dtype, theirs.dtype) == (torch.float32, torch.bfloat16)
    assert (ours - theirs).square().mean() < 0.03**2 * theirs.square().mean()


def test_openvino_tells_nobody(tmp_path: Path) -> None:
    """By itself it would report its import to its makers over the network, and keep an identifier in the home folder."""
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from service.engine.backends.compiler import Cache, Compiler\n"
        "from weights.families.base import Part\n"
        "part = Part(module=torch.nn.Linear(3, 3), example=lambda rows: (torch.ones(rows, 3),), config={})\n"
        "Compiler(Cache(Path(sys.argv[1])), 'f32', 1).converted(part)\n"
        "from openvino.tools.ovc import convert_impl, telemetry_utils\n"
        "print(convert_impl.tm.__name__, telemetry_utils.tm.__name__, sys.modules['openvino_telemetry'])\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["openvino.tools.ovc.telemetry_stub"] * 2 + ["None"]
    assert not list(home.iterdir())


class CountsRows(nn.Module):
    """Multiplies by the number of rows, which a trace takes for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * int(x.shape[0])


class Sorts(nn.Module):
    """What OpenVINO has no operation for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x.unsqueeze(-1) @ x.unsqueeze(-2)).real


def part(module: nn.Module) -> Part:
    return Part(module=module, example=lambda rows: (torch.ones(rows, 3) + torch.arange(rows)[:, None],), config={})


def test_a_conversion_that_answers_otherwise_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(compiler.WrongConversion, match=r"CountsRows has a relative error of 0\.33"):
        Compiler(Cache(tmp_path), "f32", 1).converted(part(CountsRows()))
    assert not list(tmp_path.iterdir()), "and leaves nothing behind"


@pytest.mark.parametrize("module", [CountsRows(), Sorts()], ids=lambda module: type(module).__name__)
def test_what_openvino_cannot_run_stays_with_torch(
    tiny: Pair, tmp_path: Path, module: nn.Module, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"decoder": part(module), "text_encoder": tiny.plain.parts()["text_encoder"]}
    monkeypatch.setattr(tiny.plain, "parts", lambda: parts)
    torch.set_num_threads(2)
    backend = OpenVinoBackend(batches=(1,), cache=Cache(tmp_path), precision="f32", threads=None)
    assert torch.get_num_threads() == 1
    prepared = backend.prepare(tiny.plain)
    assert set(prepared.programs) == {"text_encoder"}
    assert torch.get_num_threads() == 2, "torch has work again"
    assert "OpenVINO cannot run the model's decoder; using torch" in caplog.text
    assert prepared.decode(torch.zeros(1, *prepared.latent_shape())).shape == (1, 3, 32, 32)


def test_a_family_without_parts_passes_through(backend: OpenVinoBackend) -> None:
    ring = load("gaussian_mixture", "ring")
    student = ring.with_network(ring.network)
    for each in (backend, TorchBackend(device=CPU, max_batch=4)):
        assert each.prepare(ring) is ring
        assert each.prepare(student, ring) is student


class TestTorch:
    def test_nothing_changes_but_the_decoders_memory(self, tmp_path: Path) -> None:
        folder = tiny_pipeline(tmp_path / "tiny")
        model, other = (load("stable_diffusion", folder) for _ in range(2))
        backend = TorchBackend(device=CPU, max_batch=3, threads=1)
        assert list(backend.batches) == [1, 2, 3], "nothing need be padded"
        assert backend.prepare(model) is model
        x = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
        assert (model.decode(x) - other.decode(x)).abs().max() / LEVEL <= 2
        student = model.copy()
        assert backend.prepare(student, model) is student

    def test_compiled(self, tiny: Pair, monkeypatch: Any) -> None:
        real, made = torch.compile, []

        def eager(module: nn.Module, **options: Any) -> Any:
            made.append(options)
            return real(module, backend="eager", dynamic=options["dynamic"])

        monkeypatch.setattr(torch, "compile", eager)
        backend = TorchBackend(device=CPU, max_batch=6, compiled=True)
        assert list(backend.batches) == [1, 2, 4, 6]
        base = backend.prepare(tiny.plain)
        student = backend.prepare(tiny.plain.copy(), base)
        assert [options["mode"] for options in made] == [None] * 4, "three parts of the base, and the student's network"
        assert student.programs["decoder"] is base.programs["decoder"]
        assert student.programs["network"] is not base.programs["network"]

        def picture(model: TextToImage) -> Tensor:
            return model.decode(draw_base(model, model.encode_prompts(PROMPTS), None, [1, 2], 2, 1.0).latents)

        assert Pair(tiny.plain, student).apart(picture).max() <= 2

    def test_no_batch_size_is_left_uncompiled(self, tiny: Pair, programs: list[Any]) -> None:
        """torch keeps eight programs of a part, unless told, and runs whatever comes later as it is."""
        base = TorchBackend(device=CPU, max_batch=16, compiled=True).prepare(tiny.plain)
        latents = torch.zeros(12, *tiny.plain.latent_shape())
        with torch.inference_mode():
            for rows in range(1, 13):
                before = len(programs)
                base.decode(latents[:rows])
                assert len(programs) > before, f"{rows} rows are drawn uncompiled"

    def test_xformers_are_switched_on(self, tiny: Pair, monkeypatch: Any) -> None:
        model, called = tiny.plain.copy(), []
        monkeypatch.setattr(model.network, "enable_xformers_memory_efficient_attention", lambda: called.append(1))
        TorchBackend(device=CPU, max_batch=1, attention="xformers").prepare(model)
        assert called == [1]


class TestChoice:
    def test_openvino_draws_on_the_cpu(self, tmp_path: Path) -> None:
        made = make_backend(Settings(cache=tmp_path, max_batch=6), CPU, torch.float32)
        assert (made.name, tuple(made.batches)) == ("openvino", (1, 2, 4, 6))
        assert make_backend(Settings(backend="torch"), CPU, torch.float32).name == "torch"
        assert make_backend(Settings(family="gaussian_mixture"), CPU, torch.float32).name == "torch"
        assert make_backend(Settings(), torch.device("cuda"), torch.float16).name == "torch"

    @pytest.mark.parametrize(
        ("dtype", "expected"), [("float32", "f32"), ("bfloat16", "bf16"), ("auto", "bf16"), ("auto", "f32")]
    )
    def test_the_precision(self, tmp_path: Path, dtype: Any, expected: str, monkeypatch: Any) -> None:
        """Automatically that of the processor, which is a pretended one here."""
        abilities = {"auto": ["FP32", "BF16"] if expected == "bf16" else ["FP32"]}.get(dtype, ["FP32", "BF16"])

        class Core:
            def get_property(self, _device: str, name: str) -> Any:
                return abilities if name == "OPTIMIZATION_CAPABILITIES" else "a processor"

        monkeypatch.setattr(compiler.openvino, "Core", Core)
        kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        backend = make_backend(Settings(cache=tmp_path, dtype=dtype), CPU, kept)
        assert isinstance(backend, OpenVinoBackend)
        assert backend._compiler.precision == expected

    def test_where_it_is_not_installed(self, monkeypatch: Any) -> None:
        def missing(name: str) -> None:
            raise ImportError(f"no module named {name}")

        monkeypatch.setattr(backends.importlib, "import_module", missing)
        assert make_backend(Settings(), CPU, torch.float32).name == "torch"
        with pytest.raises(BadSettings, match=r"FEWSTEP_BACKEND: openvino cannot be used here \(no module named"):
            make_backend(Settings(backend="openvino"), CPU, torch.float32)

    @pytest.mark.parametrize(
        ("fields", "device", "says"),
        [
            (
                {"backend": "openvino"},
                "cuda",
                "FEWSTEP_BACKEND: openvino runs only on the CPU, .*is cuda; use torch",
            ),
            (
                {"backend": "openvino", "family": "gaussian_mixture"},
                "cpu",
                "can run no part .* family 'gaussian_mixture'",
            ),
            ({"compile": True}, "cpu", "FEWSTEP_COMPILE: it needs an NVIDIA GPU, .*is cpu; leave it off"),
            ({"attention": "xformers"}, "cpu", "FEWSTEP_ATTENTION: xformers needs an NVIDIA GPU, .*is cpu; use sdpa"),
            ({"attention": "xformers"}, "cuda", "xformers is not installed: pip install 'fewstep.gpu.', or"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields: dict[str, Any], device: str, says: str, monkeypatch: Any) -> None:
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(BadSettings, match=says):
            make_backend(Settings(**fields), torch.device(device), torch.float32)

    @pytest.mark.parametrize(
        ("variable", "value", "says"),
        [
            ("FEWSTEP_BACKEND", "onnx", "Input should be 'auto', 'torch' or 'openvino', got 'onnx'"),
            ("FEWSTEP_ATTENTION", "flash", "Input should be 'auto', 'sdpa' or 'xformers', got 'flash'"),
            ("FEWSTEP_COMPILE", "maybe", "Input should be a valid boolean"),
            ("FEWSTEP_CACHE", __file__, "is a file: name a folder"),
        ],
    )
    def test_values_that_do_not_exist(self, variable: str, value: str, says: str, monkeypatch: Any) -> None:
        monkeypatch.setenv(variable, value)
        with pytest.raises(BadSettings, match=f"{variable}: .*{says}"):
            read_settings()

    def test_a_gpu_gets_what_is_installed(self, monkeypatch: Any) -> None:
        for found, expected in ((None, "sdpa"), (object(), "xformers")):
            monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _, found=found: found)
            made = make_backend(Settings(compile=True, max_batch=4), torch.device("cuda"), torch.float16)
            assert isinstance(made, TorchBackend)
            assert (made._attention, made._compiled, list(made.batches)) == (expected, True, [1, 2, 4])


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9))]
)
def test_batch_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert doubling(most) == sizes
