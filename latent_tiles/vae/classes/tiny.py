"""`AutoencoderTiny` (TAESD and its kin, the reference model): convolutions only, so one pass with halos is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latent_tiles.executor.program import Mark, Program, ProgramBuilder
from latent_tiles.vae.blocks import expect, require
from latent_tiles.vae.classes.kl import picture
from latent_tiles.vae.family import Decoder, VaeFamily


def _layers(build: ProgramBuilder, x: int, layers: Any) -> int:
    for layer in layers:
        if isinstance(getattr(layer, "base_layer", layer), nn.Conv2d):
            x = build.convolution(x, layer)
        elif isinstance(layer, nn.Upsample):
            factor: Any = layer.scale_factor
            require(layer.mode == "nearest" and float(factor).is_integer(), layer, f"mode {layer.mode}, x{factor}")
            x = build.upsample(build.mark(x, Mark.STAGE), int(factor))
        elif type(layer).__name__ == "AutoencoderTinyBlock":
            x = _block(build, x, layer)
        else:
            x = build.pointwise(expect(layer, "ReLU", "SiLU", "GELU", "Mish"), x)
    return x


def _block(build: ProgramBuilder, x: int, block: Any) -> int:
    h = _layers(build, x, block.conv)
    skip = x if isinstance(block.skip, nn.Identity) else build.convolution(x, block.skip)
    return build.mark(build.pointwise(lambda a, b: block.fuse(a + b), h, skip), Mark.BLOCK)


def _encoder(vae: Any) -> Program:
    expect(vae.encoder, "EncoderTiny")
    build = ProgramBuilder()
    x = build.pointwise(lambda pixels: pixels.add(1).div(2), build.input(vae.encoder.layers[0].in_channels))
    return build.build(_layers(build, x, vae.encoder.layers))


def _decoder(vae: Any, arguments: Mapping[str, Any]) -> Decoder:
    del arguments
    expect(vae.decoder, "DecoderTiny")
    build = ProgramBuilder()
    x = build.pointwise(lambda values: torch.tanh(values / 3) * 3, build.input(vae.decoder.layers[0].in_channels))
    x = _layers(build, x, vae.decoder.layers)
    return Decoder(program=build.build(build.pointwise(lambda values: values.mul(2).sub(1), x)))


def _latents(latents: Tensor) -> Any:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

    return AutoencoderTinyOutput(latents=latents)


FAMILIES = (VaeFamily(name="AutoencoderTiny", encoder=_encoder, decoder=_decoder, encoded=_latents, decoded=picture),)
