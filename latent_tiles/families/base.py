"""What a model family must be able to do: take one call of its denoiser apart into tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from latent_tiles.geometry import Box, Size


@runtime_checkable
class ModelCall(Protocol):
    """One call of a denoiser over the whole canvas, as the host pipeline made it."""

    @property
    def noisy(self) -> Float[Tensor, "rows channels height width"]:
        """The noisy latent over the whole canvas, without channels that the host concatenated to it."""
        ...

    @property
    def canvas(self) -> Size:
        """Height and width of the canvas in latents."""
        ...

    @property
    def timestep(self) -> Tensor | float:
        """The timestep that the host passed."""
        ...

    def run_whole(self) -> Any:
        """The host's own call, arguments and result untouched."""
        ...

    def run_tiles(
        self, boxes: Sequence[Box], noisy: Sequence[Float[Tensor, "rows channels height width"]]
    ) -> Sequence[Float[Tensor, "rows channels height width"]]:
        """Predictions of tiles of one shape, in one call of the model.

        Args:
            boxes: where the tiles lie, all of one size.
            noisy: what each tile sees as its noisy latent.
        """
        ...

    def wrap(self, prediction: Float[Tensor, "rows channels height width"]) -> Any:
        """A fused prediction in the form and dtype that the host expects from its model."""
        ...


ModelCallFactory = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], ModelCall]
"""(module, its own forward, positional arguments, keyword arguments) -> the call, bound."""
