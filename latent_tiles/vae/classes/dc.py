"""`AutoencoderDC` (Sana): shortcuts between channels and positions, linear attention, norms of each position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_tiles.executor.program import Mark, Program, ProgramBuilder, over_channels
from latent_tiles.executor.statistics import SumPool
from latent_tiles.vae.blocks import activation, chunk, expect, require
from latent_tiles.vae.classes.kl import picture
from latent_tiles.vae.family import Decoder, VaeFamily

_ACTIVATIONS = ("ReLU", "ReLU6", "SiLU", "GELU", "Mish", "Identity")


def grouped_mean(build: ProgramBuilder, x: int, size: int) -> int:
    """The mean of each group of neighbouring channels."""

    def mean(values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, size)).mean(dim=2)

    return build.pointwise(mean, x, channels=build.channels(x) // size)


def repeated(build: ProgramBuilder, x: int, times: int) -> int:
    """Each channel so many times in a row."""
    return build.pointwise(lambda values: values.repeat_interleave(times, dim=1), x, channels=build.channels(x) * times)


def _position_norm(build: ProgramBuilder, x: int, module: Any) -> int:
    """A norm over the channels of each position, or one with fixed statistics."""
    if isinstance(expect(module, "RMSNorm", "BatchNorm2d"), nn.BatchNorm2d):
        require(not module.training, module, "statistics of the batch (training mode); call .eval() first")
        return build.pointwise(module, x)
    return build.pointwise(lambda values: over_channels(module, values), x)


def _joined(*values: Tensor) -> Tensor:
    return torch.cat(values, dim=1)


def _linear_attention(build: ProgramBuilder, x: int, block: Any) -> int:
    """Multi-scale linear attention: what the keys and values of a map add up to is all that a query needs of them.

    For maps of at most `attention_head_dim` positions diffusers multiplies in another order, which comes to the same;
    for half precision it does that in half precision, and this in float32.

    Source:
        Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs" (2020), equation 5; Cai, Li, Hu, Gan, Han,
        "EfficientViT" (2022), for the scales.
    """
    expect(block, "SanaMultiscaleLinearAttention")
    expect(block.processor, "SanaMultiscaleAttnProcessor2_0")
    expect(block.nonlinearity, "ReLU")
    width = int(block.attention_head_dim)
    inner, channels = int(getattr(block.to_q, "base_layer", block.to_q).out_features), build.channels(x)
    build.checkpoint(x)

    def project(values: Tensor) -> Tensor:
        return torch.cat([over_channels(layer, values) for layer in (block.to_q, block.to_k, block.to_v)], dim=1)

    scales = [build.pointwise(project, x, channels=3 * inner, flops=6.0 * channels * inner)]
    for scale in block.to_qkv_multiscale:
        expect(scale, "SanaMultiscaleAttentionProjection")
        scales.append(build.convolution(build.convolution(scales[0], scale.proj_in), scale.proj_out))
    joined = build.pointwise(_joined, *scales, channels=3 * inner * len(scales))

    def parts(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (rows, heads, channels of a head, positions), float32."""
        query, key, value = values.float().flatten(2).unflatten(1, (-1, 3 * width)).chunk(3, dim=2)
        return block.nonlinearity(query), block.nonlinearity(key), value

    def summand(values: Tensor) -> Tensor:
        _, key, value = parts(values)
        # The row of ones gathers the keys themselves, by which the result is divided.
        return F.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(-1, -2)

    def attend(values: Tensor, total: Tensor) -> Tensor:
        query, _, _ = parts(values)
        result = total.to(query.device, query.dtype) @ query
        result = result[:, :, :-1] / (result[:, :, -1:] + block.eps)
        return result.flatten(1, 2).unflatten(2, tuple(values.shape[2:])).to(values.dtype)

    statistic = build.statistic(joined, lambda: SumPool(summand))
    attended = inner * len(scales)
    h = build.with_statistic(joined, statistic, attend, channels=attended, flops=2.0 * attended * (width + 1))
    h = build.linear(h, block.to_out, channels=channels)
    h = _position_norm(build, h, block.norm_out)
    return build.mark(build.add(h, x) if block.residual_connection else h, Mark.BLOCK)


