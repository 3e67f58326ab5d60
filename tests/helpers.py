"""Small stand-ins that are real where it matters: a diffusers pipeline with random weights, in milliseconds."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from weights.contracts import StepSchedule, StudentManifest
from weights.students import base_reference

WORDS = "red green blue apple dog cat flag face sun food drink animals nature of with and noto twemoji fluent".split()


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """8x8 latents, three levels, 50 thousand weights."""
    usual: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**{**usual, **changes})


def save_pipeline(folder: Path, **parts: Any) -> None:
    """A StableDiffusionPipeline of these parts around a tiny UNet, whose weights are the next random numbers."""
    pipeline = StableDiffusionPipeline(
        unet=tiny_unet(), safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )
    pipeline.save_pretrained(folder)


def tiny_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes a StableDiffusionPipeline of the bundled teacher's classes, 32x32 pictures, random weights; its folder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary.write_text("\n".join([*special, *WORDS, ",", *"abcdefghijklmnopqrstuvwxyz"]))
    tokenizer = BertTokenizerFast(str(vocabulary), model_max_length=8)
    text_encoder = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=4,
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # unused by trailing spacing; the pipeline warns about 0
    )
    save_pipeline(folder, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
    vocabulary.unlink()
    (folder / "fewstep.json").write_text(json.dumps({"licence": "CC0-1.0"}))
    return folder


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, that knows letters alone; what it is made from is in ``folder`` for a moment."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=24)
    vocabulary.unlink(), merges.unlink()
    return tokenizer


def kl_autoencoder(**changes: Any) -> AutoencoderKL:
    """32x32 pictures to 8x8 latents."""
    usual: dict[str, Any] = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    return AutoencoderKL(**{**usual, **changes})


def tiny_sd15_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes one of Stable Diffusion 1's classes: CLIP, a KL autoencoder, eps over scaled-linear betas; its folder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(folder)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
        )
    )
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    save_pipeline(folder, vae=kl_autoencoder(), text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
    return folder


def clip_settings(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Of a text encoder in two layers, but for its widths."""
    return {
        "vocab_size": len(tokenizer),
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
    }


def tiny_sdxl_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes one of SDXL's classes: two CLIPs, a KL autoencoder, sizes; its folder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(folder)
    text = clip_settings(tokenizer)
    pipeline = StableDiffusionXLPipeline(
        vae=kl_autoencoder(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=16, **text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, projection_dim=12, **text)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(
            cross_attention_dim=24,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def t5_tokenizer() -> T5TokenizerFast:
    """T5's, that knows letters alone."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz,"]
    return T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def tiny_sd3_pipeline(folder: Path, seed: int = 0, with_t5: bool = True, **changes: Any) -> Path:
    """Writes one of SD3's classes: a transformer, a shifted flow, 16 channels, two CLIPs and a T5 or none; its folder.

    Args:
        folder: made where it is not there.
        seed: of all weights.
        with_t5: whether there is a third text encoder.
        changes: settings of the transformer.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(folder)
    text = clip_settings(tokenizer)
    t5 = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    network: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 12 + 10,
        "pos_embed_max_size": 6,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**network, **changes}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, projection_dim=12, **text)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, projection_dim=10, **text)),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's, that knows letters, and much of the pipeline's long instruction by heart so that it is soon encoded."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz,\u2581")
    )
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.train_from_iterator([line.replace(" ", "\u2581") for line in instruction], trainer)
    made = json.loads(trained.to_str())["model"]
    tokenizer = GemmaTokenizer(vocab=made["vocab"], merges=[tuple(pair) for pair in made["merges"]])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def dc_autoencoder(**changes: Any) -> AutoencoderDC:
    """32x32 pictures to 8x8 latents, like SANA's but for its 32 pixels to a latent."""
    usual: dict[str, Any] = {"latent_channels": 8, "attention_head_dim": 8, "scaling_factor": 0.41407}
    for side in ("encoder", "decoder"):
        usual |= {
            f"{side}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            f"{side}_block_out_channels": (8, 8, 8),
            f"{side}_layers_per_block": (1, 1, 1),
            f"{side}_qkv_multiscales": ((), (), (5,)),
        }
    return AutoencoderDC(**{**usual, **changes})


