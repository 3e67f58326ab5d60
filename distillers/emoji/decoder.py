"""Fine-tunes the bundled autoencoder's decoder on latents as the teacher leaves them, not only as the encoder makes them.

A small teacher smears what is fine in a latent, and a decoder that has seen the encoder's latents alone shows every
smear. It runs once a picture, so setting them right here is cheap: half of each batch are real latents with a little
noise, so that reconstruction stays what it was, half are real latents that the teacher has finished
(`distillers.emoji.finished`); both are held against the picture. The encoder is not touched: latents, and every model
trained on them, stay valid.

    python -m distillers.emoji.decoder --work work/teacher --minutes 30 weights/bundled/emoji-base
"""

import argparse
import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from distillers.emoji import autoencoder, finished
from distillers.emoji.batches import Batches, cached
from distillers.emoji.data import load_pictures, load_records, to_range
from distillers.emoji.resume import load_run, save_run
from distillers.precision import training_format
from weights.families.stable_diffusion import StableDiffusion

LEARNING_RATE = 1e-3
AVERAGE = 0.998


def deepened(old: AutoencoderTiny) -> AutoencoderTiny:
    """The same function in the recipe's shape: blocks that ``old``'s decoder lacks are added as identities.

    A block's last convolution is 0 and its input, another block's output, not negative: so ``relu(0 + x) = x``.
    """
    new = autoencoder.build()
    new.register_to_config(scaling_factor=old.config.scaling_factor)
    new.encoder.load_state_dict(old.encoder.state_dict())
    theirs, ours = (list(model.decoder.layers) for model in (old, new))
    missing = len(ours) - len(theirs)
    first = 2 + old.config.num_decoder_blocks[0]  # behind a convolution, its activation and the first level's blocks
    for block in ours[first : first + missing]:
        nn.init.zeros_(block.conv[-1].weight)
        nn.init.zeros_(block.conv[-1].bias)
    for ours_layer, theirs_layer in zip(ours[:first] + ours[first + missing :], theirs, strict=True):
        ours_layer.load_state_dict(theirs_layer.state_dict())
    return new


@dataclass(frozen=True)
class Data:
    """What the decoder learns from, as it lies in memory."""

    pictures: Tensor
    """Real ones, ``(N, 3, 64, 64)`` uint8."""
    latents: Tensor
    """Theirs by the encoder, ``(N, 4, 16, 16)``, scaled."""
    finished: Tensor
    """The same, finished by the teacher."""
    weights: Tensor
    """How often each picture is drawn, ``(N,)``."""
    batch: int

    @classmethod
    def load(cls, work: Path, base: Path, teacher: StableDiffusion, batch: int) -> Self:
        """The training pictures; latents are made once and kept in the folder ``work``."""
        batches = Batches(work, base, batch)
        made = cached(work / "finished.safetensors", lambda: {"finished": finished.make(teacher, batches)})
        pictures = load_pictures([r for r in load_records() if r.split == "train"])
        return cls(pictures, batches.latents, made["finished"], batches.weights, batch)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch number ``step``: latents, half of them real with noise and half finished, and their pictures."""
        generator = torch.Generator().manual_seed(7919 * step + 2)
        rows = torch.multinomial(self.weights, self.batch, replacement=True, generator=generator)
        real, done = rows.chunk(2)
        latents = self.latents[real].float()
        latents += autoencoder.LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        pictures = to_range(self.pictures[rows]).contiguous(memory_format=torch.channels_last)
        return torch.cat([latents, self.finished[done].float()]), pictures


class Training:
    """The decoder, its average and its optimizer, and how far they are."""

    def __init__(self, vae: AutoencoderTiny, work: Path) -> None:
        self.vae = deepened(vae).to(memory_format=torch.channels_last).requires_grad_(False)
        self.decoder = self.vae.decoder.requires_grad_(True)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
        self.average = torch.optim.swa_utils.AveragedModel(self.decoder, multi_avg_fn=average)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
        self.checkpoint = work / "decoder.safetensors"
        self.modules = {"decoder": self.decoder, "average": self.average}
        self.step, self.seconds = load_run(self.checkpoint, self.modules, self.optimizer) or (0, 0.0)

    def take(self, latents: Tensor, pictures: Tensor, rate: float) -> tuple[float, float]:
        """One optimizer step; the losses of real and of finished latents."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        with training_format(torch.device("cpu")):
            output = self.decoder(latents / self.vae.config.scaling_factor).float()
        half = len(latents) // 2
        real, done = (
            autoencoder.reconstruction_loss(output[rows], pictures[rows]) for rows in (slice(half), slice(half, None))
        )
        (real + done).backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.decoder)
        self.step += 1
        return real.item(), done.item()

    def save(self, folder: Path) -> AutoencoderTiny:
        """Writes the checkpoint, and the averaged decoder with the untouched encoder; returns these."""
        save_run(self.checkpoint, self.modules, self.optimizer, self.step, self.seconds)
        vae = copy.deepcopy(self.vae)
        vae.decoder.load_state_dict(self.average.module.state_dict())
        autoencoder.save(vae, folder)
        return vae


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    teacher = StableDiffusion.load(options.base)
    data, training = Data.load(options.work, options.base, teacher, options.batch), Training(teacher.vae, options.work)
    held_out = load_pictures([r for r in load_records() if r.split == "held_out"][:128])
    budget, last, saved, seen = options.minutes * 60, time.monotonic(), training.seconds, list[tuple[float, float]]()
    while training.seconds < budget:
        rate = autoencoder.learning_rate(training.seconds / budget, LEARNING_RATE)
        seen.append(training.take(*data.draw(training.step), rate))
        training.seconds, last = training.seconds + time.monotonic() - last, time.monotonic()
        if training.step % 100 == 0:
            real, done = torch.tensor(seen).mean(0).tolist()
            minutes = training.seconds / 60
            print(
                f"step {training.step} real {real:.4f} finished {done:.4f} lr {rate:.1e} {minutes:.1f} min", flush=True
            )
            seen = []
        if training.seconds - saved > options.save_minutes * 60 or training.seconds >= budget:
            vae = training.save(options.base / "vae")
            print(f"held out: {autoencoder.psnr(vae, held_out):.2f} dB", flush=True)
            last, saved = time.monotonic(), training.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the teacher's pipeline folder; its vae/ is overwritten")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the checkpoint, and of the teacher's caches"
    )
    parser.add_argument("--minutes", type=float, default=30, help="training time in all, earlier runs included")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--batch", type=int, default=24, help="half real, half finished latents")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    train(options)


if __name__ == "__main__":
    main()
