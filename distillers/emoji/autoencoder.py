"""Trains the bundled autoencoder: diffusers' `AutoencoderTiny`, which maps 64x64 images to 16x16x4 latents and back.

Loss: L1 + MSE on pixels, L1 on finite differences of pixels (edges make up most of an emoji), and a little noise on the
latents with a weak pull towards zero, which keeps them smooth for the diffusion model. With ``--decoder-only`` the
encoder is not trained, so that latents, and all models trained on them, stay valid.

    python -m distillers.emoji.autoencoder --work work/autoencoder --minutes 20 weights/bundled/emoji-base/vae
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from distillers.emoji.data import load_pictures, load_records, sampling_weights, to_range
from distillers.emoji.resume import load_run, save_run
from weights.cards import DIGEST, read_card, write_card

WIDTH = 48
LATENT_NOISE = 0.05


def build() -> AutoencoderTiny:
    """The untrained autoencoder; most of its layers work at 16x16 and 32x32, where they cost least."""
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 3,
        decoder_block_out_channels=(WIDTH,) * 3,
        num_encoder_blocks=(0, 1, 3),
        num_decoder_blocks=(5, 2, 0),
        latent_channels=4,
        scaling_factor=1.0,
    )


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical finite differences of ``x: (B, C, H, W)``."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """``L1 + 2 MSE + 0.5 L1(edges)``; both ``(B, 3, H, W)`` in [-1, 1]."""
    difference = output - target
    loss = difference.abs().mean() + 2 * difference.square().mean()
    for ours, theirs in zip(edges(output), edges(target), strict=True):
        loss = loss + 0.25 * (ours - theirs).abs().mean()
    return loss


@torch.no_grad()
def psnr(autoencoder: AutoencoderTiny, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB over images ``(N, 3, 64, 64)`` uint8."""
    ratios = []
    for batch in pictures.split(64):
        target = to_range(batch)
        output = autoencoder.decode(autoencoder.encode(target).latents).sample.clamp(-1, 1)
        mse = (output - target).div(2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        ratios.append(-10 * mse.log10())
    return torch.cat(ratios).mean().item()


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 2%, then cosine decay to 1% of the peak; ``progress`` in [0, 1]."""
    return peak * min(1.0, progress / 0.02 + 1e-3) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Training:
    """The autoencoder, its average, its optimizer and its progress, restored if there is a checkpoint."""

    def __init__(self, options: argparse.Namespace) -> None:
        model = AutoencoderTiny.from_pretrained(options.start) if options.start else build()
        self.model = model.to(memory_format=torch.channels_last)
        self.decoder_only = options.decoder_only
        self.trained = self.model.decoder if options.decoder_only else self.model
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-4
        )
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)
        self.checkpoint = options.work / "checkpoint.safetensors"
        self.modules = {"model": self.model, "average": self.average}
        self.step, self.seconds = load_run(self.checkpoint, self.modules, self.optimizer) or (0, 0.0)
        self.generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)

    def loss(self, target: Tensor) -> Tensor:
        """The loss on images ``(B, 3, H, W)`` in [-1, 1]."""
        with torch.set_grad_enabled(not self.decoder_only):
            latents = self.model.encode(target).latents
        noise = torch.randn(latents.shape, generator=self.generator)
        loss = reconstruction_loss(self.model.decode(latents + LATENT_NOISE * noise).sample, target)
        return loss if self.decoder_only else loss + 1e-3 * latents.square().mean()

    def take(self, loss: Tensor, rate: float) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1

    def save(self) -> None:
        save_run(self.checkpoint, self.modules, self.optimizer, self.step, self.seconds)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    records = load_records()
    pictures = load_pictures(records)
    train_rows = torch.tensor([i for i, r in enumerate(records) if r.split == "train"])
    held_out = pictures[[i for i, r in enumerate(records) if r.split == "held_out"]][:512]
    weights = sampling_weights([records[i] for i in train_rows])
    training = Training(options)
    budget, last = options.minutes * 60, time.monotonic()
    while training.seconds < budget:
        rate = learning_rate(training.seconds / budget, options.lr)
        rows = train_rows[torch.multinomial(weights, options.batch, generator=training.generator)]
        loss = training.loss(to_range(pictures[rows]).contiguous(memory_format=torch.channels_last))
        training.take(loss, rate)
        training.seconds, last = training.seconds + time.monotonic() - last, time.monotonic()
        if training.step % 250 == 0 or training.seconds >= budget:
            quality, minutes = psnr(training.average.module, held_out[:128]), training.seconds / 60
            print(
                f"step {training.step} loss {loss.item():.4f} psnr {quality:.2f} dB lr {rate:.1e} {minutes:.1f} min",
                flush=True,
            )
            training.save()
            last = time.monotonic()
    finish(training.average.module, pictures[train_rows[:2048]], options)
    print(f"held out: {psnr(training.average.module, held_out):.2f} dB")


def finish(model: AutoencoderTiny, pictures: Tensor, options: argparse.Namespace) -> None:
    """Saves the averaged weights in half precision, with the scaling factor that gives latents unit variance."""
    if not options.decoder_only:
        with torch.no_grad():
            latents = torch.cat([model.encode(to_range(batch)).latents for batch in pictures.split(64)])
        model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    save(model, options.output)


def save(model: AutoencoderTiny, folder: Path) -> None:
    """Writes the model in half precision; if a pipeline that it is a part of states a digest, that becomes the new one."""
    model.half().save_pretrained(folder)
    # AutoencoderTiny writes this key into its configuration, and then warns about it whenever it is loaded.
    config = json.loads((folder / "config.json").read_text())
    config.pop("block_out_channels", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.float()
    card = read_card(folder.parent)
    if DIGEST in card:
        write_card(folder.parent, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the trained autoencoder")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the checkpoint, which is resumed if there is one"
    )
    parser.add_argument("--start", type=Path, help="an autoencoder to start from")
    parser.add_argument("--decoder-only", action="store_true", help="train only the decoder")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    main()
