"""U-Nets with cross-attention: Stable Diffusion 1.x, 2.x, XL, the x4 upscaler, InstructPix2Pix, inpainting.

All of them are diffusers' `UNet2DConditionModel`.

Source of the table: the signature and body of `UNet2DConditionModel.forward` in diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latent_tiles.errors import FamilyError
from latent_tiles.families.canvas import CanvasCall
from latent_tiles.geometry import Box

_MASKS = "ip_adapter_masks"
_PLAIN_CROSS_ATTENTION = frozenset({"scale", _MASKS})


class UNetCall(CanvasCall):
    """One call of a `UNet2DConditionModel`."""

    CANVAS = "sample"
    # Of ControlNet and T2I-Adapter, at 1/1, 1/2, 1/4 ... of the canvas.
    FEATURES = frozenset(
        {
            "down_block_additional_residuals",
            "mid_block_additional_residual",
            "down_intrablock_additional_residuals",
        }
    )
    BATCHED = frozenset(
        {
            "timestep",
            "encoder_hidden_states",
            "class_labels",
            "timestep_cond",
            "encoder_attention_mask",
            "added_cond_kwargs",
        }
    )
    OUTPUT = ("diffusers.models.unets.unet_2d_condition", "UNet2DConditionOutput")

    @staticmethod
    def noisy_channels(module: Any) -> int:
        """As many as the model predicts; hosts put further ones behind them."""
        return int(module.config.out_channels)

    @staticmethod
    def multiple_of(module: Any) -> int:
        """Each level but the last halves the canvas."""
        return 2 ** (len(module.config.block_out_channels) - 1)

    def cut(self, name: str, value: Any, boxes: Sequence[Box]) -> Any:
        """An argument for tiles of one shape."""
        if name == "cross_attention_kwargs":
            return self._cut_cross_attention(value, boxes)
        return super().cut(name, value, boxes)

    def _cut_cross_attention(self, value: Mapping[str, Any], boxes: Sequence[Box]) -> dict[str, Any]:
        unknown = [key for key in value if key not in _PLAIN_CROSS_ATTENTION]
        if unknown:
            msg = f"cross_attention_kwargs {unknown} are not known to be safe under tiling; "
            raise FamilyError(msg + f"known are {sorted(_PLAIN_CROSS_ATTENTION)}")
        cut = dict(value)
        if cut.get(_MASKS) is not None:
            masks = cut[_MASKS]
            # diffusers also takes one tensor, (adapters, 1, height, width), for one mask per adapter.
            as_list = masks if isinstance(masks, list) else list(masks.unsqueeze(1))
            cut[_MASKS] = [mask if mask is None else self._crop_mask(mask, boxes) for mask in as_list]
        return cut

    def _crop_mask(
        self, mask: Float[Tensor, "1 images mask_height mask_width"], boxes: Sequence[Box]
    ) -> Float[Tensor, "rows images height width"]:
        """Crop an IP-Adapter mask, given in pixels, to tiles; one row for each row of the batch."""
        factor, rest = divmod(mask.shape[-2], self.canvas.height)
        if rest or factor < 1 or mask.shape[-1] != self.canvas.width * factor:
            msg = f"IP-Adapter mask of {tuple(mask.shape[-2:])} px is not a whole multiple of the canvas "
            raise FamilyError(msg + f"{tuple(self.canvas)}; give it the size of the output frame")
        crops: list[Tensor] = []
        for box in boxes:
            rows, columns = box.scaled(factor).to_slices()
            crops.append(mask[..., rows, columns].expand(self._sample.shape[0], -1, -1, -1))
        return torch.cat(crops)
