"""A small discriminator of patches, which tells the decoder what fine texture looks like.

Pixel losses make uncertain texture flat; a discriminator does not care where a blade of grass stands as long as it is
one (Goodfellow et al. 2014; patches: Isola et al. 2017; hinge loss: Lim and Ye 2017; spectral norm: Miyato et al.
2018).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches of about 20 pixels, positive where they look real."""

    def __init__(self, width: int = 32) -> None:
        """Make fresh layers of `width` channels and twice as many."""
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, side, stride in (
            (3, width, 3, 1),
            (width, 2 * width, 4, 2),
            (2 * width, 2 * width, 3, 1),
            (2 * width, 2 * width, 3, 1),
        ):
            layers += [spectral_norm(nn.Conv2d(before, after, side, stride, side // 2)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(2 * width, 1, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of (batch, 3, height, width) images in [-1, 1], (batch, 1, about height / 2, about width / 2)."""
        return self.layers(images)


def hinge_losses(discriminator: nn.Module, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of both sides from one pass, each with gradients for its own side only.

    Args:
        discriminator: Scores of images.
        fake: What the generator made, (batch, 3, height, width), [-1, 1].
        real: Photographs, same shape.

    Returns:
        The generator's loss and the discriminator's, scalars.
    """
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    generator_loss = -functional_call(discriminator, fixed, fake).float().mean()
    on_real, on_fake = discriminator(real).float(), discriminator(fake.detach()).float()
    return generator_loss, 0.5 * ((1 - on_real).relu().mean() + (1 + on_fake).relu().mean())
