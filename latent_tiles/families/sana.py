"""Sana and Sana-Sprint: linear attention and depthwise convolutions, no positions.

Source of the table: the signature and body of `SanaTransformer2DModel.forward` in diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from latent_tiles.errors import FamilyError
from latent_tiles.families.canvas import CanvasCall


class SanaCall(CanvasCall):
    """One call of a `SanaTransformer2DModel`.

    Raises:
        FamilyError: see `CanvasCall`; or the model has positions, which the released ones do not.
    """

    TOKENS = frozenset({"controlnet_block_samples"})
    BATCHED = frozenset({"timestep", "encoder_hidden_states", "guidance", "encoder_attention_mask"})

    def __init__(self, module: nn.Module, *call: Any) -> None:
        super().__init__(module, *call)
        if self._module.config.interpolation_scale is not None:
            raise FamilyError("a Sana model with interpolation_scale has positions of one canvas and cannot be tiled")
