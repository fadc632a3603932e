"""Quality of the reference model on photographs, beside bicubic, Lanczos and the autoencoder's round trip.

Run: `python benchmarks/bench_reference.py MODEL --val photos/val-000.tar --sizes 64 96 128 --json out.json`

Each picture is reduced by 4 (bicubic) and enlarged by each method; the host is plain diffusers, without tiles.

- PSNR in dB over RGB, mean of the pictures;
- top octave: spectral energy of luma above half the Nyquist frequency (on either axis), after a Hann window, over the
  truth's: as the ratio of the totals ("energy", which strongly textured pictures rule), and as the mean over pictures
  of the square root of their ratios ("amplitude", near 0.12 for Lanczos);
- SWD: sliced Wasserstein distance of 7x7 patches of the finest Laplacian level of luma (Karras et al. 2018, with both
  sets divided by the truth's standard deviation, so that missing contrast counts).

With `--sizes` the same pixels are also restored in untiled blocks of several sizes, to show that size does not matter.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import platform
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from numpy.typing import NDArray
from PIL import Image

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Method = Callable[[Pixels], Pixels]
BUNDLED = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
"""scikit-image's photographs that its package contains."""
PROJECTIONS, PATCH, PATCHES = 128, 7, 4096
COLUMNS = (("psnr_db", 2), ("top_octave_energy", 3), ("top_octave_amplitude", 3), ("swd", 3))
"""Measures and their decimals, as the tables show them."""


def read_pictures(source: Path) -> list[tuple[str, Pixels]]:
    """Pictures of a tar file or a folder, (height, width, 3) uint8, sorted by name."""
    if source.is_dir():
        data = [(path.name, path.read_bytes()) for path in source.iterdir() if path.suffix in {".jpg", ".png"}]
    else:
        with tarfile.open(source) as archive:
            members = [member for member in archive if member.isfile() and member.name.endswith((".jpg", ".png"))]
            data = [(member.name, archive.extractfile(member).read()) for member in members]
    return [(name, np.asarray(Image.open(io.BytesIO(item)).convert("RGB"))) for name, item in sorted(data)]


def bundled_pictures() -> list[tuple[str, Pixels]]:
    """scikit-image's photographs, cut to multiples of 32 px."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    found = []
    for name in BUNDLED:
        if not (folder / name).is_file():
            logger.warning("scikit-image has no %s here; left out", name)
            continue
        pixels = np.asarray(Image.open(folder / name).convert("RGB"))
        found.append((name, pixels[: pixels.shape[0] // 32 * 32, : pixels.shape[1] // 32 * 32]))
    return found


def enlarge(small: Pixels, size: tuple[int, int], how: Image.Resampling) -> Pixels:
    """A picture resized to (height, width)."""
    return np.asarray(Image.fromarray(small).resize(size[::-1], how))


def reduce(truth: Pixels, scale: int) -> Pixels:
    """The truth reduced by `scale` with antialiased bicubic interpolation."""
    return enlarge(truth, (truth.shape[0] // scale, truth.shape[1] // scale), Image.Resampling.BICUBIC)


def luma(pixels: Pixels) -> NDArray[np.float64]:
    """BT.601 luma, 0..255."""
    return pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def psnr(ours: Pixels, truth: Pixels) -> float:
    """Peak signal-to-noise ratio over RGB in dB."""
    error = np.mean((ours.astype(np.float64) - truth) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def top_octave(pixels: Pixels) -> float:
    """Spectral energy of luma above half the Nyquist frequency on either axis, after a Hann window."""
    plane = luma(pixels)
    plane = (plane - plane.mean()) * np.outer(np.hanning(plane.shape[0]), np.hanning(plane.shape[1]))
    spectrum = np.abs(np.fft.fft2(plane)) ** 2
    rows, columns = (np.abs(np.fft.fftfreq(length)) > 0.25 for length in plane.shape)
    return float(spectrum[rows[:, None] | columns[None, :]].sum() / plane.size)


def laplacian_patches(pixels: Pixels, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random patches of the finest Laplacian level of luma, (count, 49) float32."""
    image = Image.fromarray(luma(pixels).astype(np.float32))
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    level = np.asarray(image) - np.asarray(half.resize(image.size, Image.Resampling.BILINEAR))
    count = PATCHES * pixels.shape[0] * pixels.shape[1] // 512**2 + 1
    tops, lefts = rng.integers(level.shape[0] - PATCH, size=count), rng.integers(level.shape[1] - PATCH, size=count)
    windows = np.lib.stride_tricks.sliding_window_view(level, (PATCH, PATCH))
    return windows[tops, lefts].reshape(count, -1)


