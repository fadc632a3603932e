"""Tiny real components, with random weights from fixed seeds: every host as a user would load it, without a network."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HOSTS = (
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionInstructPix2PixPipeline",
)
LATENT_CHANNELS = 4
WIDTH = 32


def tokenizer() -> CLIPTokenizer:
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=16)


def text_config(**changes: Any) -> CLIPTextConfig:
    settings = dict(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPTextConfig(**{**settings, **changes})


def vae(levels: int = 4, seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
    ).eval()


def convolutional_vae() -> AutoencoderTiny:
    """An autoencoder without normalisation or attention: what a latent depends on has a known reach."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
        latent_channels=LATENT_CHANNELS,
    ).eval()


def unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def components(host: str) -> dict[str, Any]:
    """Components of a host, by the names its constructor takes."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    parts: dict[str, Any] = {"scheduler": scheduler, "tokenizer": tokenizer()}
    if host == "StableDiffusionXLImg2ImgPipeline":
        parts["text_encoder"] = CLIPTextModel(text_config()).eval()
        parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config()).eval()
        parts["tokenizer_2"] = tokenizer()
        parts["vae"] = vae()
        parts["unet"] = unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        )
        return parts
    parts["text_encoder"] = CLIPTextModel(text_config()).eval()
    if host == "StableDiffusionUpscalePipeline":
        parts["vae"] = vae(levels=3)
        parts["vae"].register_to_config(scaling_factor=0.08333)
        parts["unet"] = unet(in_channels=LATENT_CHANNELS + 3, num_class_embeds=1000)
        parts["low_res_scheduler"] = DDPMScheduler()
        return parts
    parts["vae"] = vae()
    parts["unet"] = unet(in_channels=2 * LATENT_CHANNELS if "Pix2Pix" in host else LATENT_CHANNELS)
    parts["safety_checker"], parts["feature_extractor"] = None, None
    return parts


def host_pipeline(host: str) -> Any:
    """A stock diffusers pipeline with tiny components."""
    options = {} if "XL" in host or "Upscale" in host else {"requires_safety_checker": False}
    pipe = getattr(diffusers, host)(**components(host), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
