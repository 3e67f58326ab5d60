"""The bundled pictures and their recipe: what is committed is what the recipe says, and training never sees held out."""

import argparse
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from distillers.checkpoint import load_checkpoint
from distillers.emoji import autoencoder, batches, teacher
from distillers.emoji.batches import TOKENS, Batches, Drawn
from distillers.emoji.data import captions, load_pictures, load_records, sampling_weights, to_range
from distillers.emoji.prepare import (
    HELD_OUT_PERCENT,
    STYLES,
    clean_name,
    on_white,
    prepare,
    records,
    source_picture,
    split_of,
)
from weights.store import digest_base

ENTRY = {
    "name": "THUMBS UP SIGN",
    "unified": "1F44D",
    "short_names": ["+1", "thumbsup"],
    "category": "People & Body",
    "subcategory": "hand-fingers-closed",
    "sort_order": 1,
    "skin_variations": {"1F3FB": {"unified": "1F44D-1F3FB"}, "1F3FB-1F3FC": {"unified": "1F44D-1F3FB-1F3FC"}},
}


def test_the_archive_and_the_records_agree() -> None:
    all_records = load_records()
    assert len(all_records) > 10_000
    assert {r.style for r in all_records} == set(STYLES)
    with zipfile.ZipFile(Path(teacher.__file__).parents[2] / "weights/bundled/emoji-data/pictures.zip") as archive:
        assert archive.namelist() == [r.file_name for r in all_records]


def test_the_split_is_by_emoji_and_style_and_about_a_tenth() -> None:
    splits: dict[tuple[str, str], set[str]] = {}
    for record in load_records():
        splits.setdefault((record.concept, record.style), set()).add(record.split)
        assert record.split == split_of(record.concept, record.style)
    assert all(len(split) == 1 for split in splits.values()), "skin tones of a held-out emoji must be held out with it"
    share = sum(split == {"held_out"} for split in splits.values()) / len(splits)
    assert abs(share - HELD_OUT_PERCENT / 100) < 0.02


def test_captions_go_from_specific_to_coarse() -> None:
    record = next(r for r in load_records() if r.name == "red apple" and r.style == "noto")
    assert captions(record) == [
        "red apple, noto emoji",
        "apple",
        "apple, noto emoji",
        "food fruit, noto emoji",
        "food fruit",
        "food & drink, noto emoji",
    ]
    toned = next(r for r in load_records() if r.skin_tone == "dark skin tone" and r.style == "fluent")
    assert "dark skin tone, fluent 3d emoji" in captions(toned)[0]


def test_pictures_are_real_and_on_white() -> None:
    some = load_records()[::1500]
    pictures = load_pictures(some)
    assert pictures.shape == (len(some), 3, 64, 64)
    corners = pictures[:, :, 0, 0].float()
    assert (corners.mean(dim=1) > 250).float().mean() > 0.5
    assert pictures.float().flatten(1).std(dim=1).min() > 5, "no picture may be blank"
    assert to_range(pictures).min() >= -1
    assert to_range(pictures).max() <= 1


def test_weights_sum_to_one_and_flags_count_less() -> None:
    all_records = load_records()
    weights = sampling_weights(all_records)
    assert weights.sum().item() == pytest.approx(1)
    by_category: dict[str, list[float]] = {}
    for record, weight in zip(all_records, weights.tolist(), strict=True):
        by_category.setdefault(record.category, []).append(weight)
    mean = {category: sum(w) / len(w) for category, w in by_category.items()}
    assert mean["flags"] < mean["objects"] < mean["animals & nature"]


def test_records_name_each_style_and_single_skin_tones_only() -> None:
    found = list(records([ENTRY]))
    assert len(found) == len(STYLES) * 2
    assert {unified for _, unified in found} == {"1F44D", "1F44D-1F3FB"}
    assert {record.skin_tone for record, _ in found} == {"", "light skin tone"}
    assert found[0][0].keywords == ["+1", "thumbsup"]
    assert clean_name("GRINNING CAT (SMILING)  FACE") == "grinning cat smiling face"


