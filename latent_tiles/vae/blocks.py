"""The building blocks that diffusers' autoencoders share, written as programs.

A block whose parts are not what is expected here (another version of diffusers, a replaced module) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from latent_tiles.errors import VaeError
from latent_tiles.executor.program import Mark, ProgramBuilder


def expect(module: Any, *names: str) -> Any:
    """The module, which must be of one of the named classes.

    Raises:
        VaeError: it is of another.
    """
    if type(module).__name__ not in names:
        msg = f"found a {type(module).__name__} where a {' or '.join(names)} was expected; "
        raise VaeError(msg + "this version of diffusers, or a replaced module, is not known to latent-tiles")
    return module


def require(holds: bool, module: nn.Module, what: str) -> None:
    """Refuse a module with an option that its program does not have.

    Raises:
        VaeError: it does not hold.
    """
    if not holds:
        raise VaeError(f"{type(module).__name__} with {what} is not known to latent-tiles")


def resnet(build: ProgramBuilder, x: int, block: Any, *, latents: tuple[int, int] | None = None) -> int:
    """A residual block without time embedding: twice norm, activation, convolution.

    Args:
        build: takes the layers.
        x: the block's input.
        block: `ResnetBlock2D`, or `ResnetBlockCondNorm2D`.
        latents: for the latter, the node that its norms are conditioned on and how many times coarser it is.
    """
    expect(block, "ResnetBlock2D", "ResnetBlockCondNorm2D")
    require(getattr(block, "time_emb_proj", None) is None, block, "a time embedding")
    require(block.upsample is None and block.downsample is None, block, "resampling inside")
    require(not (block.dropout.training and block.dropout.p > 0), block, "dropout in training mode")
    h = norm(build, x, block.norm1, latents=latents)
    h = activation(build, h, block.nonlinearity)
    h = build.convolution(h, block.conv1)
    h = norm(build, h, block.norm2, latents=latents)
    h = activation(build, h, block.nonlinearity)
    h = build.convolution(h, block.conv2)
    skip = x if block.conv_shortcut is None else build.convolution(x, block.conv_shortcut)
    return build.mark(build.add(skip, h, divisor=float(block.output_scale_factor)), Mark.BLOCK)


def norm(build: ProgramBuilder, x: int, module: Any, *, latents: tuple[int, int] | None = None) -> int:
    """A group norm, or one whose scale and shift come from the latents at the same place (`SpatialNorm`)."""
    if type(module).__name__ != "SpatialNorm":
        return build.group_norm(x, module)
    require(latents is not None, module, "no latents to be conditioned on")
    assert latents is not None
    latent, factor = latents
    normalised = build.group_norm(x, module.norm_layer)
    scale, shift = (_enlarged(build, latent, layer, factor) for layer in (module.conv_y, module.conv_b))
    return build.pointwise(lambda a, b, c: a * b + c, normalised, scale, shift)


def _enlarged(build: ProgramBuilder, x: int, layer: Any, factor: int) -> int:
    """A 1 x 1 layer and an enlargement, which change places: where it is coarse, the layer costs less."""
    settings = getattr(layer, "base_layer", layer)
    require(max(settings.kernel_size) == 1, layer, f"kernel_size={settings.kernel_size}")
    coarse = build.convolution(x, layer)
    return build.upsample(coarse, factor) if factor > 1 else coarse


def activation(build: ProgramBuilder, x: int, function: Callable[[Tensor], Tensor]) -> int:
    """An activation, a module or a function."""
    return build.pointwise(function, x)


_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "XFormersAttnProcessor",
    "SlicedAttnProcessor",
)


def attention(build: ProgramBuilder, x: int, block: Any, *, latents: tuple[int, int] | None = None) -> int:
    """Self-attention over the whole map, with its norm and residual."""
    expect(block, "Attention")
    expect(block.processor, *_PROCESSORS)
    require(block.norm_q is None and block.norm_k is None, block, "normalised queries and keys")
    require(block.to_k is not None and not block.only_cross_attention, block, "cross-attention")
    channels = build.channels(x)
    inner = int(block.inner_dim)
    require(abs(block.scale - (inner / block.heads) ** -0.5) < 1e-9, block, f"scale {block.scale}")
    h = x
    if block.spatial_norm is not None:
        h = norm(build, h, block.spatial_norm, latents=latents)
    if block.group_norm is not None:
        h = build.group_norm(h, block.group_norm)
    if block.fused_projections:
        fused = build.linear(h, dict(block.named_children())["to_qkv"], channels=3 * inner)
        queries, keys, values = (chunk(build, fused, index, 3) for index in range(3))
    else:
        layers: tuple[Any, ...] = (block.to_q, block.to_k, block.to_v)
        queries, keys, values = (build.linear(h, layer, channels=inner) for layer in layers)
    h = build.attention(queries, keys, values, heads=int(block.heads))
    h = build.linear(h, block.to_out[0], channels=channels)
    divisor = float(block.rescale_output_factor)
    if block.residual_connection:
        return build.mark(build.add(h, x, divisor=divisor), Mark.BLOCK)
    return build.mark(build.pointwise(lambda values: values / divisor, h), Mark.BLOCK)


def chunk(build: ProgramBuilder, x: int, index: int, parts: int) -> int:
    """One of several equal parts of the channels."""
    channels = build.channels(x) // parts
    return build.pointwise(lambda values: values.narrow(1, index * channels, channels), x, channels=channels)


def downsample(build: ProgramBuilder, x: int, block: Any) -> int:
    """A convolution with stride 2, padded at the lower and right border only where the block does so."""
    expect(block, "Downsample2D")
    require(block.norm is None, block, "a norm")
    if not block.use_conv:
        return build.mark(build.average_pool(x), Mark.STAGE)
    pads = (0, 1, 0, 1) if block.padding == 0 else None
    return build.mark(build.convolution(x, block.conv, pads=pads), Mark.STAGE)


def upsample(build: ProgramBuilder, x: int, block: Any) -> int:
    """Nearest-neighbour enlargement by 2, and a convolution."""
    expect(block, "Upsample2D")
    require(block.norm is None, block, "a norm")
    require(not block.use_conv_transpose and block.interpolate, block, "a transposed convolution")
    build.mark(x, Mark.STAGE)
    x = build.upsample(x)
    if not block.use_conv:
        return x
    return build.mark(build.convolution(x, block.conv if block.name == "conv" else block.Conv2d_0), Mark.LAYER)


def middle(build: ProgramBuilder, x: int, block: Any, *, latents: tuple[int, int] | None = None) -> int:
    """Residual blocks with attention between them."""
    expect(block, "UNetMidBlock2D")
    x = resnet(build, x, block.resnets[0], latents=latents)
    for attended, residual in zip(block.attentions, block.resnets[1:], strict=True):
        if attended is not None:
            x = attention(build, x, attended, latents=latents)
        x = resnet(build, x, residual, latents=latents)
    return x


def residuals(build: ProgramBuilder, x: int, block: Any, *, latents: tuple[int, int] | None = None) -> int:
    """The residual blocks of one resolution, each followed by attention where there is any."""
    attentions = getattr(block, "attentions", None) or (None,) * len(block.resnets)
    for residual, attended in zip(block.resnets, attentions, strict=True):
        x = resnet(build, x, residual, latents=latents)
        if attended is not None:
            x = attention(build, x, attended, latents=latents)
    return x
