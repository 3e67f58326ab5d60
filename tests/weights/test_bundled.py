"""The models that ship: verified, made from each other, and drawing what they are asked for."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from distillers.emoji import teacher
from tests.architecture.source import ROOT
from weights.bundled import BUNDLED, STUDENTS, bundled_bases, resolve_base
from weights.cards import read_card
from weights.drawing import draw, draw_base
from weights.export import export
from weights.families import load
from weights.families.base import TextToImage
from weights.store import Store, digest_base
from weights.students import check_base, load_student
from weights.trajectory import schedule_for

LICENCE = "Apache-2.0 AND CC-BY-4.0 AND MIT"
SUNNY, LEAFY, BLUE = "smiling face with open mouth, twemoji", "green book, noto emoji", "blue book, fluent 3d emoji"
RED_GREEN_BLUE = [(0, 2), (1, 0), (2, 0)]
"""For each of the three: the channel that is stronger in such a picture, and the one that is weaker."""


@pytest.fixture(scope="module")
def base() -> TextToImage:
    return load("stable_diffusion", resolve_base("emoji-base"))


def assert_right_colours(pictures: torch.Tensor) -> None:
    """The middle of each picture has the colour of its prompt."""
    middles = pictures[:, :, 20:44, 20:44].mean(dim=(2, 3))
    for middle, (stronger, weaker) in zip(middles, RED_GREEN_BLUE, strict=True):
        assert middle[stronger] > middle[weaker] + 0.2, middles


@torch.no_grad()
def test_the_base_draws_the_colours_it_is_asked_for(base: TextToImage) -> None:
    cond, uncond = base.encode_prompts([SUNNY, LEAFY, BLUE]), base.encode_prompts([""])
    drawing = draw_base(base, cond, uncond, [0, 1, 2], 12, base.default_guidance)
    assert_right_colours(base.decode(drawing.latents))
    assert base.licence == LICENCE


def test_all_that_names_a_licence_of_the_bundled_models_names_the_same() -> None:
    assert f"`{LICENCE}`" in (BUNDLED / "LICENSES.md").read_text()
    for folder in (*bundled_bases().values(), STUDENTS):
        card = (folder / "README.md").read_text().split("---")[1]
        assert re.findall(r"^- (.*)$", card, re.MULTILINE) == LICENCE.lower().split(" and ")
    assert {manifest.licence for manifest in Store(STUDENTS).list()} == {LICENCE}
    assert teacher.LICENCE == LICENCE
    assert (BUNDLED / "LICENSE-Apache-2.0.txt").read_text() == (ROOT / "LICENSE").read_text()


def test_every_bundled_base_states_the_digest_that_its_weights_are_verified_against() -> None:
    for folder in bundled_bases().values():
        assert read_card(folder)["sha256"] == digest_base(folder)


@pytest.mark.parametrize("name", Store(STUDENTS).names())
@torch.no_grad()
def test_a_bundled_student_is_its_bases_and_draws_the_colours_it_is_asked_for(
    name: str, base: TextToImage, tmp_path: Path
) -> None:
    folder = Store(tmp_path, STUDENTS).open(name)
    check_base(folder, digest_base(resolve_base(folder.manifest.base.id)))
    assert folder.manifest.licence != "unspecified"
    students = [part for part in folder.manifest.averaged if part.name != "base"]
    assert folder.manifest.job is not None or (students and all(part.job is not None for part in students))
    student = load_student(folder, base)
    cond, uncond = base.encode_prompts([SUNNY, LEAFY, BLUE]), base.encode_prompts([""])
    for schedule in folder.manifest.schedules.values():
        drawing = draw(student, cond, uncond, [0, 1, 2], schedule, guidance_scale=1.0)
        assert_right_colours(student.decode(drawing.latents))


@pytest.mark.parametrize("name", Store(STUDENTS).names())
@torch.no_grad()
def test_a_bundled_student_draws_the_same_pixels_with_diffusers_alone(
    name: str, base: TextToImage, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", STUDENTS)
    folder = store.open(name)
    student = load_student(folder, base)
    for steps, schedule in sorted(folder.manifest.schedules.items()):
        drawing = draw(student, base.encode_prompts([SUNNY]), None, [7], schedule)
        exported = export(store, name, tmp_path / f"exported-{steps}", steps)
        for terms in ("LICENSES.md", "LICENSE-Apache-2.0.txt"):
            assert (exported / terms).read_bytes() == (BUNDLED / terms).read_bytes()
        pipeline = DiffusionPipeline.from_pretrained(exported, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        theirs = pipeline(
            SUNNY, num_inference_steps=steps, guidance_scale=1.0, generator=generator, output_type="pt"
        ).images
        ours = (student.decode(drawing.latents) + 1) / 2
        assert (ours - theirs).abs().mean() < 1 / 255
    three = schedule_for(folder.manifest.schedules, 3)
    timesteps = [round(1000 * time) - 1 for time in three.network_times]
    with pytest.raises(
        ValueError, match=re.escape(f"give that pipeline timesteps={timesteps} in place of num_inference_steps")
    ):
        export(store, name, tmp_path / "exported-3", 3)
    drawing = draw(student, base.encode_prompts([SUNNY]), None, [7], three)
    generator = torch.Generator().manual_seed(7)
    theirs = pipeline(SUNNY, timesteps=timesteps, guidance_scale=1.0, generator=generator, output_type="pt").images
    assert ((student.decode(drawing.latents) + 1) / 2 - theirs).abs().mean() < 1 / 255
