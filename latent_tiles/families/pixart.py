"""PixArt-alpha and PixArt-Sigma: attention over image tokens, cross-attention to text.

Positions are `local`: they are made for the size that the model is given, so a tile is placed as a picture of its size
was in training. The model may predict a variance behind the noise; it is fused with it.

Source of the table: the signature and body of `PixArtTransformer2DModel.forward` in diffusers 0.42.
"""

from __future__ import annotations

from latent_tiles.families.canvas import CanvasCall


class PixArtCall(CanvasCall):
    """One call of a `PixArtTransformer2DModel`."""

    BATCHED = frozenset({"timestep", "encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs"})
