"""`AutoencoderKLQwenImage` and `AutoencoderKLWan` for one frame.

A first frame sees zeros where earlier frames would be, and no layer that changes the number of frames is applied to
it. So for one frame the network is two-dimensional: of every causal convolution the last tap in time remains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from latent_tiles.executor.program import Mark, Program, ProgramBuilder
from latent_tiles.vae.blocks import activation, chunk, expect, require
from latent_tiles.vae.classes.dc import grouped_mean, repeated
from latent_tiles.vae.classes.kl import picture, posterior
from latent_tiles.vae.family import Decoder, VaeFamily

_MAKERS = ("QwenImage", "Wan")
_ACTIVATIONS = ("SiLU", "ReLU", "GELU", "Mish")


def _ours(module: Any, name: str) -> Any:
    """The module, which must be of the class of that name of one of the two autoencoders."""
    return expect(module, *(maker + name for maker in _MAKERS))


def _convolution(build: ProgramBuilder, x: int, module: Any) -> int:
    """A causal convolution, whose own padding is not where others have it."""
    settings = _ours(getattr(module, "base_layer", module), "CausalConv3d")
    left, right, top, bottom, before, after = settings._padding
    taps = int(settings.kernel_size[0])
    require(before == taps - 1 and after == 0, settings, f"{before} frames before and {after} after {taps} taps")
    require(settings.stride[0] == settings.dilation[0] == 1, settings, "a stride or dilation in time")
    return build.convolution(x, module, pads=(top, bottom, left, right))


def _norm(build: ProgramBuilder, x: int, module: Any) -> int:
    """The norm of each position's channels."""
    _ours(module, "RMS_norm")
    require(module.channel_first, module, "channels last")
    if module.gamma.ndim == 4:  # made for videos
        return build.pointwise(lambda values: module(values.unsqueeze(2)).squeeze(2), x)
    return build.pointwise(module, x)


def _residual(build: ProgramBuilder, x: int, block: Any) -> int:
    _ours(block, "ResidualBlock")
    act = expect(block.nonlinearity, *_ACTIVATIONS)
    require(not (block.training and block.dropout.p), block, f"dropout of {block.dropout.p} in training mode")
    h = _convolution(build, activation(build, _norm(build, x, block.norm1), act), block.conv1)
    h = _convolution(build, activation(build, _norm(build, h, block.norm2), act), block.conv2)
    skip = x if isinstance(block.conv_shortcut, nn.Identity) else _convolution(build, x, block.conv_shortcut)
    return build.mark(build.add(h, skip), Mark.BLOCK)


def _attention(build: ProgramBuilder, x: int, block: Any) -> int:
    _ours(block, "AttentionBlock")
    h = _norm(build, build.checkpoint(x), block.norm)
    h = build.convolution(h, block.to_qkv)
    queries, keys, values = (chunk(build, h, index, 3) for index in range(3))
    h = build.convolution(build.attention(queries, keys, values, heads=1), block.proj)
    return build.mark(build.add(h, x), Mark.BLOCK)


def _middle(build: ProgramBuilder, x: int, block: Any) -> int:
    _ours(block, "MidBlock")
    x = _residual(build, x, block.resnets[0])
    for attended, residual in zip(block.attentions, block.resnets[1:], strict=True):
        if attended is not None:
            x = _attention(build, x, attended)
        x = _residual(build, x, residual)
    return x


def _resample(build: ProgramBuilder, x: int, block: Any) -> int:
    """Twice or half as fine; what it does to the number of frames begins with the second.

    No norm here needs the map as a whole. Kept all the same where stages meet, it spares the borders that windows
    would need to go through all of them at once: with windows of a million values, half of the work.
    """
    _ours(block, "Resample")
    known = ("upsample2d", "upsample3d", "downsample2d", "downsample3d")
    require(block.mode in known, block, f"mode={block.mode!r}")
    first, layer = block.resample
    if block.mode.startswith("up"):
        _ours(first, "Upsample")
        factors = first.scale_factor if isinstance(first.scale_factor, tuple) else (first.scale_factor,)
        require(set(factors) == {2.0}, first, f"scale_factor={first.scale_factor}")
        # By a factor of two "nearest-exact" takes the same positions as "nearest".
        require(first.mode.startswith("nearest"), first, f"mode={first.mode!r}")
        return build.convolution(build.upsample(build.mark(build.checkpoint(x), Mark.STAGE)), layer)
    left, right, top, bottom = expect(first, "ZeroPad2d").padding
    return build.mark(build.convolution(x, layer, pads=(top, bottom, left, right)), Mark.STAGE)


