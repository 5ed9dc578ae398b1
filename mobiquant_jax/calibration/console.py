"""Progress of a calibration, a line a block, for a terminal or a log file."""

import sys
import time

from mobiquant_jax.calibration.block import BlockReport


def clock(seconds: float) -> str:
    """Minutes and seconds, hours where there are any: ``3:07``, ``1:02:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ConsoleObserver:
    """Prints one line a finished block and, on a terminal, the epoch in hand.

    Args:
        peak_flops: operations a second that all devices can do at best, or None; blocks then say which share of them
            their training was.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self._peak_flops = peak_flops
        self._blocks = 0
        self._trained = 0
        self._start = time.perf_counter()

    def on_start(self, blocks: int, resumed: int) -> None:
        """See `Observer`."""
        self._blocks, self._start = blocks, time.perf_counter()
        if resumed:
            following = f"continuing with block {resumed + 1}" if resumed < blocks else "none is left to train"
            print(f"{resumed} of {blocks} blocks are on disk already; {following}", flush=True)

    def on_damaged(self, reason: str) -> None:
        """See `Observer`."""
        print(f"{reason}; it is computed again", flush=True)

    def on_epoch(self, block: int, stage: str, epoch: int, epochs: int, error: float) -> None:
        """See `Observer`."""
        if sys.stdout.isatty():
            line = f"block {block + 1:2d}/{self._blocks}  {stage} {epoch}/{epochs}  error {error:.3g}"
            print(f"\r\x1b[K{line}", end="", flush=True)

    def on_block(self, block: int, report: BlockReport, seconds: float) -> None:
        """See `Observer`."""
        self._trained += 1
        elapsed = time.perf_counter() - self._start
        left = (self._blocks - block - 1) * elapsed / self._trained
        erase = "\r\x1b[K" if sys.stdout.isatty() else ""
        share = f"  MFU {report.flops / seconds / self._peak_flops:.1%}" if self._peak_flops else ""
        print(
            f"{erase}block {block + 1:2d}/{self._blocks}  error {report.before:.3g} -> {report.after:.3g}  "
            f"{report.bits:.2f} bits  {seconds:.1f} s{share}  |  {clock(elapsed)} done, {clock(left)} left",
            flush=True,
        )
        if report.note:
            print(f"  block {block + 1}: {report.note}", flush=True)

    def on_generated(self, done: int, total: int) -> None:
        """See `Observer`."""
        if sys.stdout.isatty() or done == total:
            erase, end = ("\r\x1b[K", "\n" if done == total else "") if sys.stdout.isatty() else ("", "\n")
            print(f"{erase}calibration text by the model itself: {done} of {total}", end=end, flush=True)

    def on_tuned(self, stage: str, epoch: int, epochs: int, divergence: float, healthy: bool, seconds: float) -> None:
        """See `Observer`."""
        note = "" if healthy else "  (steps that were not finite were left out)"
        left = clock((epochs - epoch) * seconds)
        print(
            f"{stage} {epoch}/{epochs}  divergence {divergence:.4f}  {seconds:.1f} s  |  {left} left{note}",
            flush=True,
        )

    def on_fitted(self, epoch: int, epochs: int, healthy: bool, seconds: float) -> None:
        """See `Observer`."""
        note = "" if healthy else "  (steps that were not finite were left out)"
        print(
            f"routers {epoch}/{epochs}  {seconds:.1f} s  |  {clock((epochs - epoch) * seconds)} left{note}", flush=True
        )

    def on_budget(self, bits: float, left: int) -> None:
        """See `Observer`."""
        if sys.stdout.isatty():
            print(f"\r\x1b[Krecording thresholds: {bits:g} bits", end="" if left else "\n", flush=True)
