"""A base's card, and the weights that it vouches for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import tiny_pipeline
from weights.cards import CARD_FILE, WrongWeights, main, read_card
from weights.families import load
from weights.store import digest_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_pipeline(tmp_path / "base")


def change(folder: Path) -> None:
    """One weight of the network becomes another."""
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] += torch.eye(len(tensors["conv_in.bias"]))[0]
    save_file(tensors, file, metadata={"format": "pt"})


def test_weights_that_are_not_the_cards_are_refused(folder: Path) -> None:
    before = read_card(folder)
    main([str(folder)])
    stated = digest_base(folder)
    assert read_card(folder) == {**before, "sha256": stated}
    assert load("auto", folder).licence == "CC0-1.0"
    change(folder)
    with pytest.raises(WrongWeights) as refused:
        load("auto", folder)
    for part in (str(folder), digest_base(folder), stated, "copy the folder again"):
        assert part in str(refused.value)
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    with pytest.raises(WrongWeights, match="save the pipeline again"):
        load("auto", folder)


def test_the_command_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere holds no .safetensors file" in capsys.readouterr().err
    (folder / CARD_FILE).write_text("{")
    assert main([str(folder)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


def test_a_card_without_a_digest_vouches_for_nothing(folder: Path) -> None:
    change(folder)
    assert load("auto", folder).licence == "CC0-1.0"


@pytest.mark.parametrize(("card", "says"), [("{", "is not JSON"), ("[1]", r"holds \[1\], not a JSON object")])
def test_a_card_that_cannot_be_read_is_refused(folder: Path, card: str, says: str) -> None:
    (folder / CARD_FILE).write_text(card)
    with pytest.raises(ValueError, match=rf"{CARD_FILE} {says}.*: correct it"):
        load("auto", folder)
    (folder / CARD_FILE).unlink()
    assert read_card(folder) == {}
