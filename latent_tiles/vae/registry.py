"""Which classes of autoencoders can be run exactly in tiles."""

from __future__ import annotations

from typing import Any

from latent_tiles.errors import VaeError
from latent_tiles.vae.classes import asym, causal, dc, hunyuan, kl, tiny, vq
from latent_tiles.vae.family import VaeFamily

_FAMILIES = {family.name: family for module in (asym, causal, dc, hunyuan, kl, tiny, vq) for family in module.FAMILIES}


def supported_vaes() -> tuple[str, ...]:
    """Names of the supported classes."""
    return tuple(sorted(_FAMILIES))


def vae_family(vae: Any) -> VaeFamily:
    """How an autoencoder is run.

    Raises:
        VaeError: its class is not supported; the message lists those that are.
    """
    name = type(vae).__name__
    if name not in _FAMILIES:
        msg = f"{name} cannot be run exactly in tiles; supported are {', '.join(supported_vaes())}. "
        raise VaeError(msg + "Leave the autoencoder as it is with mode='stock'")
    return _FAMILIES[name]
