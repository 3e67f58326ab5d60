"""Trains the bundled autoencoder: diffusers' `AutoencoderTiny`, 64x64 pictures to 16x16x4 latents and back.

Loss: L1 + MSE on pixels, L1 on the pixels' finite differences (edges are most of an emoji), and a little noise on the
latents with a weak pull towards zero, which keeps them smooth for the diffusion model. When ``--decoder-only`` is given
the encoder stays as it is, so that latents, and every model trained on them, stay valid.

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

from distillers.checkpoint import (
    load_checkpoint,
    pack_module,
    pack_optimizer,
    save_checkpoint,
    unpack_module,
    unpack_optimizer,
)
from distillers.emoji.data import load_pictures, load_records, sampling_weights, to_range

WIDTH = 48
LATENT_NOISE = 0.05


def build() -> AutoencoderTiny:
    """The untrained autoencoder: its work is done at 16x16 and 32x32, where it costs least."""
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 3,
        decoder_block_out_channels=(WIDTH,) * 3,
        num_encoder_blocks=(0, 1, 3),
        num_decoder_blocks=(3, 2, 0),
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
    """Mean over pictures of the peak signal-to-noise ratio in dB, ``pictures: (N, 3, 64, 64)`` uint8."""
    ratios = []
    for batch in pictures.split(64):
        target = to_range(batch)
        output = autoencoder.decode(autoencoder.encode(target).latents).sample.clamp(-1, 1)
        mse = (output - target).div(2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        ratios.append(-10 * mse.log10())
    return torch.cat(ratios).mean().item()


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 2%, then a cosine down to 1% of the peak; ``progress`` in [0, 1]."""
    return peak * min(1.0, progress / 0.02 + 1e-3) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    records = load_records()
    pictures = load_pictures(records)
    train_rows = torch.tensor([i for i, r in enumerate(records) if r.split == "train"])
    held_out = pictures[[i for i, r in enumerate(records) if r.split == "held_out"]][:512]
    weights = sampling_weights([records[i] for i in train_rows])
    model = AutoencoderTiny.from_pretrained(options.start) if options.start else build()
    model = model.to(memory_format=torch.channels_last)
    trained = model.decoder if options.decoder_only else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    checkpoint, step, used = options.work / "checkpoint.safetensors", 0, 0.0
    if checkpoint.exists():
        tensors, state = load_checkpoint(checkpoint)
        step, used = state["step"], state["seconds"]
        unpack_module(model, "model", tensors)
        unpack_module(average, "average", tensors)
        unpack_optimizer(optimizer, "optimizer", tensors, state["optimizer"])
    budget, last = options.minutes * 60, time.monotonic()
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    while used < budget:
        rate = learning_rate(used / budget, options.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = train_rows[torch.multinomial(weights, options.batch, generator=generator)]
        target = to_range(pictures[rows]).contiguous(memory_format=torch.channels_last)
        if options.decoder_only:
            with torch.no_grad():
                latents = model.encode(target).latents
        else:
            latents = model.encode(target).latents
        output = model.decode(latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator)).sample
        loss = reconstruction_loss(output, target)
        if not options.decoder_only:
            loss = loss + 1e-3 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        used += time.monotonic() - last
        last = time.monotonic()
        if step % 250 == 0 or used >= budget:
            quality = psnr(average.module, held_out[:128])
            print(
                f"step {step} loss {loss.item():.4f} psnr {quality:.2f} dB lr {rate:.1e} {used / 60:.1f} min",
                flush=True,
            )
            moments, hyper = pack_optimizer(optimizer, "optimizer")
            tensors = {**pack_module(model, "model"), **pack_module(average, "average"), **moments}
            save_checkpoint(checkpoint, tensors, {"step": step, "seconds": used, "optimizer": hyper})
            last = time.monotonic()
    finish(average.module, pictures[train_rows[:2048]], options)
    print(f"held out: {psnr(average.module, held_out):.2f} dB")


def finish(model: AutoencoderTiny, pictures: Tensor, options: argparse.Namespace) -> None:
    """Saves the averaged weights in half precision, with the factor that gives latents unit variance."""
    if not options.decoder_only:
        with torch.no_grad():
            latents = torch.cat([model.encode(to_range(batch)).latents for batch in pictures.split(64)])
        model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    model.half().save_pretrained(options.output)
    # AutoencoderTiny writes this key into its configuration and then warns of it whenever it is loaded.
    config = json.loads((options.output / "config.json").read_text())
    config.pop("block_out_channels", None)
    (options.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the trained autoencoder")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint; resumed if it has one")
    parser.add_argument("--start", type=Path, help="an autoencoder to start from")
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder as it is")
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
