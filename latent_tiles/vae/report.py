"""What an exact encode or decode will cost, and what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from latent_tiles.executor.plan import Plan
from latent_tiles.executor.spill import Place

Direction = Literal["encode", "decode"]
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class VaePlan:
    """What an encode or decode will cost.

    Args:
        direction: "encode" or "decode".
        mode: "exact" or "sampled".
        input_size: height and width of the image or the latents.
        output_size: height and width of what comes out.
        keeps: which maps are kept between passes: "all", "blocks and layers", "blocks",
            "blocks, then stages", "stages", "small" or "none".
        passes: sweeps over a whole map.
        windows: windows in all passes.
        window_px: longest side of a window, in pixels of the image.
        window_mib: what windows take at the worst moment, with an allowance for what kernels take inside.
        device_map_mib: most that kept maps take on a GPU.
        ram_mib: most that kept maps take in memory.
        spill_mib: most that kept maps take on disk.
        flops: operations of all layers but attention over the whole map.
        attention_flops: operations of that.
        seconds: predicted time, from a calibration of this machine.
    """

    direction: Direction
    mode: str
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    keeps: str
    passes: int
    windows: int
    window_px: int
    window_mib: float
    device_map_mib: float
    ram_mib: float
    spill_mib: float
    flops: float
    attention_flops: float
    seconds: float

    @classmethod
    def of(cls, plan: Plan, *, direction: Direction, mode: str, inputs: int, output: int) -> VaePlan:
        """Sum up an executor's plan; `inputs` and `output` are the nodes of the image and the latents."""
        side = plan.sides[-1]
        if direction == "encode":
            # The first pass reads the image; what it makes may be coarser.
            side = plan.sides[0] * round(plan.sizes[inputs].height / plan.sizes[plan.passes[0].target].height)
        held: dict[Place, float] = {place: count / _MIB for place, count in plan.held.items()}
        return cls(
            direction=direction,
            mode=mode,
            input_size=(plan.sizes[inputs].height, plan.sizes[inputs].width),
            output_size=(plan.sizes[output].height, plan.sizes[output].width),
            keeps=plan.keeps if any(task.keeps and task.steps for task in plan.passes[:-1]) else "none",
            passes=len(plan.passes),
            windows=plan.windows,
            window_px=side,
            window_mib=plan.window_bytes / _MIB,
            device_map_mib=held.get("device", 0.0),
            ram_mib=held.get("host", 0.0),
            spill_mib=held.get("disk", 0.0),
            flops=plan.flops,
            attention_flops=plan.attention_flops,
            seconds=plan.seconds,
        )

    def __str__(self) -> str:
        """One line for a log."""
        maps = f"{self.ram_mib:.0f} MiB of maps in memory"
        maps += f", {self.device_map_mib:.0f} MiB on the device" if self.device_map_mib else ""
        maps += f", {self.spill_mib:.0f} MiB on disk" if self.spill_mib else ""
        attention = f" + {self.attention_flops / 1e12:.3g} TFLOP of attention" if self.attention_flops else ""
        return (
            f"{self.direction} of {self.input_size[0]} x {self.input_size[1]} ({self.mode}): {self.passes} passes, "
            f"{self.windows} windows of {self.window_mib:.0f} MiB, {maps} ({self.keeps} kept), "
            f"{self.flops / 1e12:.3g} TFLOP{attention}, about {self.seconds:.1f} s"
        )


@dataclass(frozen=True, kw_only=True)
class VaeReport:
    """What an encode or decode did.

    Args:
        plan: as it was planned.
        seconds: measured time.
        residual: in mode "sampled", the largest difference of the statistics used from those of the whole map, in
            standard deviations of its group of channels; None in mode "exact".
        attention_error: with `attention_keys`, the root mean square error of attention's output over that of the
            output, on some positions; None without.
    """

    plan: VaePlan
    seconds: float
    residual: float | None = None
    attention_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a sidecar."""
        return asdict(self)
