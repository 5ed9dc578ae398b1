"""The numbers of ``metrics.jsonl`` as TensorBoard reads them; needs the optional package tensorboardX."""

import importlib.util
from pathlib import Path
from typing import Any


def check_installed() -> None:
    """Raises ValueError unless tensorboardX is installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("--tensorboard needs tensorboardX: pip install 'mobiquant_jax[tensorboard]'")


class EventFile:
    """An event file of scalars; a run that is resumed adds another one beside it.

    The last seconds before a kill may be missing from it: they are in ``metrics.jsonl``.

    Args:
        folder: is made with the first record.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """Writes a line of ``metrics.jsonl``.

        Args:
            record: its first entry, such as ``"block"``, is the step; the numbers after it are curves of
                their own, ``"block/before"`` and so on.
        """
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), flush_secs=5)
        (kind, step), *values = record.items()
        for name, value in values:
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", float(value), step)

    def close(self) -> None:
        """Completes the file; the end of the process does so too."""
        if self._writer is not None:
            self._writer.close()
