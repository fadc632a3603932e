"""`AutoencoderKL` (Stable Diffusion, SDXL, Flux) and `AutoencoderKLFlux2`: group norms, attention in the middle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latent_tiles.executor.program import Mark, Program, ProgramBuilder
from latent_tiles.vae.blocks import activation, downsample, expect, middle, norm, residuals, upsample
from latent_tiles.vae.family import Decoder, VaeFamily


def encoder_layers(build: ProgramBuilder, x: int, encoder: Any) -> int:
    """The layers of diffusers' `Encoder`."""
    expect(encoder, "Encoder")
    x = build.convolution(x, encoder.conv_in)
    for block in encoder.down_blocks:
        expect(block, "DownEncoderBlock2D", "AttnDownEncoderBlock2D")
        x = residuals(build, x, block)
        for resampling in block.downsamplers or ():
            x = downsample(build, x, resampling)
    x = middle(build, x, encoder.mid_block)
    x = activation(build, build.group_norm(x, encoder.conv_norm_out), encoder.conv_act)
    return build.convolution(x, encoder.conv_out)


def decoder_layers(build: ProgramBuilder, x: int, decoder: Any, *, latents: int | None = None) -> int:
    """The layers of diffusers' `Decoder`.

    Args:
        build: takes the layers.
        x: what the decoder is given.
        decoder: the module.
        latents: the node that its norms are conditioned on, where they are.
    """
    expect(decoder, "Decoder")
    factor = 1

    def condition() -> tuple[int, int] | None:
        return None if latents is None else (latents, factor)

    x = build.convolution(x, decoder.conv_in)
    x = middle(build, x, decoder.mid_block, latents=condition())
    for block in decoder.up_blocks:
        expect(block, "UpDecoderBlock2D", "AttnUpDecoderBlock2D")
        x = residuals(build, x, block, latents=condition())
        for resampling in block.upsamplers or ():
            x = upsample(build, x, resampling)
            factor *= 2
    build.mark(x, Mark.STAGE)
    x = activation(build, norm(build, x, decoder.conv_norm_out, latents=condition()), decoder.conv_act)
    return build.convolution(x, decoder.conv_out)


def _encoder(vae: Any) -> Program:
    build = ProgramBuilder()
    x = encoder_layers(build, build.input(int(vae.config.in_channels)), vae.encoder)
    return build.build(x if vae.quant_conv is None else build.convolution(x, vae.quant_conv))


def _decoder(vae: Any, arguments: Mapping[str, Any]) -> Decoder:
    del arguments
    build = ProgramBuilder()
    x = build.input(int(vae.config.latent_channels))
    x = x if vae.post_quant_conv is None else build.convolution(x, vae.post_quant_conv)
    return Decoder(program=build.build(decoder_layers(build, x, vae.decoder)))


def posterior(moments: Tensor) -> Any:
    """What `AutoencoderKL.encode` returns."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))  # pyright: ignore[reportArgumentType]


def picture(sample: Tensor) -> Any:
    """What `AutoencoderKL.decode` returns."""
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=sample)


FAMILIES = tuple(
    VaeFamily(name=name, encoder=_encoder, decoder=_decoder, encoded=posterior, decoded=picture)
    for name in ("AutoencoderKL", "AutoencoderKLFlux2")
)
