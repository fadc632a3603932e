"""Defaults belong to the model: `latent_tiles.json` in its folder, a table for its host class otherwise."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from latent_tiles.errors import DefaultsError, MemoryStrategyError, TilingError
from latent_tiles.memory import build_memory
from latent_tiles.tiling import Tiling

FILE_NAME = "latent_tiles.json"
SCHEMA = 1

_INFINITY = float("inf")
_RANGES: dict[str, tuple[float, float]] = {
    "tile": (1, _INFINITY),
    "overlap": (0, _INFINITY),
    "scale": (1, _INFINITY),
    "num_inference_steps": (1, _INFINITY),
    "guidance_scale": (0, _INFINITY),
    "image_guidance_scale": (0, _INFINITY),
    "strength": (0, 1),
    "noise_level": (0, _INFINITY),
    "validated_untiled_latent": (1, _INFINITY),
}
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}
"""What JSON may hold for a setting, by its annotation."""


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """Settings that a call uses where the caller gives none. None: the host's own default.

    Args:
        tile: side of a tile, output pixels; usually the training size.
        overlap: least overlap, output pixels.
        memory: tile memory.
        scale: enlargement.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance; 1 is off.
        image_guidance_scale: guidance towards the image (InstructPix2Pix).
        strength: how much of the image is renewed (image-to-image hosts), 0 to 1.
        noise_level: noise on the low-resolution image (x4 host).
        validated_untiled_latent: largest side in latents at which an untiled pass of this model was found good, so
            that it may serve as an oracle.

    Raises:
        DefaultsError: a value out of range.
    """

    tile: int
    overlap: int
    memory: str = "none"
    scale: float = 2.0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    strength: float | None = None
    noise_level: int | None = None
    validated_untiled_latent: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value: float | None = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DefaultsError(f"{FILE_NAME}: {name} must be between {low} and {high}, got {value}")
        try:
            Tiling(tile=self.tile, overlap=self.overlap)
            build_memory(self.memory)
        except (TilingError, MemoryStrategyError) as error:
            raise DefaultsError(f"{FILE_NAME}: {error}") from error

    def host_arguments(self) -> dict[str, Any]:
        """Arguments of the host's call that these defaults set."""
        names = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "strength", "noise_level")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def save(self, folder: Path) -> None:
        """Write `latent_tiles.json` into a model folder."""
        settings = {name: value for name, value in asdict(self).items() if value is not None}
        text = json.dumps({"schema": SCHEMA, **settings}, indent=2)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def parse_defaults(text: str) -> ModelDefaults:
    """Read the text of a `latent_tiles.json`.

    Raises:
        DefaultsError: not JSON, another schema, an unknown key, a missing tile or overlap, or a wrong type.
    """
    try:
        settings: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise DefaultsError(f"{FILE_NAME} is not JSON: {error}") from error
    if not isinstance(settings, dict) or settings.pop("schema", None) != SCHEMA:
        raise DefaultsError(f'{FILE_NAME}: expected an object with "schema": {SCHEMA}')
    known = {entry.name: entry.type for entry in fields(ModelDefaults)}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise DefaultsError(f"{FILE_NAME}: unknown settings {unknown}; known are {sorted(known)}")
    for name in ("tile", "overlap"):
        if name not in settings:
            raise DefaultsError(f"{FILE_NAME}: {name} is missing")
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, _KINDS[str(known[name])]):
            raise DefaultsError(f"{FILE_NAME}: {name} has the wrong type, got {value!r}")
    return ModelDefaults(**settings)


def for_tile(table: ModelDefaults, tile: int | None) -> ModelDefaults:
    """A table's defaults with the tile that a model's own configuration states, and an eighth of it as overlap."""
    return table if tile is None else replace(table, tile=tile, overlap=tile // 8)
