"""Calibration of a whole model, block by block, over a full-precision and a quantized activation stream.

Order on ``resume``: the folder's blocks are read instead of trained, as far as they follow one another; streams are
recomputed through them, so a resumed run continues with the very numbers of an uninterrupted one.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.calibration.block import BlockReport, BlockTrainer
from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.end_to_end import EndToEndTrainer
from mobiquant_jax.calibration.generated import write_windows
from mobiquant_jax.calibration.linears import Params
from mobiquant_jax.calibration.run_dir import RunDir
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.calibration.thresholds import record_thresholds
from mobiquant_jax.io.checkpoint import load_tree, save_tree
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel, Variables


class Observer(Protocol):
    """Is told how calibration goes."""

    def on_start(self, blocks: int, resumed: int) -> None:
        """``resumed`` of the ``blocks`` are on disk already."""

    def on_epoch(self, block: int, stage: str, epoch: int, epochs: int, error: float) -> None:
        """An epoch of a block is done."""

    def on_block(self, block: int, report: BlockReport, seconds: float) -> None:
        """A block is trained and saved."""

    def on_generated(self, done: int, total: int) -> None:
        """So many texts of the unquantized model are written."""

    def on_tuned(self, epoch: int, epochs: int, divergence: float, healthy: bool, seconds: float) -> None:
        """An epoch of end-to-end tuning is done; ``healthy`` unless a step was not finite and left out."""

    def on_budget(self, bits: float) -> None:
        """The thresholds for these average bits are recorded."""


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """Calibrates one model.

    Attributes:
        config: architecture.
        elastic: slicing and routing.
        calibration: the recipe.
        run: where finished blocks go.
        observer: is told of progress.
    """

    config: LlamaConfig
    elastic: ElasticConfig
    calibration: CalibrationConfig
    run: RunDir
    observer: Observer

    def calibrate(self, params: Params, windows: Int[np.ndarray, "W T"]) -> Variables:
        """Runs, or continues, a calibration.

        Args:
            params: the dense model's parameters; host arrays are fine, a block goes to the device at its turn.
            windows: calibration tokens.

        Returns:
            The elastic model's variables, thresholds recorded.

        Raises:
            ValueError: windows that do not fit the recipe, budgets that do not fit the slices, or a group size that
                does not fit the model.
        """
        cal = self.calibration
        if windows.shape != (cal.windows, cal.window_length):
            raise ValueError(f"windows {windows.shape} are not the recipe's {(cal.windows, cal.window_length)}")
        cal.check_slices(self.elastic.slice_bits)
        self.elastic.check_model(self.config)
        samples = Samples.create(cal)
        trainer = BlockTrainer(
            config=self.config, elastic=self.elastic, calibration=cal, samples=samples, dtype=jnp.dtype(cal.dtype)
        )
        full = self._embed(params, windows)
        quantized = full[samples.window]
        done = self._finished_blocks()
        self.observer.on_start(self.config.num_hidden_layers, done)
        for index in range(self.config.num_hidden_layers):
            dense = jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index]), params["layers"])
            target = trainer.dense_block(dense, full)
            if index < done:
                trained = load_tree(self.run.block(index), trainer.abstract_params(dense))
            else:
                trained = self._train_block(trainer, dense, quantized, target, index)
            quantized = trainer.packed_block(trainer.pack(trained), quantized)
            full = target
        del full, quantized
        layers = self._read_blocks(trainer, params) if not cal.end_epochs else self._tune(trainer, params, windows)
        return self._finish(params, layers, windows)

    def _embed(self, params: Params, windows: Int[np.ndarray, "W T"]) -> Float[Array, "W T D"]:
        embed: Callable[..., Any] = jax.jit(lambda p, tokens: Llama(self.config).apply(p, tokens, method="embed"))
        return embed({"params": {"embedder": params["embedder"]}}, jnp.asarray(windows))

    def _finished_blocks(self) -> int:
        """How many blocks from the first one on are on disk; orbax renames a block into place when it is complete."""
        count = 0
        while count < self.config.num_hidden_layers and self.run.block(count).is_dir():
            count += 1
        return count

    def _train_block(self, trainer: BlockTrainer, dense: Params, quantized: Array, target: Array, index: int) -> Params:
        start = time.perf_counter()

        def on_epoch(stage: str, epoch: int, epochs: int, error: float) -> None:
            self.observer.on_epoch(index, stage, epoch, epochs, error)

        trained, report = trainer.train(dense, quantized, target, index, on_epoch)
        save_tree(self.run.block(index), trained)
        seconds = time.perf_counter() - start
        self.run.log(
            {
                "block": index,
                "before": report.before,
                "after": report.after,
                "bits": report.bits,
                "seconds": round(seconds, 3),
                "note": report.note,
            }
        )
        self.observer.on_block(index, report, seconds)
        return trained

    def _read_blocks(self, trainer: BlockTrainer, params: Params) -> Params:
        """The packed blocks, stacked on the host; one block at a time is on the device."""
        packed = (jax.device_get(trainer.pack(trained)) for trained in self._trained_blocks(trainer, params))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)

    def _trained_blocks(self, trainer: BlockTrainer, params: Params) -> Iterator[Params]:
        like = trainer.abstract_params(jax.tree.map(lambda leaf: leaf[0], params["layers"]))
        for index in range(self.config.num_hidden_layers):
            yield load_tree(self.run.block(index), like)

    def _tune(self, trainer: BlockTrainer, params: Params, windows: Int[np.ndarray, "W T"]) -> Params:
        """End-to-end tuning from the trained blocks; the state is saved now and then and the one before it removed."""
        cal = self.calibration
        tuner = EndToEndTrainer(
            config=self.config,
            elastic=self.elastic,
            calibration=cal,
            windows=windows,
            generated=self._generated(params, windows),
            dtype=jnp.dtype(cal.dtype),
        )
        blocks = [jax.device_get(block) for block in self._trained_blocks(trainer, params)]
        state = tuner.init(jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *blocks))
        first = self.run.tuned_epochs()
        if first:
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
            state = load_tree(self.run.tuned(first), like)
        dense = jax.tree.map(jnp.asarray, params)
        saved, saved_at = first, time.perf_counter()
        for epoch in range(first, cal.end_epochs):
            start = time.perf_counter()
            state, divergence, healthy = tuner.epoch(state, dense, epoch)
            if time.perf_counter() - saved_at >= cal.end_save_seconds:
                save_tree(self.run.tuned(epoch + 1), state)
                self.run.remove_tuned(saved)
                saved, saved_at = epoch + 1, time.perf_counter()
            seconds = time.perf_counter() - start
            self.run.log({"epoch": epoch, "divergence": divergence, "healthy": healthy, "seconds": round(seconds, 3)})
            self.observer.on_tuned(epoch + 1, cal.end_epochs, divergence, healthy, seconds)
        return jax.vmap(trainer.pack)(state.params)

    def _generated(self, params: Params, windows: Int[np.ndarray, "W T"]) -> Int[np.ndarray, "G T"]:
        """The windows that the unquantized model wrote: those of the run's folder, so that it resumes with the same."""
        cal = self.calibration
        if not cal.end_generated_windows:
            return windows[:0]
        if not self.run.generated.is_file():
            self.run.save_generated(
                write_windows(
                    self.config,
                    params,
                    windows,
                    cal.end_generated_windows,
                    seed=cal.seed,
                    dtype=jnp.dtype(cal.dtype),
                    progress=self.observer.on_generated,
                )
            )
        return np.load(self.run.generated)

    def _finish(self, params: Params, layers: Params, windows: Int[np.ndarray, "W T"]) -> Variables:
        """Puts the untouched parts around the packed layers and records thresholds."""
        around = {name: jax.tree.map(jnp.asarray, part) for name, part in params.items() if name != "layers"}
        layers = jax.tree.map(jnp.asarray, layers)
        variables: Variables = {
            "params": {**around, "layers": layers["params"]},
            "slices": {"layers": layers["slices"]},
            "routing": {"layers": layers["routing"]},
        }
        model = ElasticModel(config=self.config, elastic=self.elastic, variables=variables)
        chosen = windows[:: len(windows) // self.calibration.threshold_windows][: self.calibration.threshold_windows]
        return record_thresholds(model, chosen, self.calibration.threshold_scope, self.observer.on_budget)