def _averaged(build: ProgramBuilder, x: int, block: Any) -> int:
    """Positions and frames moved into channels, and averaged in groups; the frames before the first are zeros."""
    expect(block, "AvgDown3D")
    side, frames, channels = int(block.factor_s), int(block.factor_t), build.channels(x)
    h = build.space_to_depth(x, side) if side > 1 else x

    def with_zeros_before(values: Tensor) -> Tensor:
        frame = values.unflatten(1, (channels, 1, side**2))
        return F.pad(frame, (0, 0, 0, 0, 0, 0, frames - 1, 0)).flatten(1, 3)

    if frames > 1:
        h = build.pointwise(with_zeros_before, h, channels=channels * frames * side**2)
    return grouped_mean(build, h, int(block.group_size))


def _duplicated(build: ProgramBuilder, x: int, block: Any) -> int:
    """Channels repeated and moved into positions and frames, of which the first chunk keeps the last frame."""
    expect(block, "DupUp3D")
    side, frames, channels = int(block.factor_s), int(block.factor_t), int(block.out_channels)
    h = repeated(build, x, int(block.repeats))

    def last_frame(values: Tensor) -> Tensor:
        return values.unflatten(1, (channels, frames, side**2))[:, :, -1].flatten(1, 2)

    if frames > 1:
        h = build.pointwise(last_frame, h, channels=channels * side**2)
    return build.depth_to_space(h, side) if side > 1 else h


def _down(build: ProgramBuilder, x: int, block: Any) -> int:
    """A stage of Wan 2.2's encoder."""
    h = x
    for residual in block.resnets:
        h = _residual(build, h, residual)
    if block.downsampler is not None:
        h = _resample(build, h, block.downsampler)
    return build.mark(build.checkpoint(build.add(h, _averaged(build, x, block.avg_shortcut))), Mark.STAGE)


def _up(build: ProgramBuilder, x: int, block: Any) -> int:
    """A stage of a decoder."""
    expect(block, "QwenImageUpBlock", "WanUpBlock", "WanResidualUpBlock")
    h = x
    for residual in block.resnets:
        h = _residual(build, h, residual)
    if type(block).__name__ != "WanResidualUpBlock":
        for resampling in block.upsamplers or ():
            h = _resample(build, h, resampling)
        return h
    if block.upsampler is not None:
        h = _resample(build, h, block.upsampler)
    if block.avg_shortcut is not None:
        h = build.add(h, _duplicated(build, x, block.avg_shortcut))
    return build.mark(h, Mark.BLOCK)


def _turned(build: ProgramBuilder, x: int, side: int) -> int:
    """Wan's patches have their columns before their rows."""

    def turn(values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, side, side)).transpose(2, 3).flatten(1, 3)

    return build.pointwise(turn, x)


def _encoder(vae: Any) -> Program:
    encoder = _ours(vae.encoder, "Encoder3d")
    build, side = ProgramBuilder(), int(getattr(vae.config, "patch_size", None) or 1)
    channels = int(getattr(encoder.conv_in, "base_layer", encoder.conv_in).in_channels)
    x = build.input(channels // side**2)
    if side > 1:
        x = _turned(build, build.space_to_depth(x, side), side)
    x = _convolution(build, x, encoder.conv_in)
    for block in encoder.down_blocks:
        kind = type(block).__name__
        if kind.endswith("ResidualBlock"):
            x = _residual(build, x, block)
        elif kind == "WanResidualDownBlock":
            x = _down(build, x, block)
        else:
            x = build.checkpoint(_resample(build, x, block))
    x = _middle(build, x, encoder.mid_block)
    x = activation(build, _norm(build, x, encoder.norm_out), expect(encoder.nonlinearity, *_ACTIVATIONS))
    x = _convolution(build, x, encoder.conv_out)
    return build.build(_convolution(build, x, vae.quant_conv))


def _decoder(vae: Any, arguments: Mapping[str, Any]) -> Decoder:
    del arguments
    decoder = _ours(vae.decoder, "Decoder3d")
    build, side = ProgramBuilder(), int(getattr(vae.config, "patch_size", None) or 1)
    channels = int(getattr(vae.post_quant_conv, "base_layer", vae.post_quant_conv).in_channels)
    x = _convolution(build, build.input(channels), vae.post_quant_conv)
    x = _middle(build, _convolution(build, x, decoder.conv_in), decoder.mid_block)
    for block in decoder.up_blocks:
        x = _up(build, x, block)
    x = activation(build, _norm(build, x, decoder.norm_out), expect(decoder.nonlinearity, *_ACTIVATIONS))
    x = build.pointwise(lambda values: values.clamp(-1.0, 1.0), _convolution(build, x, decoder.conv_out))
    if side > 1:
        x = build.depth_to_space(_turned(build, x, side), side)
    return Decoder(program=build.build(x))


FAMILIES = tuple(
    VaeFamily(
        name=name,
        encoder=_encoder,
        decoder=_decoder,
        encoded=posterior,
        decoded=picture,
        video=True,
    )
    for name in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
)