@dataclass
class Score:
    """Measures of one method, gathered over pictures."""

    psnr: list[float] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    patches: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, ours: Pixels, truth: Pixels, seed: int) -> None:
        """Count one picture; patches are taken at the same places for every method."""
        self.psnr.append(psnr(ours, truth))
        self.energy.append(top_octave(ours))
        self.patches.append(laplacian_patches(ours, np.random.default_rng(seed)))


def sliced_wasserstein(ours: NDArray[np.float32], truth: NDArray[np.float32], seed: int = 0) -> float:
    """Mean distance of sorted projections on random directions, in standard deviations of the truth."""
    directions = np.random.default_rng(seed).standard_normal((PATCH * PATCH, PROJECTIONS)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    spread = truth.std()
    projected = [np.sort((patches / spread) @ directions, axis=0) for patches in (ours, truth)]
    return float(np.abs(projected[0] - projected[1]).mean())


def summarise(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    """PSNR, top-octave ratio and SWD of every method against the entry "truth"."""
    truth = scores["truth"]
    truth_patches = np.concatenate(truth.patches)
    return {
        name: {
            "psnr_db": float(np.mean(score.psnr)),
            "top_octave_energy": sum(score.energy) / sum(truth.energy),
            "top_octave_amplitude": float(np.mean(np.sqrt(np.divide(score.energy, truth.energy)))),
            "swd": sliced_wasserstein(np.concatenate(score.patches), truth_patches),
        }
        for name, score in scores.items()
        if name != "truth"
    }


class Model:
    """The reference model behind its stock host."""

    def __init__(self, folder: str, *, steps: int, seed: int, device: str) -> None:
        """Load the model in float32 (CPU) or float16 (CUDA)."""
        self.pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
        self.pipe.to(device, torch.float16 if device == "cuda" else torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps, self.seed = steps, seed

    def restore(self, frame: Pixels, prompt: str = "") -> Pixels:
        """One untiled call on an enlarged frame, (height, width, 3) uint8."""
        result = self.pipe(
            prompt=prompt,
            image=Image.fromarray(frame),
            num_inference_steps=self.steps,
            guidance_scale=1.0,
            image_guidance_scale=1.0,
            generator=torch.Generator().manual_seed(self.seed),
        )
        return np.asarray(result.images[0])

    @torch.inference_mode()
    def round_trip(self, pixels: Pixels) -> Pixels:
        """The picture through the autoencoder alone."""
        vae, processor = self.pipe.vae, self.pipe.image_processor
        images = processor.preprocess(Image.fromarray(pixels)).to(vae.device, vae.dtype)
        encoded = vae.encode(images)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return np.asarray(processor.postprocess(vae.decode(latents).sample, output_type="pil")[0])


def measure(pictures: Iterable[tuple[str, Pixels]], model: Model, scale: int, folder: Path | None) -> dict[str, Any]:
    """All methods on all pictures."""
    scores = {name: Score() for name in ("truth", "ours", "bicubic", "lanczos", "round trip")}
    seconds = []
    for index, (name, truth) in enumerate(pictures):
        size, small = truth.shape[:2], reduce(truth, scale)
        bicubic = enlarge(small, size, Image.Resampling.BICUBIC)
        began = time.perf_counter()
        ours = model.restore(bicubic)
        seconds.append((time.perf_counter() - began) * 1e6 / (size[0] * size[1]))
        outcomes = {
            "truth": truth,
            "ours": ours,
            "bicubic": bicubic,
            "lanczos": enlarge(small, size, Image.Resampling.LANCZOS),
            "round trip": model.round_trip(truth),
        }
        for method, pixels in outcomes.items():
            scores[method].add(pixels, truth, index)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            panels = [outcomes[key] for key in ("bicubic", "ours", "truth")]
            Image.fromarray(np.concatenate(panels, 1)).save(folder / f"{Path(name).stem}.png")
        if (index + 1) % 10 == 0:
            logger.info("%d pictures, %.2f s a megapixel", index + 1, float(np.median(seconds)))
    summary = summarise(scores)
    return {"methods": summary, "pictures": len(seconds), "seconds_per_megapixel": float(np.median(seconds))}


def restore_in_blocks(frame: Pixels, block_px: tuple[int, int], model: Model) -> Pixels:
    """Restore independent blocks of (height, width) pixels, without overlap."""
    out = np.empty_like(frame)
    for top in range(0, frame.shape[0], block_px[0]):
        for left in range(0, frame.shape[1], block_px[1]):
            window = (slice(top, top + block_px[0]), slice(left, left + block_px[1]))
            out[window] = model.restore(np.ascontiguousarray(frame[window]))
    return out


def aligned_parts(ours: Pixels, truth: Pixels, side: int) -> Iterable[tuple[int, Pixels, Pixels]]:
    """Numbered squares on a grid of `side` pixels; measured one by one, so that joints do not count as detail."""
    number = 0
    for top in range(0, truth.shape[0] - side + 1, side):
        for left in range(0, truth.shape[1] - side + 1, side):
            window = (slice(top, top + side), slice(left, left + side))
            yield number, ours[window], truth[window]
            number += 1


def measure_sizes(
    pictures: list[tuple[str, Pixels]], sizes: list[tuple[int, int]], model: Model, scale: int
) -> dict[str, dict[str, float]]:
    """Untiled blocks of several sizes beside blocks of 32 x 32 latents, on the same pixels.

    Args:
        pictures: Truths.
        sizes: (height, width) of the blocks in latents; pictures too small for a size are left out of it.
        model: The model.
        scale: Reduction.

    Returns:
        For each size "HxW": the measures, those of 32x32 on the same pixels with the suffix "_at_32", and "pictures".
    """
    factor, results = model.pipe.vae_scale_factor, {}
    for height, width in sizes:
        block = (height * factor, width * factor)
        scores, counted = {name: Score() for name in ("truth", "size", "at 32")}, 0
        for index, (_, picture) in enumerate(pictures):
            rows, columns = picture.shape[0] // block[0] * block[0], picture.shape[1] // block[1] * block[1]
            if not rows or not columns:
                continue
            truth = picture[: min(rows, max(512, block[0])), : min(columns, max(512, block[1]))]
            frame = enlarge(reduce(truth, scale), truth.shape[:2], Image.Resampling.BICUBIC)
            outcomes = {
                "truth": truth,
                "size": restore_in_blocks(frame, block, model),
                "at 32": restore_in_blocks(frame, (32 * factor, 32 * factor), model),
            }
            counted += 1
            for key, pixels in outcomes.items():
                for at, ours, part in aligned_parts(pixels, truth, 32 * factor):
                    scores[key].add(ours, part, index * 10_000 + at)
        if not counted:
            logger.warning("no picture is large enough for %dx%d latents; left out", height, width)
            continue
        summary = summarise(scores)
        reference = {f"{key}_at_32": value for key, value in summary["at 32"].items()}
        results[f"{height}x{width}"] = {**summary["size"], **reference, "pictures": counted}
        logger.info("%dx%d latents: %s", height, width, results[f"{height}x{width}"])
    return results


def as_table(report: dict[str, Any]) -> str:
    """Markdown tables of a report."""
    lines = []
    for key, title in (("val", "validation crops"), ("bundled", "scikit-image's pictures")):
        if key in report:
            part = report[key]
            lines += [f"x{report['scale']} in {report['steps']} steps, {part['pictures']} {title}:", ""]
            lines += [
                "| method | PSNR (dB) | top-octave energy | top-octave amplitude | SWD |",
                "|---|---|---|---|---|",
            ]
            for name, m in part["methods"].items():
                lines.append("| " + " | ".join([name, *(f"{m[key]:.{digits}f}" for key, digits in COLUMNS)]) + " |")
            lines.append("")
    if report.get("sizes"):
        lines += ["Untiled blocks of other sizes, in brackets 32x32 latents on the same pixels:", ""]
        lines += ["| latents | PSNR (dB) | top-octave energy | top-octave amplitude | SWD | pictures |"]
        lines += ["|---|---|---|---|---|---|"]
        for name, m in report["sizes"].items():
            cells = [f"{m[key]:.{digits}f} ({m[key + '_at_32']:.{digits}f})" for key, digits in COLUMNS]
            lines.append(f"| {name} | {' | '.join(cells)} | {m['pictures']} |")
        lines.append("")
    return "\n".join(lines)


def default_steps(folder: Path) -> int:
    """Denoising steps that the model's `latent_tiles.json` asks for, or 8 without one."""
    path = folder / "latent_tiles.json"
    return int(json.loads(path.read_text())["num_inference_steps"]) if path.is_file() else 8


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--val", type=Path, help="tar file or folder of validation crops")
    parser.add_argument("--limit", type=int, help="only every n-th crop, so that about so many remain")
    parser.add_argument("--no-bundled", action="store_true", help="leave out scikit-image's pictures")
    parser.add_argument(
        "--sizes", type=_size, nargs="*", default=[], help="untiled sizes in latents, such as 64 or 32x448"
    )
    parser.add_argument("--size-pictures", type=int, default=12, help="pictures for that comparison")
    parser.add_argument("--frames", type=Path, help="folder of large photographs, for sizes that the crops do not hold")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--steps", type=int, help="denoising steps (default: what the model's folder says, or 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--json", type=Path, help="report to write")
    parser.add_argument("--table", type=Path, help="Markdown tables to write")
    parser.add_argument("--pictures", type=Path, help="folder for comparison pictures: bicubic, ours, truth")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    steps = options.steps or default_steps(Path(options.model))
    model = Model(options.model, steps=steps, seed=options.seed, device=options.device)
    report: dict[str, Any] = {
        "commit": _commit(),
        "device": options.device,
        "dtype": str(model.pipe.unet.dtype),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "scale": options.scale,
        "steps": steps,
        "seed": options.seed,
    }
    crops = read_pictures(options.val) if options.val else []
    if options.limit and len(crops) > options.limit:
        crops = crops[:: -(-len(crops) // options.limit)]
    if crops:
        report["val"] = measure(crops, model, options.scale, options.pictures)
    if not options.no_bundled:
        report["bundled"] = measure(bundled_pictures(), model, options.scale, options.pictures)
    if options.sizes:
        few = crops[:: max(1, len(crops) // options.size_pictures)][: options.size_pictures]
        large = read_pictures(options.frames)[: options.size_pictures] if options.frames else []
        inside = [size for size in options.sizes if max(size) * model.pipe.vae_scale_factor <= 512]
        outside = [size for size in options.sizes if size not in inside]
        report["sizes"] = measure_sizes(few, inside, model, options.scale)
        report["sizes"] |= measure_sizes(large, outside, model, options.scale)
    table = as_table(report)
    logger.info("\n%s", table)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.table:
        options.table.write_text(table)


if __name__ == "__main__":
    main()