def tiny_sana_pipeline(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes one of SANA's classes: a linear transformer, a DPM-Solver's flow, a Gemma 2, a DC autoencoder; its folder.

    Args:
        folder: made where it is not there.
        seed: of all weights.
        changes: settings of the transformer.
    """
    torch.manual_seed(seed)
    tokenizer = gemma_tokenizer()
    text = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        query_pre_attn_scalar=4,
        sliding_window=64,
        max_position_embeddings=4096,
    )
    network: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    }
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text),
        vae=dc_autoencoder(),
        transformer=SanaTransformer2DModel(**{**network, **changes}),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="linear"
        ),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux_pipeline(folder: Path, seed: int = 0, guidance_embeds: bool = True, **changes: Any) -> Path:
    """Writes one of FLUX.1's classes: a transformer on packed latents, a CLIP and a T5, 32x32 pictures; its folder.

    Args:
        folder: made where it is not there.
        seed: of all weights.
        guidance_embeds: whether the network is told a scale and the shift follows from the size, as dev's; schnell's is not.
        changes: settings of the transformer.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(folder)
    t5 = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    network: dict[str, Any] = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": guidance_embeds,
    }
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(**{**network, **changes}),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=kl_autoencoder(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=16, **clip_settings(tokenizer))),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    (folder / "fewstep.json").write_text(json.dumps({"size": 32}))
    return folder


def tiny_schnell_pipeline(folder: Path, seed: int = 0) -> Path:
    """FLUX.1-schnell's classes; see `tiny_flux_pipeline`."""
    return tiny_flux_pipeline(folder, seed, guidance_embeds=False)


def student_manifest(base_folder: Path, **changes: object) -> StudentManifest:
    """A student's of the pipeline in ``base_folder``, in four steps, but for what is changed."""
    fields = {
        "name": "student",
        "created_at": datetime.now(UTC),
        "method": "test",
        "family": "stable_diffusion",
        "base": base_reference(str(base_folder)),
        "schedules": {4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])},
        "code_version": "test",
    }
    return StudentManifest.model_validate({**fields, **changes})


def picture_folder(folder: Path, count: int = 6, size: int = 32, seed: int = 0) -> Path:
    """Writes coloured squares with captions and a metadata.jsonl; every third has two captions, the last is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        pixels = np.full((size, size, 3), generator.integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        text: str | list[str] = f"red apple {WORDS[number % len(WORDS)]}"
        if number % 3 == 0:
            text = [text, "red apple"]
        split = "held_out" if number == count - 1 else "train"
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text, "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@dataclass(frozen=True)
class TinyFamily:
    """How tests/contracts gets an instance of a family in milliseconds."""

    make: Callable[[Path], Path | str]
    """Writes a tiny pipeline into a folder; what the family loads it from."""
    prompts: list[str]
    """Three that it tells apart."""


THREE = ["red apple", "blue dog", "green sun"]
TINY_FAMILIES = {
    "flux": TinyFamily(tiny_flux_pipeline, THREE),
    "gaussian_mixture": TinyFamily(lambda _: "ring", ["class 0", "class 3", "class 5"]),
    "sana": TinyFamily(tiny_sana_pipeline, THREE),
    "stable_diffusion": TinyFamily(tiny_pipeline, THREE),
    "stable_diffusion_3": TinyFamily(tiny_sd3_pipeline, THREE),
    "stable_diffusion_xl": TinyFamily(tiny_sdxl_pipeline, THREE),
}
"""One for each family; tests/contracts/test_families.py fails for a family without."""
