"""A tiny model's folder, as the command line loads it."""

import hashlib
from pathlib import Path

import tiny

from latent_tiles.pipelines.defaults import ModelDefaults

DEFAULTS = ModelDefaults(tile=64, overlap=16, scale=2.0, num_inference_steps=2, guidance_scale=1.0)


def save(folder: Path, host: str = "StableDiffusionInstructPix2PixPipeline") -> Path:
    """Write the host, its defaults and the checksums of everything."""
    tiny.host_pipeline(host).save_pretrained(folder)
    DEFAULTS.save(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    names = [path.relative_to(folder).as_posix() for path in files]
    lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder
