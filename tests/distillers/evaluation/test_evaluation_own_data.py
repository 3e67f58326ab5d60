"""A folder of one's own pictures as what students are held against."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from distillers.evaluation import __main__ as command
from distillers.evaluation import calibrate
from distillers.evaluation.real import FolderPictures, yardstick
from distillers.evaluation.subjects import Subject
from distillers.folder import BadData
from tests.distillers.evaluation.test_evaluation_run import Colours, base_folder, run, store

__all__ = ["base_folder", "store"]  # fixtures

COLOURS = ("red", "green", "blue", "black")


def own_folder(folder: Path, held_out: int = 32, train: int = 64) -> Path:
    """Squares whose colour is in the caption; names and colours say nothing about the split."""
    folder.mkdir()
    lines = []
    for number in range(held_out + train):
        colour = COLOURS[number % 4]
        Image.new("RGB", (20 + number % 3, 24), colour).save(folder / f"{number}.png")
        fields = {"file_name": f"{number}.png", "text": [f"{colour} square {number // 4}", "a square"]}
        lines.append(json.dumps(fields | ({"split": "held_out"} if number < held_out else {})))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def quick_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (command, calibrate):
        monkeypatch.setattr(module, "extractor", lambda name, device: Colours(device))
    monkeypatch.setattr(Subject, "latency", lambda self, prompt: 1.5)


def test_held_out_captions_are_asked_for_and_the_rest_is_the_real_set(tmp_path: Path) -> None:
    protocol, pictures = yardstick(own_folder(tmp_path / "own"), 16, quick=False)
    assert {prompt.caption for prompt in protocol.held_out} == {f"{c} square {n}" for c in COLOURS for n in range(8)}
    real = [*protocol.reference, *protocol.floor]
    assert sorted(real, key=lambda name: int(name[:-4])) == [f"{number}.png" for number in range(32, 96)]
    assert len(set(real)) == len(real) == 64
    assert protocol.choices == 32
    assert {prompt.file_name for prompt in pictures.training()} == set(real)
    loaded = pictures.load(["0.png", "1.png"])
    assert loaded.shape == (2, 3, 16, 16) and loaded[:, :, 8, 8].tolist() == [[255, 0, 0], [0, 128, 0]]


def test_the_order_is_of_names_alone(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "own")
    digest = FolderPictures(folder, 16).protocol().digest
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    assert FolderPictures(folder, 16).protocol().digest == digest


def test_students_are_measured_by_ones_own_pictures(
    store: Path, tmp_path: Path, quick_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = own_folder(tmp_path / "own")
    assert run(store, tmp_path / "out", "--data", str(folder)) == 0
    printed, told = capsys.readouterr()
    assert "bundled emoji" not in told
    assert "R-precision (1 of 32)" in printed
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["protocol"]["data"] == str(folder)
    assert (figures["protocol"]["captions"], figures["protocol"]["choices"]) == (32, 32)
    assert (figures["protocol"]["pictures"], figures["protocol"]["reference_pictures"]) == (64, 32)
    # The tiny text encoder tells captions apart by their colour alone: by guessing it would be a quarter.
    assert figures["real"]["r_precision"]["value"] > 0.5
    assert str(folder) in (tmp_path / "out" / "report.html").read_text()


def test_a_calibration_is_by_ones_own_captions(store: Path, tmp_path: Path, quick_parts: None) -> None:
    asked: set[str] = set()
    draw = Subject.draw

    def listening(self: Subject, prompts: list[str], seeds: list[int]) -> object:
        asked.update(prompts)
        return draw(self, prompts, seeds)

    folder = own_folder(tmp_path / "own", held_out=32, train=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "draw", listening)
        places = ["--store", str(store), "--cache", str(tmp_path / "cache"), "--data", str(folder)]
        status = calibrate.main(["tiny-student", *places, "--quick"])
    assert status in (0, 1)
    assert asked == {f"{colour} square {number}" for colour in COLOURS for number in range(8)}


@pytest.mark.parametrize(
    ("held_out", "train", "says"),
    [
        (31, 64, 'has 31 different captions .* at least 32: mark 1 more with "split": "held_out" and train again'),
        (0, 64, "has 0 different captions .*: mark 32 more"),
        (32, 31, "has 31 images that are not held out, and evaluation needs at least 32 .*: add 1 more"),
    ],
)
def test_too_few_are_refused_with_their_numbers(held_out: int, train: int, says: str, tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "own", held_out, train)
    for quick in (False, True):
        with pytest.raises(BadData, match=f"own/metadata.jsonl {says}"):
            yardstick(folder, 16, quick)


def test_a_missing_picture_is_named_before_anything_is_drawn(
    store: Path, tmp_path: Path, quick_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = own_folder(tmp_path / "own")
    (folder / "3.png").unlink()
    assert run(store, tmp_path / "out", "--data", str(folder)) == 2
    assert "metadata.jsonl:4: there is no image '3.png'" in capsys.readouterr().err.replace("\n", "")


def test_real_pictures_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of 512x512 pictures is gigabytes: no more are loaded at once than one file of features is of."""
    from distillers.evaluation import measure
    from distillers.evaluation.cache import Cache
    from distillers.evaluation.subjects import Model
    from tests.helpers import tiny_pipeline
    from weights.families import load

    protocol, pictures = yardstick(own_folder(tmp_path / "own"), 16, quick=False)
    loaded: list[int] = []
    load_them = pictures.load
    monkeypatch.setattr(pictures, "load", lambda names: loaded.append(len(names)) or load_them(names))
    monkeypatch.setattr(measure, "FEATURE_CHUNK", 10)
    base = Model("base", load("stable_diffusion", tiny_pipeline(tmp_path / "base")))
    cache = Cache(tmp_path / "cache")
    made = measure.Evaluation(protocol, base, [Colours()], cache, cache, lambda *_: lambda _: None, 8, pictures)
    assert loaded[0] == 32 and max(loaded[1:]) == 10  # the held-out ones stay, for the autoencoder
    whole = Colours()(load_them(protocol.reference))
    assert torch.equal(made.reference[Colours.name], whole)
