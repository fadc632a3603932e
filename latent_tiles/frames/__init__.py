"""Pictures and picture files."""

from latent_tiles.frames.files import Frame, check_writable, read_frame, write_atomically, write_frame
from latent_tiles.frames.inputs import as_picture
from latent_tiles.frames.picture import Picture, pad_to, resize, scaled_size

__all__ = [
    "Frame",
    "Picture",
    "as_picture",
    "check_writable",
    "pad_to",
    "read_frame",
    "resize",
    "scaled_size",
    "write_atomically",
    "write_frame",
]
