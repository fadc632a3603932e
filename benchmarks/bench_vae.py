"""How far each way to run a large autoencoder is from one untiled pass, and what it costs.

Four questions, each answered by ratios within one run; `--parts` chooses:

1. compare: exact (maps in memory, on disk, recomputed), sampled statistics, attention to part of the keys, and
   diffusers' `enable_tiling()`, against one untiled pass. Times are interleaved; memory is measured for each way alone,
   in a process of its own.
2. half: float16 and bfloat16, exact and untiled, each against untiled float32.
3. frame: one frame through a video autoencoder (Qwen-Image, Wan), exact against stock.
4. beyond (`--beyond MP ...`): frames that untiled cannot hold, read from a source and decoded into a sink that never
   have the whole image; time and memory by size, and the largest again with another tile size.

What is measured:

- error: in 8-bit levels for images (their range -1 to 1 is 255 levels), in standard deviations of the latents for
  latents (the mean of the posterior);
- tone spread: the mean signed error of each 64 px block and channel; its standard deviation over the blocks and, in
  brackets, from the lowest block to the highest, of the worst channel;
- memory: on a CPU the growth of anonymous resident memory (Linux; elsewhere of the peak resident set) from before the
  call to its worst moment, output included; on CUDA the growth of torch's allocations.

Images are scikit-image's bundled photographs, in squares of 512 px beside each other, mirrored where they are smaller;
latents are those of these images. The models "sd", "qwen" and "wan" have seeded random weights: variance-preserving
layers, norms with random scales and shifts, outputs shifted and scaled to the spread of latents and images.

Run: python benchmarks/bench_vae.py [--quick] [--beyond 1 4 16 40] [--json figures.json]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import logging
import math
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from environment import environment, table
from torch import Tensor, nn

from latent_tiles.errors import LatentTilesError
from latent_tiles.geometry import Box, Size
from latent_tiles.vae.exact import ExactVae, exact_vae
from latent_tiles.vae.registry import supported_vaes, vae_family

SEED = 7
BLOCK_PX = 64
CELL_PX = 512
WARM_UP_PX = 64
CALIBRATION_PX = 128
FEWEST_KEYS = 32
LEVELS = 127.5
MIB = 2**20
VIDEO = {"qwen": "AutoencoderKLQwenImage", "wan": "AutoencoderKLWan"}
SIDES = {"cpu": {"reference": 1024, "sd": 256}, "cuda": {"reference": 2048, "sd": 1024}}
PRELOADED = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "latent_tiles.vae.exact",
    "skimage.data",
)
"""What processes of their own would each spend seconds on importing."""
OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError, BrokenProcessPool)


# Inputs


class Mosaic:
    """A photograph of any size, made region by region: bundled pictures in squares beside each other.

    Args:
        size: height and width.
    """

    def __init__(self, size: Size) -> None:
        from skimage import data

        self.size = size
        pictures = (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
        self._pictures = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in pictures]

    def read(self, box: Box) -> Tensor:
        """The pixels of a box, (1, 3, height, width), -1 to 1."""
        out = torch.empty(3, box.height, box.width, dtype=torch.uint8)
        for row in range(box.top // CELL_PX, -(-box.bottom // CELL_PX)):
            for column in range(box.left // CELL_PX, -(-box.right // CELL_PX)):
                part = Box(row * CELL_PX, column * CELL_PX, CELL_PX, CELL_PX).intersection(box)
                picture = self._pictures[(row * row + 2 * column + row * column) % len(self._pictures)]
                rows = _mirrored(part.top - row * CELL_PX, part.height, picture.shape[1])
                columns = _mirrored(part.left - column * CELL_PX, part.width, picture.shape[2])
                top, left = part.top - box.top, part.left - box.left
                out[:, top : top + part.height, left : left + part.width] = picture[:, rows][:, :, columns]
        return (out.float() / LEVELS - 1)[None]


def _mirrored(start: int, length: int, period: int) -> Tensor:
    at = torch.arange(start, start + length) % (2 * period)
    return torch.where(at < period, at, 2 * period - 1 - at)


def photograph(size: Size) -> Tensor:
    """The whole of a mosaic, (1, 3, height, width), -1 to 1."""
    return Mosaic(size).read(Box(0, 0, *size))


class Tally:
    """A sink that keeps nothing but a checksum.

    Args:
        check: an array of the whole image, on disk: filled by a first run, compared with by a second.
        first: whether this run fills it.
    """

    def __init__(self, check: np.memmap | None = None, *, first: bool = True) -> None:
        self.area, self.largest_difference = 0, 0.0
        self._digest, self._check, self._first = hashlib.blake2b(digest_size=8), check, first

    def write(self, box: Box, values: Tensor) -> None:
        """Take one region."""
        pixels = values[0].float().cpu().contiguous().numpy()
        self.area += box.area
        self._digest.update(pixels)
        if self._check is not None:
            rows, columns = box.to_slices()
            if self._first:
                self._check[:, rows, columns] = pixels
            else:
                difference = float(np.abs(self._check[:, rows, columns] - pixels).max())
                self.largest_difference = max(self.largest_difference, difference)

    @property
    def digest(self) -> str:
        """Of all that was written, in order."""
        return self._digest.hexdigest()


# Models


def sd_autoencoder(channels: int) -> nn.Module:
    """The autoencoder of Stable Diffusion, full size with 128 channels, with plausible random weights."""
    torch.manual_seed(SEED)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
        layers_per_block=2,
        norm_num_groups=32,
        sample_size=512,
    )
    return make_plausible(vae, vae.quant_conv, vae.decoder.conv_out)


def video_autoencoder(name: str, base: int) -> nn.Module:
    """An autoencoder of Qwen-Image or Wan, with plausible random weights."""
    torch.manual_seed(SEED)
    vae = getattr(diffusers, VIDEO[name])(base_dim=base)
    return make_plausible(vae, vae.quant_conv, vae.decoder.conv_out)


@torch.no_grad()
def make_plausible(vae: Any, last_encoder: nn.Module, last_decoder: nn.Module) -> nn.Module:
    """Weights under which activations neither vanish nor explode, and norms matter."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(like: Tensor, deviation: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * deviation

    for name, weight in vae.named_parameters():
        if weight.ndim >= 2 and not name.endswith("gamma"):
            weight.copy_(normal(weight, math.prod(weight.shape[1:]) ** -0.5))
        else:
            weight.copy_(normal(weight, 0.2) + (0 if name.endswith("bias") else 1))
    vae.eval()
    pixels = photograph(Size(CALIBRATION_PX, CALIBRATION_PX))
    video = vae_family(vae).video
    _rescale(last_encoder, lambda: run_once(vae, "encode", pixels, video), 1.0)
    latents = run_once(vae, "encode", pixels, video)
    _rescale(last_decoder, lambda: run_once(vae, "decode", latents, video), 0.4)
    return vae


