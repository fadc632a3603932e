"""Stable Diffusion 3 and 3.5: joint attention of image and text tokens.

Positions are `local`: the model crops its table of positions to the middle for whatever it is given, so a tile is
placed as a picture of its size was in training, and the table's size bounds the tile and not the canvas.

Source of the table: the signature and body of `SD3Transformer2DModel.forward` in diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latent_tiles.errors import FamilyError
from latent_tiles.families.canvas import CanvasCall, map_tensors
from latent_tiles.geometry import Box

_PLAIN_ATTENTION = frozenset({"scale", "ip_adapter_image_embeds"})


class SD3Call(CanvasCall):
    """One call of an `SD3Transformer2DModel`."""

    TOKENS = frozenset({"block_controlnet_hidden_states"})
    BATCHED = frozenset({"timestep", "encoder_hidden_states", "pooled_projections"})
    SHARED = frozenset({"skip_layers"})

    def cut(self, name: str, value: Any, boxes: Sequence[Box]) -> Any:
        """An argument for tiles of one shape."""
        if name != "joint_attention_kwargs":
            return super().cut(name, value, boxes)
        unknown = [key for key in value if key not in _PLAIN_ATTENTION]
        if unknown:
            msg = f"joint_attention_kwargs {unknown} are not known to be safe under tiling; "
            raise FamilyError(msg + f"known are {sorted(_PLAIN_ATTENTION)}")
        # A new dictionary for each call: the model takes the image embeddings out of the one it is given.
        return map_tensors(value, lambda tensor: self._repeat(name, tensor, len(boxes)))
