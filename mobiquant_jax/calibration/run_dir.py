"""The folder of a calibration run: what was asked for, the finished blocks, and what came out.

Several processes see the same folder. Process 0 alone makes and removes things in it, but for the parts of a saved
tree, which each process writes of its own devices.

run.json       config, fingerprints of model and data, provenance
generated.npy  windows that the unquantized model wrote, where the recipe wants some
scales.npz     channel scales of the blocks so far, likewise
thresholds.npy budgets that routed tuning trains at, and their thresholds, likewise
blocks/NNN/    each finished block, until the checkpoint is complete
tuning/NNN/    the last saved state of end-to-end tuning, until then too
routed/NNN/    that of tuning weights and routers together
slice/W/NNN/   that of tuning the slice alone that completes W bits
fine/NNN/      that of tuning the finer slices
router/NNN/    that of fitting the routers
metrics.jsonl  a line a block, then one an epoch of the stages after them, each with process 0's peak memory so far
events/        the same for TensorBoard, where it was asked for
profile/       the trace of a block, where one was asked for
checkpoint/    the elastic checkpoint
"""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Int

from mobiquant_jax import distributed
from mobiquant_jax.calibration.channel_scales import ChannelScales, stack_scales
from mobiquant_jax.calibration.event_file import EventFile, check_installed
from mobiquant_jax.files import read_json_object, whole_file
from mobiquant_jax.provenance import peak_memory

STAGES = (TUNING, ROUTED, SLICE, FINE, ROUTER) = ("tuning", "routed", "slice", "fine", "router")
"""What follows the blocks, over the whole model; folders of their states."""

_IDENTITY = ("config", "model", "data")


