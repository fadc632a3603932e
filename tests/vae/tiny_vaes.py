"""One small autoencoder of every supported class and kind of configuration, with plausible random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from latent_tiles.geometry import Size

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


def _kl(name: str = "AutoencoderKL", **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        block_out_channels=(8, 16, 16),
        down_block_types=(_DOWN,) * 3,
        up_block_types=(_UP,) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    )
    return getattr(diffusers, name)(**{**settings, **changes})


def _tiny(**changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(1, 2, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
    )
    return diffusers.AutoencoderTiny(**{**settings, **changes})


def _dc(**changes: Any) -> Any:
    blocks, channels, layers = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"), (8, 16, 32), (1, 1, 2)
    settings: dict[str, Any] = dict(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((), (5,), (3, 5)),
        decoder_qkv_multiscales=((), (5,), ()),
    )
    return diffusers.AutoencoderDC(**{**settings, **changes})


def _wan(**changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )
    return diffusers.AutoencoderKLWan(**{**settings, **changes})


def _qwen() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )


def _hunyuan(**changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
    )
    return diffusers.AutoencoderKLHunyuanImage(**{**settings, **changes})


def _vq(**changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        block_out_channels=(8, 16),
        down_block_types=(_DOWN, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", _UP),
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
    )
    return diffusers.VQModel(**{**settings, **changes})


def _movq(**changes: Any) -> Any:
    return _vq(block_out_channels=(32, 32), norm_type="spatial", norm_num_groups=8, latent_channels=4, **changes)


def _asymmetric() -> Any:
    # The decoder's condition encoder goes down by 8, so it takes four resolutions.
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=(_DOWN,) * 4,
        down_block_out_channels=(8, 8, 16, 16),
        up_block_types=(_UP,) * 4,
        up_block_out_channels=(8, 16, 32, 32),
        norm_num_groups=4,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "sd": _kl,
    "sd-attention-everywhere": lambda: _kl(
        down_block_types=(_DOWN, _DOWN, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", _UP, _UP),
        mid_block_add_attention=False,
    ),
    "sd3": lambda: _kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "flux2": lambda: _kl("AutoencoderKLFlux2", latent_channels=8),
    "tiny-relu": _tiny,
    "tiny-silu-16": lambda: _tiny(latent_channels=16, act_fn="silu"),
    "tiny-gelu-16": lambda: _tiny(latent_channels=16, act_fn="gelu"),
    "dc": _dc,
    "dc-strided": lambda: _dc(
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
        decoder_act_fns=("relu", "silu", "silu"),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        decoder_conv_act_fn="silu",
    ),
    "dc-coarse-ends": lambda: _dc(encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 1)),
    "dc-coarse-strided-ends": lambda: _dc(
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ),
    "qwen": _qwen,
    "wan": _wan,
    "wan2.2": lambda: _wan(
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        decoder_base_dim=16,
        scale_factor_spatial=8,
    ),
    "hunyuan": _hunyuan,
    "hunyuan-unmatched": lambda: _hunyuan(
        block_out_channels=(32, 32, 32), downsample_match_channel=False, upsample_match_channel=False
    ),
    "vq": _vq,
    "movq": _movq,
    "asymmetric": _asymmetric,
}

VIDEO = ("qwen", "wan", "wan2.2")

SIZES: dict[str, tuple[Size, Size]] = {
    "dc": (Size(36, 28), Size(9, 7)),
    "dc-strided": (Size(36, 28), Size(9, 7)),
    "dc-coarse-ends": (Size(36, 28), Size(9, 7)),
    # Its first layer is a stride, which takes any size; what follows has to be even.
    "dc-coarse-strided-ends": (Size(35, 27), Size(9, 7)),
    "wan2.2": (Size(24, 40), Size(5, 4)),
    "hunyuan": (Size(12, 20), Size(5, 4)),
    "hunyuan-unmatched": (Size(12, 20), Size(5, 4)),
    "vq": (Size(25, 19), Size(12, 9)),
    "movq": (Size(15, 19), Size(9, 7)),
    "asymmetric": (Size(35, 29), Size(4, 3)),
}
"""Height and width of images and of latents, odd where a class takes such."""


def sizes(name: str) -> tuple[Size, Size]:
    """Height and width of images and of latents to test a kind of autoencoder with."""
    return SIZES.get(name, (Size(33, 25), Size(9, 7)))


def tiny_vae(name: str) -> Any:
    """An autoencoder by its name in `MAKERS`, with the same weights every time."""
    torch.manual_seed(0)
    vae = MAKERS[name]().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)

    def normal(like: Tensor, mean: float, deviation: float) -> Tensor:
        return mean + deviation * torch.randn(like.shape, generator=generator)

    # As it is made, a network has norms that do nothing, and loses half of its signal at every layer.
    for module_name, module in vae.named_modules():
        kind = type(module).__name__
        own = dict(module.named_parameters(recurse=False))
        if "norm" in kind.lower():
            for key, value in own.items():
                value.copy_(normal(value, 0.0, 0.3) if key == "bias" else normal(value, 1.0, 0.3))
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(normal(module.weight, 0.0, 1.0))
        elif "weight" in own:
            projects = any(part in module_name for part in ("to_q", "to_k", "to_qkv"))
            own["weight"].mul_(3.0 if projects else 1.7)
            if name in VIDEO and module_name == "decoder.conv_out":
                own["weight"].mul_(3.0)  # beyond -1 and 1 here and there, where the decoder clamps
            if "bias" in own:
                own["bias"].copy_(normal(own["bias"], 0.0, 0.2))
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(normal(module.running_mean, 0.0, 0.5))
            module.running_var.copy_(normal(module.running_var, 0.0, 0.5).exp())
    return vae


def scene(channels: int, size: Size, *, rows: int = 2, seed: int = 0) -> Tensor:
    """Something like a picture: slopes over the whole frame, so that no part of it has the statistics of the whole."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.linspace(-1, 1, size.height)[:, None]
    across = torch.linspace(-1, 1, size.width)
    slopes = torch.randn(2, rows, channels, 1, 1, generator=generator)
    slow = torch.tanh(2 * (slopes[0] * down + slopes[1] * across))
    return slow + 0.2 * torch.randn(rows, channels, *size, generator=generator)