def _gated_convolution(build: ProgramBuilder, x: int, block: Any) -> int:
    expect(block, "GLUMBConv")
    act = expect(block.nonlinearity, "SiLU")
    h = activation(build, build.convolution(x, block.conv_inverted), act)
    h = build.convolution(h, block.conv_depth)
    h = build.pointwise(lambda a, gate: a * act(gate), chunk(build, h, 0, 2), chunk(build, h, 1, 2))
    h = build.convolution(h, block.conv_point)
    if block.norm is not None:
        h = _position_norm(build, h, block.norm)
    return build.mark(build.add(h, x) if block.residual_connection else h, Mark.BLOCK)


def _residual(build: ProgramBuilder, x: int, block: Any) -> int:
    h = activation(build, build.convolution(x, block.conv1), expect(block.nonlinearity, *_ACTIVATIONS))
    h = _position_norm(build, build.convolution(h, block.conv2), block.norm)
    return build.mark(build.add(h, x), Mark.BLOCK)


def _coarser(build: ProgramBuilder, x: int, block: Any) -> int:
    """Half as fine, by a stride or by moving positions into channels; beside it the mean of what is moved."""
    expect(block, "DCDownBlock2d")
    h = build.convolution(x, block.conv)
    if block.downsample:
        h = build.space_to_depth(h, int(block.factor))
    if block.shortcut:
        moved = build.space_to_depth(x, int(block.factor))
        h = build.add(h, grouped_mean(build, moved, int(block.group_size)))
    return build.mark(h, Mark.STAGE)


def _finer(build: ProgramBuilder, x: int, block: Any) -> int:
    """Twice as fine, by enlarging or by moving channels into positions; beside it the channels themselves, moved."""
    expect(block, "DCUpBlock2d")
    build.mark(x, Mark.STAGE)
    if block.interpolate:
        require(block.interpolation_mode == "nearest", block, f"interpolation_mode={block.interpolation_mode!r}")
        h = build.convolution(build.upsample(x, int(block.factor)), block.conv)
    else:
        h = build.depth_to_space(build.convolution(x, block.conv), int(block.factor))
    if block.shortcut:
        moved = build.depth_to_space(repeated(build, x, int(block.repeats)), int(block.factor))
        h = build.add(h, moved)
    return h


def _blocks(build: ProgramBuilder, x: int, blocks: Any) -> int:
    for block in blocks:
        kind = type(expect(block, "ResBlock", "EfficientViTBlock", "DCDownBlock2d", "DCUpBlock2d")).__name__
        if kind == "ResBlock":
            x = _residual(build, x, block)
        elif kind == "EfficientViTBlock":
            x = _gated_convolution(build, _linear_attention(build, x, block.attn), block.conv_out)
        else:
            x = _coarser(build, x, block) if kind == "DCDownBlock2d" else _finer(build, x, block)
    return x


def _end(build: ProgramBuilder, x: int, layer: Any) -> int:
    """The first or last layer, which also resamples where the finest resolution has no blocks."""
    if type(layer).__name__ == "DCDownBlock2d":
        return _coarser(build, x, layer)
    return _finer(build, x, layer) if type(layer).__name__ == "DCUpBlock2d" else build.convolution(x, layer)


def _encoder(vae: Any) -> Program:
    encoder = expect(vae.encoder, "Encoder")
    build = ProgramBuilder()
    x = _end(build, build.input(int(vae.config.in_channels)), encoder.conv_in)
    for blocks in encoder.down_blocks:
        x = _blocks(build, x, blocks)
    h = build.convolution(x, encoder.conv_out)
    if encoder.out_shortcut:
        h = build.add(h, grouped_mean(build, x, int(encoder.out_shortcut_average_group_size)))
    return build.build(h)


def _decoder(vae: Any, arguments: Mapping[str, Any]) -> Decoder:
    del arguments
    decoder = expect(vae.decoder, "Decoder")
    build = ProgramBuilder()
    latents = build.input(int(vae.config.latent_channels))
    x = build.convolution(latents, decoder.conv_in)
    if decoder.in_shortcut:
        x = build.add(x, repeated(build, latents, int(decoder.in_shortcut_repeats)))
    for blocks in reversed(decoder.up_blocks):
        x = _blocks(build, x, blocks)
    x = activation(build, _position_norm(build, x, decoder.norm_out), expect(decoder.conv_act, *_ACTIVATIONS))
    return Decoder(program=build.build(_end(build, x, decoder.conv_out)))


def _latents(latents: Tensor) -> Any:
    from diffusers.models.autoencoders.vae import EncoderOutput

    return EncoderOutput(latent=latents)


FAMILIES = (
    VaeFamily(
        name="AutoencoderDC",
        encoder=_encoder,
        decoder=_decoder,
        encoded=_latents,
        decoded=picture,
    ),
)