def test_prepare_writes_the_same_bytes_each_time(tmp_path: Path) -> None:
    source = tmp_path / "source"
    noto = source / "emoji-datasource-google-16.0.0/package"
    (noto / "img/google/64").mkdir(parents=True)
    (noto / "emoji.json").write_text(json.dumps([ENTRY]))
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(noto / "img/google/64/1f44d.png")
    fluent = source / "lobehub-fluent-emoji-3d-1.1.0/package/assets"
    fluent.mkdir(parents=True)
    Image.new("RGBA", (256, 128), (0, 0, 255, 255)).save(fluent / "1f44d.webp", lossless=True)
    assert prepare(source, tmp_path / "a") == 2
    assert prepare(source, tmp_path / "b") == 2
    assert (tmp_path / "a/pictures.zip").read_bytes() == (tmp_path / "b/pictures.zip").read_bytes()
    assert source_picture(source, "twemoji", "1F44D") is None
    pink = on_white(noto / "img/google/64/1f44d.png").getpixel((32, 32))
    assert pink == (255, 127, 127)
    wide = on_white(fluent / "1f44d.webp")
    assert wide.getpixel((32, 4)) == (255, 255, 255)
    assert wide.getpixel((32, 32)) == (0, 0, 255)


def test_the_autoencoder_has_its_shape_and_its_loss_sees_edges() -> None:
    model = autoencoder.build()
    pictures = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = model.encode(pictures).latents
        assert latents.shape == (1, 4, 16, 16)
        assert model.decode(latents).sample.shape == pictures.shape
    assert autoencoder.reconstruction_loss(pictures, pictures) == 0
    shifted = torch.roll(pictures, 1, dims=-1)
    assert autoencoder.reconstruction_loss(shifted, pictures) > autoencoder.reconstruction_loss(
        pictures + 0.01, pictures
    )
    assert autoencoder.learning_rate(0.5, 1.0) > autoencoder.learning_rate(1.0, 1.0) > 0


@pytest.mark.slow
def test_the_autoencoder_goes_on_from_its_checkpoint_and_can_leave_its_encoder_alone(tmp_path: Path) -> None:
    bundled = Path(autoencoder.__file__).parents[2] / "weights/bundled/emoji-base/vae"
    output, work = tmp_path / "vae", tmp_path / "work"

    def train(minutes: float) -> tuple[int, float]:
        options = {"start": bundled, "decoder_only": True, "batch": 2, "lr": 1e-3, "seed": 0}
        autoencoder.train(argparse.Namespace(output=output, work=work, minutes=minutes, **options))
        _, state = load_checkpoint(work / "checkpoint.safetensors")
        return state["step"], state["seconds"] / 60

    steps, minutes = train(1e-6)
    assert steps == 1
    assert train(minutes + 1e-6)[0] == 2
    before, after = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (bundled, output))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_a_perfect_teacher_has_zero_loss_and_times_cover_the_schedule() -> None:
    scheduler = teacher.build_scheduler()
    x0, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    last = torch.tensor([999, 999])
    assert torch.allclose(scheduler.add_noise(x0, noise, last), noise, atol=1e-4), "t = 1 must be pure noise"
    assert torch.allclose(scheduler.get_velocity(x0, noise, last), -x0, atol=1e-4)
    assert teacher.learning_rate(0, 0.0, 1.0) < teacher.learning_rate(1000, 0.5, 1.0) == 1.0
    assert teacher.learning_rate(1000, 1.0, 1.0) == pytest.approx(0.01)


def test_the_average_follows_the_network() -> None:
    ours, theirs = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * ours.weight.detach() + 0.1 * theirs.weight.detach()
    teacher.update_average(ours, theirs, 0.9)
    assert torch.allclose(ours.weight, expected)


def test_the_bundled_network_is_the_recipes() -> None:
    bundled = UNet2DConditionModel.from_pretrained(
        Path(teacher.__file__).parents[2] / "weights/bundled/emoji-base/unet"
    )
    fresh = teacher.build_unet()
    assert {n: p.shape for n, p in bundled.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}


class FewBatches:
    """Stands in for the training data, whose captions take minutes to encode."""

    def __init__(self, *_: object) -> None:
        pass

    def draw(self, step: int) -> Drawn:
        generator = torch.Generator().manual_seed(step)
        latents, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)
        return Drawn(latents, torch.randn(2, TOKENS, 384, generator=generator), noise, torch.tensor([100, 999]))

    def held_out(self) -> Drawn:
        return self.draw(7)


