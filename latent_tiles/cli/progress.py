"""The progress bar: tiles done over all steps, the step, and the time left."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_tiles.pipelines.report import Progress


class TileBar:
    """A bar on stderr that a pipeline call reports to.

    Args:
        shown: draw it; otherwise reports are taken and nothing is drawn.
    """

    def __init__(self, *, shown: bool) -> None:
        from tqdm import tqdm

        # The total is known with the first report; until then the image is being encoded.
        self._bar: Any = tqdm(
            desc="encoding", unit="tile", total=0, disable=not shown, file=sys.stderr, leave=False, dynamic_ncols=True
        )
        self._started = False

    def __enter__(self) -> TileBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Take a report of the call."""
        if not self._started:
            self._started = True
            # The time left is the denoiser's; encoding would spoil its rate.
            self._bar.reset(total=progress.tiles_total)
        self._bar.total = progress.tiles_total
        last = progress.tiles >= progress.tiles_total
        self._bar.set_description_str("decoding" if last else "denoising", refresh=False)
        self._bar.set_postfix_str(f"step {progress.step}/{progress.steps}", refresh=False)
        self._bar.update(progress.tiles - self._bar.n)
        if last:
            self._bar.refresh()
