"""Find out, before anything is made with it, whether a program computes what its autoencoder does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from latent_tiles.errors import VaeError
from latent_tiles.geometry import Size
from latent_tiles.patches import patched
from latent_tiles.vae.report import Direction

if TYPE_CHECKING:
    from latent_tiles.vae.exact import ExactVae

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_HALF = 0.1
_LATENTS = Size(6, 4)

_checked: WeakKeyDictionary[nn.Module, set[tuple[Direction, torch.dtype, torch.device, bool]]] = WeakKeyDictionary()


@torch.no_grad()
def check_program(exact: ExactVae, direction: Direction, like: Tensor) -> None:
    """Compare a small input's result with the autoencoder's own, once for each autoencoder, dtype, device and autocast.

    A later diffusers may change what a block computes under the same name; this notices, with the user's own weights.

    Args:
        exact: what is checked; its autoencoder's methods are not replaced yet, or restored for the check.
        direction: "encode" or "decode".
        like: a tensor with the dtype and device that will be used.

    Raises:
        VaeError: the results differ.
    """
    # Under autocast float32 tensors are computed with in half precision.
    autocast = torch.is_autocast_enabled(like.device.type)
    key = (direction, like.dtype, like.device, autocast)
    vae: Any = exact.vae
    done = _checked.setdefault(vae, set())
    if key in done:
        return
    program = exact.family.encoder(vae) if direction == "encode" else exact.family.decoder(vae, {}).program
    size = _LATENTS
    if direction == "encode":
        trial = Size(1024, 1024)
        factor = trial.height // program.sizes({program.inputs[0]: trial})[program.output].height
        size = Size(_LATENTS.height * factor, _LATENTS.width * factor)
    channels = program.nodes[program.inputs[0]].channels
    values = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0)).to(like)
    stock = _stock(exact, direction, values)
    own = exact.run_small(direction, values)
    stock, own = (torch.nan_to_num(part.float()) for part in (stock, own))
    if stock.shape == own.shape:
        spread = float(stock.max() - stock.min()) or 1.0
        error = float((stock - own).abs().max()) / spread
        if error <= (_TOLERANCE_HALF if autocast else _TOLERANCE.get(like.dtype, _TOLERANCE_HALF)):
            done.add(key)
            return
        problem = f"differs from its own {direction} by {error:.1e} of the range"
    else:
        problem = f"gives {tuple(own.shape)} where its own {direction} gives {tuple(stock.shape)}"
    msg = f"the program for {exact.family.name} {problem}: this version of diffusers, or a change to the model, is not "
    raise VaeError(msg + "known to latent-tiles. Use mode='stock', and please report it")


def _stock(exact: ExactVae, direction: Direction, values: Tensor) -> Tensor:
    """What the autoencoder's class computes, untiled, as a tensor."""
    vae: Any = exact.vae
    given = values.unsqueeze(2) if exact.family.video else values
    method = getattr(type(vae), direction)
    if hasattr(vae, "use_tiling"):
        with patched(vae, "use_tiling", False):
            output = method(vae, given)
    else:
        output = method(vae, given)
    if direction == "decode":
        raw: Tensor = output.sample
    elif hasattr(output, "latent_dist"):
        raw = output.latent_dist.parameters
    else:
        raw = output.latents if hasattr(output, "latents") else output.latent
    return raw.squeeze(2) if exact.family.video else raw
