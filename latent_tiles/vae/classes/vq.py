"""`VQModel`: the nets of `AutoencoderKL` around a codebook, with norms conditioned on the latents in MoVQ.

diffusers' `decode` returns a `commit_loss` beside the image: a mean over the distances of the whole map from the
codebook, or zeros where nothing was quantised. Only training reads it; here it is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latent_tiles.errors import VaeError
from latent_tiles.executor.program import Program, ProgramBuilder
from latent_tiles.vae.blocks import expect
from latent_tiles.vae.classes.kl import decoder_layers, encoder_layers, picture
from latent_tiles.vae.family import Decoder, VaeFamily

_DISTANCES = 2**22
"""At most so many distances to entries of the codebook are in memory at a time."""


def quantise(module: Any, values: Tensor) -> Tensor:
    """The entry of a codebook nearest to each position, a band of rows at a time.

    Args:
        module: `VectorQuantizer`, called as it is.
        values: a map.
    """
    band = max(1, _DISTANCES // (int(module.n_e) * values.shape[0] * values.shape[3]))
    return torch.cat([module(part)[0] for part in values.split(band, dim=2)], dim=2)


def _encoder(vae: Any) -> Program:
    build = ProgramBuilder()
    x = encoder_layers(build, build.input(int(vae.config.in_channels)), vae.encoder)
    return build.build(build.convolution(x, vae.quant_conv))


def _decoder(vae: Any, arguments: Mapping[str, Any]) -> Decoder:
    """The program of a decode.

    Raises:
        VaeError: the latents would be numbers of codebook entries, which are not a map.
    """
    build = ProgramBuilder()
    quantiser = expect(vae.quantize, "VectorQuantizer")
    width = int(quantiser.vq_embed_dim)
    x = build.input(width)
    if not arguments.get("force_not_quantize", False):
        flops = 2.0 * width * int(quantiser.n_e)
        x = build.pointwise(lambda values: quantise(quantiser, values), x, flops=flops)
    elif vae.config.lookup_from_codebook:
        msg = (
            "a decode that looks latents up by their numbers in the codebook is not run in tiles; look them up first: "
        )
        msg += "pass vae.quantize.get_codebook_entry(numbers, shape), and leave force_not_quantize out"
        raise VaeError(msg)
    latents = x if vae.config.norm_type == "spatial" else None
    x = build.convolution(x, vae.post_quant_conv)
    return Decoder(program=build.build(decoder_layers(build, x, vae.decoder, latents=latents)))


def _latents(latents: Tensor) -> Any:
    from diffusers.models.autoencoders.vq_model import VQEncoderOutput

    return VQEncoderOutput(latents=latents)


FAMILIES = (
    VaeFamily(
        name="VQModel",
        encoder=_encoder,
        decoder=_decoder,
        encoded=_latents,
        decoded=picture,
    ),
)
