"""`AutoencoderKLHunyuanImage`: group norms, one attention in the middle, shortcuts between channels and positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latent_tiles.executor.program import Mark, Program, ProgramBuilder
from latent_tiles.vae.blocks import activation, expect, require
from latent_tiles.vae.classes.dc import grouped_mean, repeated
from latent_tiles.vae.classes.kl import picture, posterior
from latent_tiles.vae.family import Decoder, VaeFamily

_FACTOR = 2
_ACTIVATIONS = ("SiLU", "ReLU", "GELU", "Mish")


def _place_first(values: Tensor) -> Tensor:
    return values.unflatten(1, (-1, _FACTOR**2)).transpose(1, 2).flatten(1, 2)


def _place_last(values: Tensor) -> Tensor:
    return values.unflatten(1, (_FACTOR**2, -1)).transpose(1, 2).flatten(1, 2)


def _coarsened(build: ProgramBuilder, x: int) -> int:
    """Pixel unshuffle, with the place in the square before the channel."""
    return build.pointwise(_place_first, build.space_to_depth(x, _FACTOR))


def _refined(build: ProgramBuilder, x: int) -> int:
    """Pixel shuffle, with the place in the square before the channel."""
    return build.depth_to_space(build.pointwise(_place_last, x), _FACTOR)


def _residual(build: ProgramBuilder, x: int, block: Any) -> int:
    expect(block, "HunyuanImageResnetBlock")
    # diffusers applies this one to the wrong tensor, so no model can have it.
    require(block.conv_shortcut is None, block, "different numbers of channels in and out")
    act = expect(block.nonlinearity, *_ACTIVATIONS)
    h = build.convolution(activation(build, build.group_norm(x, block.norm1), act), block.conv1)
    h = build.convolution(activation(build, build.group_norm(h, block.norm2), act), block.conv2)
    return build.mark(build.add(h, x), Mark.BLOCK)


def _attention(build: ProgramBuilder, x: int, block: Any) -> int:
    expect(block, "HunyuanImageAttentionBlock")
    h = build.group_norm(x, block.norm)
    queries, keys, values = (build.convolution(h, layer) for layer in (block.to_q, block.to_k, block.to_v))
    h = build.convolution(build.attention(queries, keys, values, heads=1), block.proj)
    return build.mark(build.add(h, x), Mark.BLOCK)


def _middle(build: ProgramBuilder, x: int, block: Any) -> int:
    expect(block, "HunyuanImageMidBlock")
    x = _residual(build, x, block.resnets[0])
    for attended, residual in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(build, _attention(build, x, attended), residual)
    return x


def _layer(build: ProgramBuilder, x: int, block: Any) -> int:
    kind = type(expect(block, "HunyuanImageResnetBlock", "HunyuanImageDownsample", "HunyuanImageUpsample")).__name__
    if kind == "HunyuanImageResnetBlock":
        return _residual(build, x, block)
    if kind == "HunyuanImageDownsample":
        h = _coarsened(build, build.convolution(x, block.conv))
        return build.mark(build.add(h, grouped_mean(build, _coarsened(build, x), int(block.group_size))), Mark.STAGE)
    build.mark(x, Mark.STAGE)
    h = _refined(build, build.convolution(x, block.conv))
    return build.add(h, _refined(build, repeated(build, x, int(block.repeats))))


def _encoder(vae: Any) -> Program:
    encoder = expect(vae.encoder, "HunyuanImageEncoder2D")
    build = ProgramBuilder()
    x = build.convolution(build.input(int(vae.config.in_channels)), encoder.conv_in)
    for block in encoder.down_blocks:
        x = _layer(build, x, block)
    x = _middle(build, x, encoder.mid_block)
    h = activation(build, build.group_norm(x, encoder.norm_out), expect(encoder.nonlinearity, *_ACTIVATIONS))
    return build.build(build.add(build.convolution(h, encoder.conv_out), grouped_mean(build, x, encoder.group_size)))


def _decoder(vae: Any, arguments: Mapping[str, Any]) -> Decoder:
    del arguments
    decoder = expect(vae.decoder, "HunyuanImageDecoder2D")
    build = ProgramBuilder()
    latents = build.input(int(vae.config.latent_channels))
    x = build.add(build.convolution(latents, decoder.conv_in), repeated(build, latents, int(decoder.repeat)))
    x = _middle(build, x, decoder.mid_block)
    for block in decoder.up_blocks:
        x = _layer(build, x, block)
    build.mark(x, Mark.STAGE)
    x = activation(build, build.group_norm(x, decoder.norm_out), expect(decoder.nonlinearity, *_ACTIVATIONS))
    return Decoder(program=build.build(build.convolution(x, decoder.conv_out)))


FAMILIES = (
    VaeFamily(
        name="AutoencoderKLHunyuanImage",
        encoder=_encoder,
        decoder=_decoder,
        encoded=posterior,
        decoded=picture,
    ),
)
