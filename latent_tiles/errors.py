"""Every error of the library.

One base class, so that a caller can catch all of them; each leaf is also the builtin that a caller would expect, so
that code written against plain Python keeps working. A message says what was wrong, both values, and the fix.
"""


class LatentTilesError(Exception):
    """Base class of every error that latent-tiles raises on purpose."""


class GeometryError(LatentTilesError, ValueError):
    """A frame, tile, overlap or origin that no grid can be made of."""


class TilingError(LatentTilesError, ValueError):
    """A `Tiling` setting that is out of range or unknown."""


class CanvasError(LatentTilesError, ValueError):
    """A canvas was read where nothing had been written, or written outside its frame."""


class NoiseError(LatentTilesError, ValueError):
    """A draw that the noise field cannot serve, or a scheduler that draws its noise past it."""


class MemoryStrategyError(LatentTilesError, ValueError):
    """A tile memory that does not exist, or does not fit this model, scheduler or host."""


class ParameterisationError(LatentTilesError, ValueError):
    """A scheduler whose signal and noise levels, or prediction type, are not known."""


class FamilyError(LatentTilesError, ValueError):
    """A denoiser, or an argument of one, that cannot be cut into tiles."""


class UnsupportedHostError(LatentTilesError, ValueError):
    """A diffusers pipeline that cannot act as the host of a tiled call."""


class ProgramError(LatentTilesError, ValueError):
    """A network, or a size of its input, that cannot be run window by window."""


class ExecutorError(LatentTilesError, RuntimeError):
    """A network whose weights are not where the executor can use them."""


class BudgetError(LatentTilesError, ValueError):
    """A budget of memory, disk or time that no plan meets; the message names the smallest that one does."""


class SpillError(LatentTilesError, OSError):
    """A spill folder that cannot take a map."""


class VaeError(LatentTilesError, ValueError):
    """An autoencoder that cannot be run exactly in tiles, or a setting of it that is out of range."""


class ImageError(LatentTilesError, ValueError):
    """An image, array or tensor that is not a picture the pipeline can work on."""


class SettingError(LatentTilesError, ValueError):
    """An argument of a pipeline call that is out of range or contradicts another one."""


class DefaultsError(LatentTilesError, ValueError):
    """A `latent_tiles.json` that is not what this version reads."""


class FrameFileError(LatentTilesError, OSError):
    """A picture file that cannot be read or written."""


class ModelFolderError(LatentTilesError, OSError):
    """A model folder that is missing, or is not a diffusers pipeline."""