def _rescale(layer: Any, run: Callable[[], Any], spread: float) -> None:
    """Give each channel of a layer's output mean 0 and a standard deviation."""
    seen = list[Tensor]()
    hook = layer.register_forward_hook(lambda module, given, output: seen.append(output))
    run()
    hook.remove()
    flat = seen[-1].transpose(0, 1).flatten(1)
    mean, factor = flat.mean(1), spread / flat.std(1)
    layer.weight.mul_(factor.view(-1, *(1,) * (layer.weight.ndim - 1)))
    layer.bias.copy_((layer.bias - mean) * factor)


def load(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The autoencoder of a folder."""
    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"]
    vae = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=dtype)
    return vae.to(device).eval()


def folder_of(name: str, scratch: Path, channels: int) -> Path:
    """The folder of a model, made where it is not one of a trained model."""
    if name == "reference":
        from latent_tiles import reference_model

        return Path(reference_model()) / "vae"
    if name == "sd" or name in VIDEO:
        made = scratch / name
        if not made.exists():
            (sd_autoencoder(channels) if name == "sd" else video_autoencoder(name, channels)).save_pretrained(made)
        return made
    given = Path(name)
    return given / "vae" if (given / "vae").is_dir() else given


# Ways to run


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run an autoencoder.

    Args:
        name: in the tables.
        settings: of `exact_vae`; None leaves the autoencoder as it is.
        stock_tile: side in pixels of diffusers' tiles; None for no tiling of its own.
    """

    name: str
    settings: Mapping[str, Any] | None = None
    stock_tile: int | None = None


UNTILED = Way(name="untiled")


def run_once(vae: Any, direction: str, values: Tensor, video: bool) -> Tensor:
    """Latents of an image, or the image of latents, (rows, channels, height, width)."""
    output = getattr(vae, direction)(values.unsqueeze(2) if video else values)
    if direction == "decode":
        result = output.sample
    else:
        result = output.latent_dist.mode() if hasattr(output, "latent_dist") else _only(output)
    return result.squeeze(2) if video else result


def _only(output: Any) -> Tensor:
    return output.latents if hasattr(output, "latents") else output.latent


@contextlib.contextmanager
def applied(vae: Any, way: Way, factor: int) -> Iterator[ExactVae | None]:
    """Within the block the autoencoder runs that way."""
    if way.settings is not None:
        with exact_vae(vae, **way.settings) as exact:
            yield exact
        return
    if way.stock_tile is None:
        yield None
        return
    kept = dict(vars(vae))
    vae.enable_tiling()
    tile = way.stock_tile
    if hasattr(vae, "tile_latent_min_size"):
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // factor
        if hasattr(vae, "spatial_scale_factor"):
            # diffusers assumes 8, whatever the model's is.
            vae.spatial_scale_factor = factor
    else:
        stride = tile * vae.tile_sample_stride_height // vae.tile_sample_min_height
        vae.tile_sample_min_height = vae.tile_sample_min_width = tile
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = stride
    try:
        yield None
    finally:
        vars(vae).update(kept)


def stock_tile(vae: Any, side: int, factor: int) -> int:
    """The tile that diffusers takes, or half of a frame that would be a single one."""
    default = getattr(vae, "tile_sample_min_size", None) or vae.tile_sample_min_height
    return min(int(default), side // 2 // factor * factor)


def ways_for(vae: Any, size: Size, factor: int, direction: str, options: argparse.Namespace) -> list[Way]:
    """The ways that differ for this model and size."""
    tile = {} if options.tile is None else {"tile": options.tile}
    given = size if direction == "encode" else Size(size.height // factor, size.width // factor)
    roomy = {"ram_budget_mib": 2**40, **tile}
    with exact_vae(vae, **roomy) as exact:
        plan = exact.plan(direction, *given)
        attends = plan.attention_flops > 0
        maps = plan.ram_mib + plan.device_map_mib
    ways = [UNTILED, Way(name="exact", settings=tile)]
    if plan.passes > 1:
        disk = {"ram_budget_mib": 0, "spill_budget_mib": 2 * math.ceil(maps) + 64, "spill_dir": options.spill_dir}
        if options.device == "cpu":
            ways.append(Way(name="exact, maps on disk", settings=tile | disk))
        for share in options.ram_shares:
            limit = {"ram_budget_mib": share * maps}
            if options.device != "cpu":
                # Half of a GPU is for windows.
                limit = {"ram_budget_mib": 0, "device_budget_mib": 2 * share * maps}
            ways.append(Way(name=f"exact, {100 * share:g} % of the maps", settings=tile | limit))
        ways.append(Way(name="sampled", settings=tile | {"mode": "sampled"}))
    if attends:
        positions = size.area // factor**2
        keys = max(FEWEST_KEYS, positions // options.key_divisor)
        ways.append(Way(name=f"exact, {keys} of {positions} keys", settings=tile | {"attention_keys": keys}))
    own = stock_tile(vae, min(size), factor)
    ways.append(Way(name=f"enable_tiling, {own} px", stock_tile=own))
    return [way for way in ways if options.ways is None or way in (UNTILED, *ways[1:2]) or _chosen(way, options.ways)]


def _chosen(way: Way, names: list[str]) -> bool:
    return any(way.name.startswith(name) for name in names)


# Measuring


@dataclass
class Meter:
    """A block whose time and peak memory are measured.

    Args:
        device: whose allocations count.

    Attributes:
        seconds: wall-clock time.
        cpu_seconds: time of all threads of this process.
        host_mib: growth of the process's memory.
        device_mib: growth of allocations on CUDA; None elsewhere.
    """

    device: torch.device
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    host_mib: float | None = None
    device_mib: float | None = None
    memory: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _peak: int = 0

    def __enter__(self) -> Meter:
        self._wait()
        if self.memory:
            _trim()
            self._before = self._peak = _resident() or 0
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._allocated = torch.cuda.memory_allocated(self.device)
        self._start, self._cpu_start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.seconds, self.cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu_start
        if self.memory:
            self._stop.set()
            self._thread.join()
            self._peak = max(self._peak, _resident() or 0)
            self.host_mib = (self._peak - self._before) / MIB if self._before else None
        if self.device.type == "cuda":
            self.device_mib = (torch.cuda.max_memory_allocated(self.device) - self._allocated) / MIB

    @property
    def peak_mib(self) -> float | None:
        """The memory that the tables show."""
        return self.host_mib if self.device_mib is None else self.device_mib

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _watch(self) -> None:
        while not self._stop.wait(0.003):
            self._peak = max(self._peak, _resident() or 0)


def _resident() -> int | None:
    """Bytes of anonymous resident memory; of the peak resident set where the system does not tell; None on Windows."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trim() -> None:
    """Give back what was freed, so that it is not mistaken for memory in use; glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process of its own is to do.

    Args:
        folder: of the autoencoder.
        direction: "encode" or "decode".
        size: of the image.
        factor: pixels to a latent.
        way: how.
        dtype: of weights and values.
        device: where.
        threads: of torch on a CPU.
        latents: file with the latents to decode.
        output: file for the result.
        check: file for the decoded image of a frame beyond, float32; for comparing a second run with a first.
        first: whether that file is to be made.
        alone: in a process of its own.
    """

    folder: str
    direction: str
    size: Size
    factor: int
    way: Way
    dtype: torch.dtype
    device: torch.device
    threads: int
    latents: Path | None = None
    output: Path | None = None
    check: Path | None = None
    first: bool = True
    alone: bool = True

    def values(self, size: Size | None = None) -> Tensor:
        """The input of the call; of a small one for a warm-up, if a size is given."""
        if self.direction == "encode":
            values = photograph(size or self.size)
        else:
            values = torch.from_numpy(np.load(self.latents))
            if size is not None:
                values = values[:, :, : size.height // self.factor, : size.width // self.factor].clone()
        return values.to(self.device, self.dtype)


def quiet() -> None:
    """What libraries have to say about random weights and small frames is not what is asked here."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("latent_tiles").setLevel(logging.ERROR)
    torch.backends.cudnn.allow_tf32 = False


def fresh(function: Callable[[Job], dict[str, Any]], job: Job) -> dict[str, Any]:
    """Run in a new process, so that memory is of this job alone; on CUDA in this one."""
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
        return function(job)
    if not job.alone:
        return function(job)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(PRELOADED))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, job).result()


@torch.no_grad()
def trial(job: Job) -> dict[str, Any]:
    """One call: its memory, its result in `job.output`, and what it says of itself."""
    quiet()
    torch.set_num_threads(job.threads)
    vae = load(job.folder, job.dtype, job.device)
    video, values = vae_family(vae).video, job.values()
    with applied(vae, job.way, job.factor) as exact:
        small = Size(min(WARM_UP_PX, job.size.height), min(WARM_UP_PX, job.size.width))
        run_once(vae, job.direction, job.values(small), video)
        with Meter(job.device, memory=True) as meter:
            result = run_once(vae, job.direction, values, video)
    assert job.output is not None
    np.save(job.output, result.float().cpu().numpy())
    return {"peak_mib": meter.peak_mib, "first_seconds": meter.seconds} | _said(exact)


def _said(exact: ExactVae | None) -> dict[str, Any]:
    if exact is None:
        return {}
    report = exact.reports[-1]
    said = {"plan": asdict(report.plan), "residual": report.residual, "attention_error": report.attention_error}
    return {name: value for name, value in said.items() if value is not None}


@torch.no_grad()
def interleaved(jobs: Mapping[str, Job], repeats: int, patience: float) -> dict[str, list[Meter]]:
    """Times of each job, run in turn, so that a machine whose speed drifts drifts for all.

    Args:
        jobs: by name.
        repeats: rounds at most.
        patience: seconds for all rounds of the first job; at least one round is run.
    """
    first = next(iter(jobs.values()))
    vae = load(first.folder, first.dtype, first.device)
    video, values = vae_family(vae).video, first.values()
    small = first.values(Size(min(WARM_UP_PX, first.size.height), min(WARM_UP_PX, first.size.width)))
    rounds, spent = dict[str, list[Meter]](), 0.0
    for number in range(repeats):
        for name, job in jobs.items():
            with applied(vae, job.way, job.factor):
                if not number:
                    run_once(vae, job.direction, small, video)
                with Meter(job.device) as meter:
                    run_once(vae, job.direction, values, video)
            rounds.setdefault(name, []).append(meter)
        spent += next(iter(rounds.values()))[-1].seconds
        if spent * (number + 2) / (number + 1) > patience:
            break
    return rounds


def errors(values: Tensor, reference: Tensor, direction: str, factor: int) -> dict[str, float]:
    """How far a result is from another; see the top of this file."""
    difference = values - reference
    scale = LEVELS if direction == "decode" else 1 / float(reference.std())
    block = min(BLOCK_PX // (factor if direction == "encode" else 1), *(length // 2 for length in values.shape[2:]))
    tone = F.avg_pool2d(difference, max(1, block)).flatten(2)[0] * scale
    return {
        "max": float(difference.abs().max()) * scale,
        "mean": float(difference.abs().mean()) * scale,
        "rms": float(difference.square().mean().sqrt()) * scale,
        "max_of_range": float(difference.abs().max() / (reference.max() - reference.min())),
        "tone_deviation": float(tone.std(1).max()),
        "tone_peak_to_peak": float((tone.amax(1) - tone.amin(1)).max()),
    }


def _failure(error: BaseException) -> str:
    if isinstance(error, OUT_OF_MEMORY):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


# Part 1


def measure_compare(name: str, side: int, scratch: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways, both directions, one model."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    folder = str(folder_of(name, scratch, options.channels))
    vae = load(folder, dtype, torch.device("cpu"))
    factor = scale_of(vae)
    size = Size(side // factor * factor, side // factor * factor)
    latents = scratch / f"latents-{name.replace('/', '-')}-{side}.npy"
    found = []
    for direction in ("encode", "decode"):
        if direction == "decode" and not latents.exists():
            break
        common = {"size": size, "factor": factor, "dtype": dtype, "device": device, "threads": options.threads}
        common["alone"] = not options.same_process
        jobs = {
            way.name: Job(folder=folder, direction=direction, way=way, latents=latents, **common)
            for way in ways_for(vae, size, factor, direction, options)
        }
        outcomes, reference = dict[str, dict[str, Any]](), None
        for way, job in list(jobs.items()):
            output = scratch / "result.npy"
            try:
                outcomes[way] = fresh(trial, replace(job, output=output))
            except (LatentTilesError, RuntimeError, ValueError, TypeError, *OUT_OF_MEMORY) as error:
                outcomes[way] = {"failed": _failure(error)}
                del jobs[way]
                continue
            result = torch.from_numpy(np.load(output))
            if way == UNTILED.name:
                reference = result
            elif reference is not None:
                outcomes[way]["error"] = errors(result, reference, direction, factor)
            if direction == "encode" and not latents.exists():
                np.save(latents, result.numpy())
        if not jobs:
            break
        rounds = interleaved(jobs, options.repeats, options.patience)
        for way, meters in rounds.items():
            outcomes[way] |= _times(meters, rounds.get(UNTILED.name))
        entry = {"model": name, "class": type(vae).__name__, "direction": direction, "side_px": size.height}
        found.append(entry | {"dtype": options.dtype, "factor": factor, "rounds": len(meters), "ways": outcomes})
    return found


def _times(meters: list[Meter], against: list[Meter] | None) -> dict[str, float | None]:
    def ratio(of: str) -> float | None:
        if against is None:
            return None
        pairs = zip(meters, against, strict=True)
        return statistics.median(getattr(own, of) / max(getattr(other, of), 1e-9) for own, other in pairs)

    return {
        "seconds": statistics.median(meter.seconds for meter in meters),
        "cpu_seconds": statistics.median(meter.cpu_seconds for meter in meters),
        "time_ratio": ratio("seconds"),
        "cpu_ratio": ratio("cpu_seconds"),
    }


def scale_of(vae: Any) -> int:
    """Pixels to a latent, from the program's own arithmetic."""
    exact = ExactVae(vae, _options(ram_budget_mib=2**40))
    return 1024 // exact.plan("encode", 1024, 1024).output_size[0]


def _options(**settings: Any) -> Any:
    from latent_tiles.vae.options import VaeOptions

    return VaeOptions(**settings)


# Part 2


@torch.no_grad()
def measure_half(name: str, side: int, scratch: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Half precision, exact and untiled, against untiled float32."""
    device = torch.device(options.device)
    folder = str(folder_of(name, scratch, options.channels))
    vae = load(folder, torch.float32, device)
    factor, video = scale_of(vae), vae_family(vae).video
    size = Size(side // factor * factor, side // factor * factor)
    pixels = photograph(size).to(device)
    latents = run_once(vae, "encode", pixels, video)
    image = run_once(vae, "decode", latents, video)
    found = []
    for kind in ("float16", "bfloat16"):
        dtype = getattr(torch, kind)
        vae = load(folder, dtype, device)
        for direction, given, reference in (("encode", pixels, latents), ("decode", latents, image)):
            entry: dict[str, Any] = {"model": name, "direction": direction, "side_px": size.height, "dtype": kind}
            for way in (UNTILED, Way(name="exact", settings={"tile": max(16, side // 2)})):
                with applied(vae, way, factor):
                    result = run_once(vae, direction, given.to(dtype), video).float()
                entry[way.name] = errors(result.cpu(), reference.cpu(), direction, factor)
            entry["ratio"] = {
                of: entry["exact"][of] / max(entry["untiled"][of], 1e-12) for of in ("rms", "mean", "max")
            }
            found.append(entry)
    return found


# Part 3


@torch.no_grad()
def measure_frame(name: str, side: int, scratch: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One frame through a video autoencoder, exact against stock."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    folder = str(folder_of(name, scratch, options.video_channels))
    vae = load(folder, dtype, device)
    factor = scale_of(vae)
    size = Size(side // factor * factor, side // factor * factor)
    latents = scratch / f"frame-{name}.npy"
    found = []
    for direction in ("encode", "decode"):
        common = {"size": size, "factor": factor, "dtype": dtype, "device": device, "threads": options.threads}
        ways = (Way(name="stock"), Way(name="exact", settings={}))
        jobs = {way.name: Job(folder=folder, direction=direction, way=way, latents=latents, **common) for way in ways}
        given, results = jobs["stock"].values(), list[Tensor]()
        for job in jobs.values():
            with applied(vae, job.way, factor):
                results.append(run_once(vae, direction, given, video=True).float().cpu())
        if direction == "encode":
            np.save(latents, results[0].numpy())
        rounds = interleaved(jobs, options.repeats, options.patience)
        entry = {"model": name, "class": type(vae).__name__, "direction": direction, "side_px": size.height}
        entry |= {"base_channels": options.video_channels, "dtype": options.dtype}
        entry["error"] = errors(results[1], results[0], direction, factor)
        found.append(entry | {way: _times(meters, rounds["stock"]) for way, meters in rounds.items()})
    return found


# Part 4


@torch.no_grad()
def stream(job: Job) -> dict[str, Any]:
    """One frame from a source or into a sink, never whole in memory; what is in files stays there."""
    quiet()
    torch.set_num_threads(job.threads)
    vae = load(job.folder, job.dtype, job.device)
    video = vae_family(vae).video
    small = Size(WARM_UP_PX, WARM_UP_PX)
    with applied(vae, job.way, job.factor) as exact:
        assert exact is not None
        run_once(vae, job.direction, job.values(small), video)
        if job.direction == "encode":
            with Meter(job.device, memory=True) as meter:
                made = exact.encode_from(Mosaic(job.size))
            latents = made.latent_dist.mode() if hasattr(made, "latent_dist") else _only(made)
            assert job.output is not None
            np.save(job.output, latents.flatten(1, -3).float().cpu().numpy())
            # The distribution has a mean and a logarithm of the variance, and both of them again as views or clamped.
            held = made.latent_dist.parameters if hasattr(made, "latent_dist") else latents
            said: dict[str, Any] = {"latents_mib": held.nbytes / MIB}
        else:
            latents = job.values()
            check = None
            if job.check is not None:
                mode = "w+" if job.first else "r"
                check = np.memmap(job.check, np.float32, mode, shape=(3, *job.size))
            sink = Tally(check, first=job.first)
            with Meter(job.device, memory=True) as meter:
                exact.decode_to(latents.unsqueeze(2) if video else latents, sink)
            said = {"latents_mib": 0.0, "digest": sink.digest, "largest_difference": sink.largest_difference}
            if sink.area != job.size.area:
                raise RuntimeError(f"the sink was given {sink.area} of {job.size.area} positions")
    said |= {"seconds": meter.seconds, "cpu_seconds": meter.cpu_seconds, "host_mib": meter.host_mib}
    said["beyond_latents_mib"] = None if meter.peak_mib is None else meter.peak_mib - said["latents_mib"]
    return said | _said(exact)


def measure_beyond(name: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Frames of several sizes; the largest also with a second tile size."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    folder = str(folder_of(name, scratch, options.channels))
    factor = scale_of(load(folder, dtype, torch.device("cpu")))
    budgets = {
        "device_budget_mib": options.device_budget_mib,
        "ram_budget_mib": options.ram_budget_mib,
        "spill_budget_mib": options.spill_budget_mib,
        "spill_dir": options.spill_dir,
    }
    settings: dict[str, Any] = {"mode": options.beyond_mode, "tile": options.tiles[0], **budgets}
    settings |= {} if options.attention_keys is None else {"attention_keys": options.attention_keys}
    common = {"folder": folder, "factor": factor, "dtype": dtype, "device": device, "threads": options.threads}
    common["alone"] = not options.same_process
    found: dict[str, Any] = {"model": name, "dtype": options.dtype, "settings": settings | {"tiles": options.tiles}}
    side = min(512, int(math.sqrt(options.beyond[0] * 1e6)) // factor * factor)
    found["untiled_mib_per_megapixel"] = _untiled_need(Size(side, side), common, scratch)
    rows = found["sizes"] = []
    for megapixels in options.beyond:
        height = round(math.sqrt(megapixels * 1e6 * 2 / 3) / factor) * factor
        size = Size(height, round(megapixels * 1e6 / height / factor) * factor)
        last = megapixels == options.beyond[-1]
        row: dict[str, Any] = {"megapixels": size.area / 1e6, "size_px": list(size)}
        rows.append(row)
        stored = [scratch / f"beyond-{number}.npy" for number in range(2)]
        picture = scratch / "beyond.image"
        for number, tile in enumerate(options.tiles if last else options.tiles[:1]):
            way = Way(name="beyond", settings=settings | {"tile": tile})
            again = "_again" if number else ""
            for direction in ("encode", "decode"):
                # Both decodes are of the same latents.
                job = Job(direction=direction, size=size, way=way, latents=stored[0], output=stored[number], **common)
                if last and direction == "decode":
                    job = replace(job, check=picture, first=not number)
                try:
                    row[direction + again] = fresh(stream, job)
                except (LatentTilesError, RuntimeError, *OUT_OF_MEMORY) as error:
                    row[direction + again] = {"failed": _failure(error)}
                    break
        if "decode_again" in row and "failed" not in row["decode_again"]:
            row["encode_difference"] = _largest_difference(*stored)
            row["decode_difference"] = row["decode_again"]["largest_difference"] / 2
        picture.unlink(missing_ok=True)
    return found


def _untiled_need(size: Size, common: Mapping[str, Any], scratch: Path) -> dict[str, float | None]:
    """Memory of one untiled pass, from one small enough to run."""
    latents, need = scratch / "small.npy", dict[str, float | None]()
    for direction in ("encode", "decode"):
        output = latents if direction == "encode" else scratch / "result.npy"
        job = Job(direction=direction, size=size, way=UNTILED, latents=latents, output=output, **common)
        peak = fresh(trial, job)["peak_mib"]
        need[direction] = None if peak is None else peak / (size.area / 1e6)
    return need


def _largest_difference(one: Path, other: Path) -> float:
    """Of two files of latents, band by band, as a part of their range."""
    left, right = np.load(one, mmap_mode="r"), np.load(other, mmap_mode="r")
    largest, low, high = 0.0, math.inf, -math.inf
    for top in range(0, left.shape[2], 256):
        band, against = left[:, :, top : top + 256], right[:, :, top : top + 256]
        largest = max(largest, float(np.abs(band - against).max()))
        low, high = min(low, float(band.min())), max(high, float(band.max()))
    return largest / (high - low)


# Results


def bars(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold, and whether it does in this run."""
    found = list[dict[str, Any]]()

    def hold(what: str, value: float | None, limit: float, *, least: bool = False) -> None:
        if value is not None:
            met = value >= limit if least else value <= limit
            found.append({"what": what, "value": value, "bar": f"{'>=' if least else '<='} {limit:g}", "met": met})

    for entry in figures["compare"]:
        where = f"{entry['model']}, {entry['direction']}, {entry['side_px']} px, {entry['dtype']}"
        exact = [way for name, way in entry["ways"].items() if name.startswith("exact") and "keys" not in name]
        known = [way["error"]["max_of_range"] for way in exact if "error" in way]
        if known and entry["dtype"] == "float32":
            hold(f"{where}: error of range, worst of {len(known)} exact ways", max(known), 1e-4)
        if entry["side_px"] >= 1024:
            hold(f"{where}: time of exact against untiled", entry["ways"]["exact"].get("time_ratio"), 1.1)
    for model, kind in sorted({(entry["model"], entry["dtype"]) for entry in figures["half"]}):
        both = [entry["ratio"] for entry in figures["half"] if (entry["model"], entry["dtype"]) == (model, kind)]
        where = f"{model}, {kind}: distance to float32 over untiled's, worse direction"
        for of in ("rms", "max"):
            hold(f"{where}, {of}", max(ratio[of] for ratio in both), 1.1)
    for entry in figures["frame"]:
        if "exact" in entry:
            where = f"{entry['class']}, {entry['direction']}, one frame of {entry['side_px']} px"
            hold(f"{where}: error of range", entry["error"]["max_of_range"], 1e-4)
            if entry["side_px"] >= 256:
                hold(f"{where}: times faster than stock", 1 / entry["exact"]["time_ratio"], 3, least=True)
    for part in figures["beyond"]:
        whole = [row for row in part["sizes"] if all("seconds" in row.get(way, ()) for way in ("encode", "decode"))]
        for direction in ("encode", "decode"):
            where = f"{part['model']} {direction}, beyond"
            large = [row for row in whole if row["megapixels"] >= 3.9]
            if len(large) > 1:
                peaks = [row[direction]["beyond_latents_mib"] for row in large]
                paces = [row[direction]["seconds"] / row["megapixels"] for row in large]
                if all(peaks):
                    hold(f"{where}: memory, largest over smallest of 4 MP and more", max(peaks) / min(peaks), 1.05)
                hold(f"{where}: s/MP, largest over smallest of 4 MP and more", max(paces) / min(paces), 1.1)
            for row in whole:
                allowed = [part["settings"][of] for of in ("device_budget_mib", "ram_budget_mib")]
                if row is whole[-1] and None not in allowed:
                    peak = row[direction]["beyond_latents_mib"]
                    hold(f"{where}: MiB at {row['megapixels']:.0f} MP, of the budgets", peak, sum(allowed))
                if part["dtype"] == "float32":
                    hold(f"{where}: two tile sizes, of range", row.get(f"{direction}_difference"), 1e-4)
    return found


def number(value: float | None, digits: int = 2) -> str:
    """A figure with so many digits that count."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if abs(value) < 0.01 else f"{value:.{digits}f}"


def render(figures: dict[str, Any]) -> str:
    """The tables."""
    parts = [f"{figures['environment']}"]
    for entry in figures["compare"]:
        unit = "8-bit levels" if entry["direction"] == "decode" else "standard deviations of the latents"
        title = f"{entry['class']} ({entry['model']}), {entry['direction']}, {entry['side_px']} x {entry['side_px']}, "
        parts.append(f"{title}{entry['dtype']}, {entry['rounds']} rounds; errors in {unit}")
        header = ["way", "max error", "mean error", "tone spread", "time", "time ratio", "CPU ratio", "peak MiB", ""]
        parts.append(table(header, [_way_row(name, way) for name, way in entry["ways"].items()]))
    if figures["half"]:
        header = ["model", "dtype", "direction", "untiled rms (max)", "exact rms (max)", "ratio rms (max)"]
        rows = [
            [
                entry["model"],
                entry["dtype"],
                f"{entry['direction']}, {entry['side_px']} px",
                *(f"{number(entry[way]['rms'])} ({number(entry[way]['max'])})" for way in ("untiled", "exact")),
                f"{entry['ratio']['rms']:.2f} ({entry['ratio']['max']:.2f})",
            ]
            for entry in figures["half"]
        ]
        parts += ["Half precision: distance to untiled float32", table(header, rows)]
    done = [entry for entry in figures["frame"] if "exact" in entry]
    if done:
        header = ["class", "direction", "error of range", "stock", "exact", "times faster"]
        rows = [
            [
                entry["class"],
                f"{entry['direction']}, {entry['side_px']} px",
                number(entry["error"]["max_of_range"]),
                f"{entry['stock']['seconds']:.2f} s",
                f"{entry['exact']['seconds']:.2f} s",
                number(1 / entry["exact"]["time_ratio"]),
            ]
            for entry in done
        ]
        parts += ["One frame through a video autoencoder", table(header, rows)]
    parts += [f"{entry['class']}: {entry['skipped']}" for entry in figures["frame"] if "skipped" in entry]
    parts += [text for part in figures["beyond"] for text in _render_beyond(part)]
    if figures["bars"]:
        rows = [
            [bar["what"], bar["bar"], number(bar["value"]), "yes" if bar["met"] else "NO"] for bar in figures["bars"]
        ]
        parts.append(table(["what must hold", "bar", "here", "met"], rows))
    return "\n\n".join(parts)


def _way_row(name: str, way: dict[str, Any]) -> list[str]:
    if "failed" in way:
        return [name, *("-" for _ in range(7)), way["failed"]]
    error, peak = way.get("error"), way.get("peak_mib")
    tone = "-" if error is None else f"{number(error['tone_deviation'])} ({number(error['tone_peak_to_peak'])})"
    notes = list[str]()
    if "plan" in way:
        plan = way["plan"]
        kept = f"{plan['keeps']} kept, {plan['passes']} passes" if plan["passes"] > 1 else "one pass"
        notes.append(f"{kept}, predicted {plan['seconds']:.1f} s")
    notes += [f"residual {way['residual']:.1e}"] if "residual" in way else []
    notes += [f"attention error {way['attention_error']:.1e}"] if "attention_error" in way else []
    return [
        name,
        *("-" if error is None else number(error[of]) for of in ("max", "mean")),
        tone,
        f"{way['seconds']:.2f} s",
        number(way["time_ratio"]),
        number(way["cpu_ratio"]),
        "-" if peak is None else f"{peak:.0f}",
        "; ".join(notes),
    ]


def _render_beyond(part: dict[str, Any]) -> Iterator[str]:
    settings = {name: value for name, value in part["settings"].items() if value is not None and name != "tile"}
    yield f"Beyond untiled: {part['model']}, {part['dtype']}, {settings}"
    rows = list[list[str]]()
    for row in part["sizes"]:
        for direction in ("encode", "decode"):
            found = row.get(direction, {"failed": "not run"})
            size = f"{row['megapixels']:.1f} MP, {row['size_px'][1]} x {row['size_px'][0]}"
            need = part["untiled_mib_per_megapixel"][direction]
            untiled = "-" if need is None else f"{need * row['megapixels']:.0f}"
            if "failed" in found:
                rows.append([size, direction, found["failed"], *("-" for _ in range(5)), untiled])
                continue
            difference = row.get(f"{direction}_difference")
            peak, plan = found["beyond_latents_mib"], found["plan"]
            rows.append(
                [
                    size,
                    direction,
                    f"{found['seconds']:.1f} s",
                    f"{found['seconds'] / row['megapixels']:.2f}",
                    f"{found['cpu_seconds'] / row['megapixels']:.2f}",
                    "-" if peak is None else f"{peak:.0f}",
                    f"{plan['window_mib']:.0f} + {plan['ram_mib'] + plan['device_map_mib']:.0f}",
                    number(difference),
                    untiled,
                ]
            )
    header = ["frame", "direction", "time", "s/MP", "CPU s/MP", "peak MiB beyond latents", "planned, windows + maps"]
    yield table([*header, "two tile sizes, of range", "untiled would take, MiB"], rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write the JSON."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    quiet()
    figures: dict[str, Any] = {"compare": [], "half": [], "frame": [], "beyond": []}
    with tempfile.TemporaryDirectory(prefix="bench-vae-", dir=options.scratch) as folder:
        scratch = Path(folder)
        if "compare" in options.parts:
            for name in options.models:
                figures["compare"] += measure_compare(name, _side(name, options), scratch, options)
        if "half" in options.parts:
            for name in options.models:
                figures["half"] += measure_half(name, options.half_side, scratch, options)
        if "frame" in options.parts:
            for name, kind in VIDEO.items():
                if kind in supported_vaes():
                    figures["frame"] += measure_frame(name, options.frame_side, scratch, options)
                else:
                    figures["frame"].append({"class": kind, "skipped": "not supported yet, left out"})
        if options.beyond:
            figures["beyond"] = [measure_beyond(name, scratch, options) for name in options.beyond_models]
    given = {name: value for name, value in vars(options).items() if name != "json"}
    device = torch.device(options.device)
    figures = {
        "environment": environment(device, getattr(torch, options.dtype)),
        "settings": json.loads(json.dumps(given, default=str)),
        **figures,
        "bars": bars(figures),
    }
    print(render(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _side(name: str, options: argparse.Namespace) -> int:
    if options.side is not None:
        return options.side
    sides = SIDES[torch.device(options.device).type]
    return sides.get(name, sides["sd"]) // (4 if options.quick else 1) * (2 if options.quick and name == "sd" else 1)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference", "sd"], help="reference, sd, or folders of models")
    parser.add_argument(
        "--parts", nargs="*", default=["compare", "half", "frame"], choices=["compare", "half", "frame"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--side", type=int, help="side of the frame in part 1, for every model")
    parser.add_argument("--half-side", type=int, help="side of the frame in half precision")
    parser.add_argument("--frame-side", type=int, default=256, help="side of the frame in the video autoencoders")
    parser.add_argument(
        "--channels", type=int, default=128, help='of the model "sd" at full resolution; 128 is its own'
    )
    parser.add_argument("--video-channels", type=int, default=32, help="base channels of the video autoencoders")
    parser.add_argument("--tile", type=int, help="of the exact ways in part 1; as exact_vae chooses by default")
    parser.add_argument("--ram-shares", type=float, nargs="*", default=[0.5], help="of the maps, to recompute the rest")
    parser.add_argument("--key-divisor", type=int, default=16, help="attend to one in so many positions")
    parser.add_argument(
        "--ways", nargs="*", help="only untiled, exact, and those whose names begin with these, in part 1"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds at most")
    parser.add_argument("--patience", type=float, default=16, help="seconds for the untiled passes of all rounds")
    parser.add_argument("--beyond", type=float, nargs="*", help="megapixels; 1 4 16 40 if none are given")
    parser.add_argument("--beyond-models", nargs="+", default=["reference"])
    parser.add_argument("--beyond-mode", default="exact", choices=["exact", "sampled"])
    parser.add_argument(
        "--tiles", type=int, nargs="+", default=[256, 160], help="beyond; the second at the largest size"
    )
    parser.add_argument("--attention-keys", type=int, help="beyond")
    parser.add_argument("--device-budget-mib", type=float, help="beyond; 256 on a CPU")
    parser.add_argument("--ram-budget-mib", type=float, help="beyond; 256 on a CPU")
    parser.add_argument("--spill-budget-mib", type=float, default=0, help="beyond")
    parser.add_argument("--spill-dir", help="for maps on disk")
    parser.add_argument("--scratch", help="folder for what is passed between processes")
    parser.add_argument("--same-process", action="store_true", help="start no processes; memory is then less exact")
    parser.add_argument("--quick", action="store_true", help="small frames and a narrow model, about a minute")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    if options.quick:
        options.channels, options.video_channels, options.frame_side = 32, 16, 64
        options.patience = min(options.patience, 1)
    if options.half_side is None:
        options.half_side = (64 if options.quick else 128) if on_cpu else 1024
    if options.beyond is not None:
        options.beyond = sorted(options.beyond) or [1, 4, 16, 40]
    if on_cpu:
        options.device_budget_mib = options.device_budget_mib or 256
        options.ram_budget_mib = options.ram_budget_mib or 256
    return options


if __name__ == "__main__":
    main()