def test_a_diverged_teacher_is_told() -> None:
    assert teacher.check(0.5, 50) == 0.5
    with pytest.raises(
        ArithmeticError, match="step 50: the loss is nan; restart from the checkpoint with a lower --lr"
    ):
        teacher.check(float("nan"), 50)


def few(monkeypatch: pytest.MonkeyPatch, work: Path) -> Batches:
    """The training data of a few pictures, and encoders that tell which pictures and captions they were given."""
    records = load_records()
    some = [*records[:3], next(r for r in records if r.split == "held_out")]
    monkeypatch.setattr(batches, "load_records", lambda: [*some[:3], some[3]])
    monkeypatch.setattr(batches, "load_pictures", lambda asked: torch.tensor([some.index(r) for r in asked]))
    monkeypatch.setattr(batches.AutoencoderTiny, "from_pretrained", lambda *_, **__: torch.nn.Linear(1, 1))
    monkeypatch.setattr(
        batches, "encode_pictures", lambda _, given: given.half().view(-1, 1, 1, 1).expand(-1, 4, 16, 16).clone()
    )
    monkeypatch.setattr(
        batches, "encode_captions", lambda texts, *_: torch.arange(len(texts)).half().view(-1, 1, 1).expand(-1, 20, 384)
    )
    return Batches(work, work, 64)


def test_batches_pair_pictures_with_their_captions_and_spread_their_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = few(monkeypatch, tmp_path)
    one, again, other = data.draw(3), data.draw(3), data.draw(4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True)) and not torch.equal(one.noise, other.noise)
    pictures, texts = one.latents[:, 0, 0, 0].long(), one.states[:, 0, 0].long()
    assert pictures.unique().tolist() == [0, 1, 2], "never one that is held out"
    for picture, text in zip(pictures.tolist(), texts.tolist(), strict=True):
        assert text in data.rows[picture]
    within = one.times - torch.arange(64) * 1000 / 64
    assert within.min() > -1 and within.max() < 1000 / 64, "one in each of 64 equal parts, rounded down"
    assert one.times.max() <= 999 and one.latents.dtype == one.states.dtype == torch.float32
    held_out = data.held_out()
    assert held_out.latents[:, 0, 0, 0].tolist() == [3.0]
    assert torch.equal(held_out.noise, data.held_out().noise)


def test_the_teacher_goes_on_from_its_checkpoint_else_from_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(teacher, "Batches", FewBatches)
    bundled = Path(teacher.__file__).parents[2] / "weights/bundled/emoji-base"
    output, work = tmp_path / "base", tmp_path / "work"
    shutil.copytree(bundled / "vae", output / "vae")
    (output / "text_encoder").mkdir()  # there already: only the network is written
    work.mkdir()

    def train(minutes: float) -> dict[str, float]:
        settings = {"save_minutes": 60, "batch": 2, "lr": 1e-4, "device": "cpu", "eager": False}
        teacher.train(argparse.Namespace(output=output, work=work, minutes=minutes, **settings))
        return json.loads((output / "fewstep.json").read_text())

    first = train(1e-6)
    assert re.search(r"step 1 held-out loss [0-9.]+; saved", capsys.readouterr().out)
    assert first["trained_steps"] == 1 and first["default_guidance"] == 2.0
    assert first["sha256"] == digest_base(output)
    tensors, state = load_checkpoint(work / "checkpoint.safetensors")
    kinds = {name.rsplit(".", 1)[1] for name in tensors if name.startswith("optimizer.")}
    assert state["step"] == 1 and kinds == {"step", "momentum", "exp_avg", "exp_avg_sq"}
    minutes = state["seconds"] / 60
    assert train(minutes + 1e-6)["trained_steps"] == 2
    assert train(minutes)["trained_steps"] == 2, "its time is up: nothing is trained, nothing is lost"
    (work / "checkpoint.safetensors").unlink()
    (output / "fewstep.json").write_text(json.dumps(first | {"trained_steps": 7, "trained_minutes": 1}))
    assert train(1 + 1e-6)["trained_steps"] == 8
