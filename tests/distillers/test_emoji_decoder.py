"""The bundled decoder's fine-tuning: its data, its start, and that nothing else changes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from distillers.checkpoint import load_checkpoint
from distillers.emoji import autoencoder, decoder, finished
from weights.cards import read_card
from weights.denoiser import Cond, Denoiser
from weights.diffusion.schedules import RectifiedFlow
from weights.store import digest_base


class Oracle(Denoiser):
    """Knows the picture, whatever it is shown, and remembers the times it was asked at."""

    def __init__(self, truth: Tensor) -> None:
        super().__init__()
        self.schedule = RectifiedFlow()
        self.truth, self.times = truth, list[Tensor]()

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert len(cond["encoder_hidden_states"]) == len(x_t)
        self.times.append(t)
        return self.truth


def shallow() -> AutoencoderTiny:
    """The recipe's autoencoder with two blocks fewer in its decoder's first level."""
    config = dict(autoencoder.build().config)
    config = {
        name: value for name, value in config.items() if not name.startswith("_") and name != "block_out_channels"
    }
    return AutoencoderTiny(**config | {"num_decoder_blocks": (3, 2, 0), "scaling_factor": 1.5})


def data(pictures: int = 4, batch: int = 2) -> decoder.Data:
    generator = torch.Generator().manual_seed(0)
    shape = (pictures, 4, 16, 16)
    real, done = (torch.randn(shape, generator=generator).half() for _ in range(2))
    images = torch.randint(256, (pictures, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return decoder.Data(images, real, done, torch.ones(pictures), batch)


def test_a_perfect_teacher_finishes_every_picture_as_it_was() -> None:
    truth, text = torch.randn(8, 4, 4, 4), torch.zeros(8, 2, 3)
    oracle = Oracle(truth)
    assert torch.equal(finished.finish(oracle, torch.zeros_like(truth), text, torch.Generator().manual_seed(0)), truth)
    times = torch.stack(oracle.times)
    assert len(times) == finished.STEPS
    assert times[0].min() >= finished.EARLIEST
    assert times[0].max() <= finished.LATEST
    assert times[0].std() > 0, "every picture has a time of its own"
    assert (times[1:] < times[:-1]).all()


def test_every_training_latent_is_finished_in_its_place_with_its_own_caption() -> None:
    latents, states = torch.randn(70, 4, 4, 4).half(), torch.arange(80.0).view(80, 1, 1).expand(80, 2, 3).half()
    batches = SimpleNamespace(latents=latents, states=states, rows=np.arange(79, 9, -1).reshape(70, 1))

    class Reader(Oracle):
        def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return cond["encoder_hidden_states"][:, :1, :1, None].expand_as(x_t).float()

    made = finished.make(SimpleNamespace(denoiser=Reader(latents)), batches)  # type: ignore[arg-type]
    assert made.shape == latents.shape
    assert made[:, 0, 0, 0].tolist() == list(range(79, 9, -1))


def test_a_deepened_decoder_is_the_same_function() -> None:
    torch.manual_seed(0)
    old = shallow()
    new = decoder.deepened(old)
    latents, pictures = torch.randn(2, 4, 16, 16), torch.rand(2, 3, 64, 64)
    assert len(new.decoder.layers) == len(old.decoder.layers) + 2
    assert new.config.scaling_factor == 1.5
    with torch.no_grad():
        assert torch.equal(new.decode(latents).sample, old.decode(latents).sample)
        assert torch.equal(new.encode(pictures).latents, old.encode(pictures).latents)
        again = decoder.deepened(new)
        assert torch.equal(again.decode(latents).sample, new.decode(latents).sample)


def test_training_moves_the_decoder_alone_and_goes_on_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, batches = shallow(), data()
    training = decoder.Training(vae, tmp_path)
    losses = [training.take(*batches.draw(0), 1e-3) for _ in range(8)]
    assert losses[-1][0] < losses[0][0]
    assert losses[-1][1] < losses[0][1]
    (tmp_path / "fewstep.json").write_text('{"licence": "MIT", "sha256": "that of the old decoder"}')
    saved = training.save(tmp_path / "vae")
    assert read_card(tmp_path) == {"licence": "MIT", "sha256": digest_base(tmp_path)}
    loaded = AutoencoderTiny.from_pretrained(tmp_path / "vae", dtype=torch.float32)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name])
        if name.startswith("encoder."):
            assert torch.equal(value, vae.state_dict()[name].half().float())
    before, after = decoder.deepened(vae).decoder, training.decoder
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    resumed = decoder.Training(loaded, tmp_path)
    assert resumed.step == 8
    for ours, theirs in zip(resumed.decoder.parameters(), training.decoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_batch_is_its_steps_and_half_of_it_finished() -> None:
    batches = data(pictures=6, batch=4)
    (latents, pictures), (latents_again, again), (_, others) = batches.draw(3), batches.draw(3), batches.draw(4)
    assert torch.equal(pictures, again)
    assert torch.equal(latents, latents_again)
    assert not torch.equal(pictures, others)
    assert pictures.abs().max() <= 1
    images = (pictures + 1) * 127.5
    for row, (latent, image) in enumerate(zip(latents, images, strict=True)):
        source = [torch.allclose(image, known.float(), atol=1e-3) for known in batches.pictures].index(True)
        assert torch.equal(latent, batches.finished[source].float()) == (row >= 2)
        assert (latent - batches.latents[source].float()).std() < 0.1 or row >= 2


def test_the_command_trains_for_its_minutes_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder.StableDiffusion, "load", lambda _base: SimpleNamespace(vae=shallow()))
    monkeypatch.setattr(decoder.Data, "load", lambda *_given: data())
    monkeypatch.setattr(decoder, "load_pictures", lambda _records: data().pictures)
    base, work = tmp_path / "base", tmp_path / "work"
    monkeypatch.setattr("sys.argv", ["decoder", str(base), "--work", str(work), "--minutes", "0.001", "--threads", "1"])
    threads = torch.get_num_threads()
    decoder.main()
    torch.set_num_threads(threads)
    _, state = load_checkpoint(work / "decoder.safetensors")
    assert state["seconds"] >= 0.06
    assert AutoencoderTiny.from_pretrained(base / "vae").config.scaling_factor == 1.5