@dataclass(frozen=True, kw_only=True)
class RunDir:
    """Paths of a run.

    Attributes:
        path: the folder.
        events: gets the metrics too, or None.
        continued: whether another process began the run.
    """

    path: Path
    events: EventFile | None = field(default=None, compare=False)
    continued: bool = field(default=False, compare=False)

    @property
    def checkpoint(self) -> Path:
        """The finished elastic checkpoint."""
        return self.path / "checkpoint"

    @property
    def blocks(self) -> Path:
        """Finished blocks, each complete or absent."""
        return self.path / "blocks"

    def block(self, index: int) -> Path:
        """The folder of one finished block."""
        return self.blocks / f"{index:03d}"

    @property
    def generated(self) -> Path:
        """The windows that the unquantized model wrote."""
        return self.path / "generated.npy"

    def save_generated(self, windows: Int[np.ndarray, "G T"]) -> None:
        """Writes them; the file appears only once it is complete."""
        _save_array(self.generated, windows)

    @property
    def scales(self) -> Path:
        """Channel scales of the first blocks."""
        return self.path / "scales.npz"

    def load_scales(self) -> list[ChannelScales]:
        """Those on disk, one a block.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.scales.is_file():
            return []
        try:
            return self._read_scales()
        except (ValueError, KeyError, OSError, BadZipFile) as error:
            raise ValueError(f"'{self.scales}' is damaged: --overwrite starts over") from error

    def _read_scales(self) -> list[ChannelScales]:
        with self.scales.open("rb") as file, np.load(file) as stacked:
            return [
                ChannelScales(*leaves)
                for leaves in zip(*(stacked[name] for name in ChannelScales._fields), strict=True)
            ]

    def save_scales(self, scales: Sequence[ChannelScales]) -> None:
        """Writes them all; the file is replaced only once the new one is complete."""
        with whole_file(self.scales) as unfinished:
            np.savez(unfinished, **stack_scales(scales)._asdict())

    @property
    def thresholds(self) -> Path:
        """Budgets of routed tuning and their thresholds."""
        return self.path / "thresholds.npy"

    def save_thresholds(self, pairs: Float[np.ndarray, "budgets 2"]) -> None:
        """Writes them; the file appears only once it is complete."""
        _save_array(self.thresholds, pairs)

    def load_thresholds(self) -> Float[np.ndarray, "budgets 2"]:
        """Those on disk.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            pairs = np.load(self.thresholds)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"'{self.thresholds}' is damaged: --overwrite starts over") from error
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind != "f":
            raise ValueError(f"'{self.thresholds}' is damaged: --overwrite starts over")
        return pairs

    @property
    def profile(self) -> Path:
        """Traces of `jax.profiler`."""
        return self.path / "profile"

    def saved(self, stage: str, epochs: int) -> Path:
        """The folder of the state after so many epochs of a stage of `STAGES`, or of a part of one."""
        return self.path / stage / f"{epochs:03d}"

    def saved_epochs(self, stage: str) -> int:
        """Epochs of a stage that are on disk, complete."""
        folder = self.path / stage
        return max(
            (int(entry.name) for entry in folder.glob("*") if entry.name.isdigit() and entry.is_dir()), default=0
        )

    def remove(self, saved: Path) -> None:
        """Removes a block or a saved state, if it is there; no process goes on before it is gone.

        Raises:
            OSError: it cannot be removed, and a run that waits for that would never end.
        """

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(saved)

        distributed.on_main(f"removing '{saved}'", remove)

    def remove_intermediate(self) -> None:
        """Frees the space of blocks and epochs, once the checkpoint is complete, and of saves that were killed."""
        if not distributed.is_main():
            return
        states = (self.path / stage for stage in STAGES)
        for folder in (self.blocks, *states, *self.path.glob(f".{self.checkpoint.name}.*")):
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to ``metrics.jsonl``, and to the event file if there is one; process 0 does.

        Its own peak memory so far is added.
        """
        if not distributed.is_main():
            return
        record = record | peak_memory()
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.events is not None:
            self.events.write(record)


def open_run(
    path: str | Path, record: dict[str, Any], *, resume: bool, overwrite: bool, tensorboard: bool = False
) -> RunDir:
    """Opens the folder of a new run, or of one to be continued; several processes call it together.

    Args:
        path: the folder.
        record: content of ``run.json``; its ``config``, ``model`` and ``data`` identify the run.
        resume: continue the run that is there, if any.
        overwrite: delete the run that is there, if any.
        tensorboard: write the metrics to an event file as well.

    Raises:
        ValueError: no path; both flags; no package that writes event files; a file, or a folder that holds something
            else; a run in the way without a flag; a damaged ``run.json``; a run of another config, model or data,
            naming what differs.
        OSError: the folder cannot be made; nothing is left behind. Any failure, where this is not process 0.
    """
    if tensorboard:
        check_installed()
    continued = resume and (Path(path) / "run.json").is_file()
    distributed.on_main(f"opening '{path}'", lambda: _open(path, record, resume=resume, overwrite=overwrite))
    events = EventFile(Path(path) / "events") if tensorboard else None
    return RunDir(path=Path(path), events=events, continued=continued)


def _open(path: str | Path, record: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    if not str(path):
        raise ValueError("run_dir is empty: give --config.run_dir=FOLDER")
    if resume and overwrite:
        raise ValueError("give one of --resume and --overwrite")
    run = RunDir(path=Path(path))
    manifest = run.path / "run.json"
    if run.path.is_file():
        raise ValueError(f"'{run.path}' is a file, not a folder: choose another run_dir")
    if not manifest.is_file() and run.path.is_dir() and any(run.path.iterdir()):
        raise ValueError(f"'{run.path}' holds files but no calibration run: choose another run_dir")
    if manifest.is_file() and not (resume or overwrite):
        raise ValueError(f"'{run.path}' holds a run: --resume continues it, --overwrite starts over")
    if manifest.is_file() and resume:
        _check_same(_read_manifest(manifest), json.loads(json.dumps(record)), run.path)
        return
    target = run.path.resolve()  # where a link leads, so that a run can lie on another disk
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        (partial / manifest.name).write_text(json.dumps(record, indent=2) + "\n")
        if target.is_dir():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_array(path: Path, array: np.ndarray) -> None:
    """Writes a ``.npy`` file, which appears only once it is complete."""
    with whole_file(path) as unfinished:
        np.save(unfinished, array)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}: --overwrite starts over") from error


def _check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    for name in _IDENTITY:
        if old.get(name) == new[name]:
            continue
        if name != "config":
            raise ValueError(f"'{path}' was calibrated with another {name}: --overwrite starts over")
        before, after = old.get("config") or {}, new["config"]
        key = next(k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k))
        raise ValueError(
            f"'{path}' was started with {key}={before.get(key)!r}, not {after.get(key)!r}: --overwrite starts over"
        )
