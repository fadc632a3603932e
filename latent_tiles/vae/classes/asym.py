"""`AsymmetricAutoencoderKL`: a larger decoder, which may be shown what surrounds a hole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latent_tiles.errors import VaeError
from latent_tiles.executor.program import Mark, Program, ProgramBuilder
from latent_tiles.vae.blocks import activation, expect, middle, norm, require, residuals, upsample
from latent_tiles.vae.classes.kl import encoder_layers, picture, posterior
from latent_tiles.vae.family import Decoder, VaeFamily


def _encoder(vae: Any) -> Program:
    build = ProgramBuilder()
    x = encoder_layers(build, build.input(int(vae.config.in_channels)), vae.encoder)
    return build.build(build.convolution(x, vae.quant_conv))


class _Surroundings:
    """What the decoder is shown at each resolution: the image outside the mask, and the mask.

    Args:
        build: takes the layers.
        encoder: `MaskConditionEncoder`.
        channels: of the image.
    """

    def __init__(self, build: ProgramBuilder, encoder: Any, channels: int) -> None:
        expect(encoder, "MaskConditionEncoder")
        self._build = build
        image, self._mask = build.input(channels), build.input(1)
        self._maps: dict[tuple[int, int], int] = {}
        x = build.pointwise(lambda pixels, mask: (1 - mask) * pixels, image, self._mask)
        coarser = 1
        for number, layer in enumerate(encoder.layers):
            x = build.convolution(x if number == 0 else build.pointwise(torch.relu, x), layer)
            coarser *= int(getattr(layer, "base_layer", layer).stride[0])
            # Several passes read these, and each is a way down from the finest resolution.
            build.mark(x, Mark.BLOCK)
            self._maps[build.channels(x), coarser] = x

    def put_into(self, x: int, coarser: int) -> int:
        """The map inside the mask, and the surroundings outside it.

        The mask is brought to the map's resolution by taking the upper left position of each square, which is what
        `interpolate` does in mode "nearest" when sizes are multiples: exact in any window.

        Args:
            x: the map.
            coarser: how many times coarser it is than the image.
        """
        build, key = self._build, (self._build.channels(x), coarser)
        if key not in self._maps:
            msg = (
                f"the decoder has {key[0]} channels at 1/{coarser} of the resolution, for which its condition encoder "
            )
            raise VaeError(msg + "makes no map; decode without image and mask")
        mask = build.subsample(self._mask, coarser) if coarser > 1 else self._mask
        return build.pointwise(lambda a, b, hole: a * hole + b * (1 - hole), x, self._maps[key], mask)


def _decoder(vae: Any, arguments: Mapping[str, Any]) -> Decoder:
    """The program of a decode, whose further inputs are `image` and `mask` where both are given.

    As in diffusers, one without the other is ignored.

    Raises:
        VaeError: an image and a mask that do not fit each other.
    """
    decoder = expect(vae.decoder, "MaskConditionDecoder")
    image, mask = arguments.get("image"), arguments.get("mask")
    build = ProgramBuilder()
    x = build.convolution(build.input(int(vae.config.latent_channels)), vae.post_quant_conv)
    x = middle(build, build.convolution(x, decoder.conv_in), decoder.mid_block)
    shown: _Surroundings | None = None
    extras: tuple[Tensor, ...] = ()
    if image is not None and mask is not None:
        extras = _fitting(image, mask)
        shown = _Surroundings(build, decoder.condition_encoder, int(image.shape[1]))
    ups = [expect(block, "UpDecoderBlock2D", "AttnUpDecoderBlock2D") for block in decoder.up_blocks]
    coarser = 2 ** sum(len(block.upsamplers or ()) for block in ups)
    for block in ups:
        if shown is not None:
            x = build.mark(shown.put_into(x, coarser), Mark.BLOCK)
        x = residuals(build, x, block)
        for resampling in block.upsamplers or ():
            x = upsample(build, x, resampling)
            coarser //= 2
    if shown is not None:
        x = shown.put_into(x, coarser)
    build.mark(x, Mark.STAGE)
    require(type(decoder.conv_norm_out).__name__ == "GroupNorm", decoder, "a norm conditioned on latents")
    x = activation(build, norm(build, x, decoder.conv_norm_out), decoder.conv_act)
    return Decoder(program=build.build(build.convolution(x, decoder.conv_out)), extras=extras)


def _fitting(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if mask.shape[1] != 1 or mask.shape[2:] != image.shape[2:] or mask.shape[0] not in (1, image.shape[0]):
        wanted = (image.shape[0], 1, *image.shape[2:])
        raise VaeError(f"a mask of shape {tuple(mask.shape)} does not fit the image; give it as {wanted}")
    return image, mask.expand(image.shape[0], -1, -1, -1)


FAMILIES = (
    VaeFamily(
        name="AsymmetricAutoencoderKL",
        encoder=_encoder,
        decoder=_decoder,
        encoded=posterior,
        decoded=picture,
    ),
)
