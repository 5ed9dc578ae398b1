"""Who is told how a calibration goes."""

from typing import Protocol

from mobiquant_jax.calibration.block import BlockReport


class Observer(Protocol):
    """Is told how calibration goes."""

    def on_start(self, blocks: int, resumed: int) -> None:
        """``resumed`` of the ``blocks`` are on disk already."""

    def on_damaged(self, reason: str) -> None:
        """A block or the state of a later stage on disk is damaged; it is computed again."""

    def on_epoch(self, block: int, stage: str, epoch: int, epochs: int, error: float) -> None:
        """An epoch of a block is done."""

    def on_block(self, block: int, report: BlockReport, seconds: float) -> None:
        """A block is trained and saved."""

    def on_generated(self, done: int, total: int) -> None:
        """So many texts of the unquantized model are written."""

    def on_tuned(self, stage: str, epoch: int, epochs: int, divergence: float, healthy: bool, seconds: float) -> None:
        """An epoch of tuning, routed too or of slices alone, is done; ``healthy`` unless a step was left out."""

    def on_fitted(self, epoch: int, epochs: int, healthy: bool, seconds: float) -> None:
        """An epoch of fitting the routers is done; ``healthy`` as above."""

    def on_budget(self, bits: float, left: int) -> None:
        """The thresholds for these average bits are recorded; ``left`` more averages are to come."""
