"""Calibration of a whole model, block by block, over a full-precision and a quantized activation stream.

All of it lies on one mesh. The streams are split over its batch axes: a device, and so a process, holds and computes
its own windows. In the devices' memory are one block and its optimizer, the next block's weights, which are read while
this one trains, and both streams or, where ``calibration.streams`` keeps those on the host, two batches of them. A
trained block is written while the streams go through it and through the next full-precision one. What follows the
blocks (`model_stages`) needs the whole model there.

Order on ``resume``: the folder's blocks and channel scales are read instead of trained and found, all but blocks that
are damaged; streams are recomputed through them, so a resumed run continues with the very numbers of an uninterrupted
one. Where all blocks are there, no stream is needed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from mobiquant_jax import distributed
from mobiquant_jax.calibration.block import BlockTrainer, Stream
from mobiquant_jax.calibration.channel_scales import ChannelScales, find_scales, fold, stack_scales
from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.epochs import load_or_remove
from mobiquant_jax.calibration.host_block import HostBlockTrainer
from mobiquant_jax.calibration.linears import Params
from mobiquant_jax.calibration.model_stages import ModelStages
from mobiquant_jax.calibration.observer import Observer
from mobiquant_jax.calibration.read_ahead import read_ahead
from mobiquant_jax.calibration.run_dir import RunDir
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.calibration.stacking import stack_blocks
from mobiquant_jax.calibration.write_behind import WriteBehind
from mobiquant_jax.io import layer
from mobiquant_jax.io.checkpoint import load_tree, save_tree
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, Variables
from mobiquant_jax.sharding import Placement, one_device

SCALE_WINDOWS = 16  # on which a block's channel scales are found, or as near as devices hold equal parts of
_TRAINERS = {"device": BlockTrainer, "host": HostBlockTrainer}  # by where the streams are kept


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """Calibrates one model; several processes do it together.

    Attributes:
        config: architecture.
        elastic: slicing and routing.
        calibration: the recipe.
        run: where finished blocks go.
        observer: is told of progress.
        mesh: the devices.
        profile_block: number of a block, from 0, whose training is traced into the run's folder; None for none.
    """

    config: LlamaConfig
    elastic: ElasticConfig
    calibration: CalibrationConfig
    run: RunDir
    observer: Observer
    mesh: Mesh = field(default_factory=one_device)
    profile_block: int | None = None

    @cached_property
    def placement(self) -> Placement:
        """Where every array lies."""
        return Placement.create(self.mesh, self.config, self.elastic)

    def calibrate(self, params: Params, windows: Int[np.ndarray, "W T"]) -> Variables:
        """Runs, or continues, a calibration.

        Args:
            params: the dense model's parameters on the host; a block goes to its devices at its turn.
            windows: calibration tokens, all of them in every process.

        Returns:
            The elastic model's variables on the mesh, thresholds recorded.

        Raises:
            ValueError: windows that do not fit the recipe, budgets that do not fit the slices, or a group size or a
                mesh that does not fit the model or the batch.
        """
        cal = self.calibration
        if windows.shape != (cal.windows, cal.window_length):
            raise ValueError(f"windows {windows.shape} are not the recipe's {(cal.windows, cal.window_length)}")
        cal.check_slices(self.elastic.slice_bits, self.elastic.budget_grid)
        self.elastic.check_model(self.config)
        self.placement.check(**cal.batches)
        with jax.set_mesh(self.mesh):
            trainer = _block_trainer(self.config, self.elastic, cal, self.mesh)
            self._train_blocks(trainer, params, windows)
            stages = ModelStages(
                config=self.config,
                elastic=self.elastic,
                calibration=cal,
                run=self.run,
                observer=self.observer,
                mesh=self.mesh,
                windows=windows,
            )
            if cal.distils_coarse or cal.has_finer_slices:
                layers = self._tune(trainer, params, stages)
            else:
                layers = self._packed_blocks(trainer)
            around = {name: part for name, part in params.items() if name != "layers"}
            return stages.finish(self.placement.put(around), layers)

    def _train_blocks(self, trainer: BlockTrainer, params: Params, windows: Int[np.ndarray, "W T"]) -> None:
        """Brings the run's folder to hold every block."""
        done = self._finished_blocks()
        self.observer.on_start(self.config.num_hidden_layers, done)
        scales = self._load_scales()
        if self._all_there(trainer, done, scales):
            return
        embedder = self.placement.put({"embedder": params["embedder"]})
        full = trainer.embed(embedder, windows)
        quantized = trainer.embed(embedder, windows[trainer.samples.window])
        del embedder

        def read(index: int) -> Params:
            return self.placement.put(jax.tree.map(lambda leaf: layer(leaf, index), params["layers"]))

        with WriteBehind() as behind:
            for index, dense in enumerate(read_ahead(read, self.config.num_hidden_layers)):
                if self.calibration.scale_width:
                    dense = self._scaled(dense, full, index, scales)
                target = trainer.dense_block(dense, full)
                trained = self._load_block(trainer, index)
                if trained is None:
                    trained = self._train_block(trainer, dense, quantized, target, index, behind)
                quantized = trainer.packed_block(trainer.pack(trained), quantized)
                full = target

    def _all_there(self, trainer: BlockTrainer, done: int, scales: list[ChannelScales]) -> bool:
        """Whether nothing is left to train or to find; blocks that are damaged are removed."""
        count = self.config.num_hidden_layers
        if done < count or (self.calibration.scale_width and len(scales) < count):
            return False
        return all(self._load_block(trainer, index) is not None for index in range(count))

    def _load_block(self, trainer: BlockTrainer, index: int) -> Params | None:
        """A block that was trained; None where there is none, or where it was damaged and is removed."""
        return load_or_remove(self.run, self.run.block(index), trainer.abstract_trained, self.observer.on_damaged)

    def _load_scales(self) -> list[ChannelScales]:
        """Channel scales on disk, as many as process 0 sees."""
        scales = self.run.load_scales()
        known = distributed.from_main(len(scales))
        if len(scales) < known:
            raise ValueError(f"'{self.run.scales}' is another file here than it is to process 0")
        return scales[:known]

    def _scaled(self, dense: Params, stream: Stream, index: int, scales: list[ChannelScales]) -> Params:
        """The dense block, which the stream enters, with its channels scaled; its buffers are donated.

        The scales are found where there are none, and are on disk before anything that depends on them.
        """
        if index >= len(scales):
            shards = self.placement.batch_shards
            some = stream[: max(SCALE_WINDOWS // shards, 1) * shards]
            some = self.placement.put_batch(some) if isinstance(some, np.ndarray) else some
            scales.append(jax.device_get(self._find_scales(dense, some)))
            if not all(np.isfinite(leaf).all() for leaf in scales[index]):
                raise ValueError(f"the unquantized model's activations in block {index} are not finite")
            distributed.on_main(f"saving '{self.run.scales}'", partial(self.run.save_scales, scales))
        return self._fold_block(dense, self.placement.put_whole(scales[index]))

    @cached_property
    def _find_scales(self) -> Callable[[Params, Any], ChannelScales]:
        find = partial(
            find_scales,
            self.config,
            group_size=self.elastic.group_size,
            width=self.calibration.scale_width,
            at_once=self.placement.batch_shards,
        )
        return jax.jit(find, out_shardings=self.placement.replicated)

    @cached_property
    def _fold_block(self) -> Callable[[Params, ChannelScales], Params]:
        return jax.jit(self._folded, donate_argnums=0)

    def _folded(self, dense: Params, scales: ChannelScales) -> Params:
        return jax.lax.with_sharding_constraint(fold(dense, scales), self.placement.shardings(dense))

    def _finished_blocks(self) -> int:
        """How many blocks from the first one on are on disk; orbax renames a block into place when it is complete."""
        count = 0
        while count < self.config.num_hidden_layers and self.run.block(count).is_dir():
            count += 1
        return distributed.from_main(count)

    def _train_block(
        self, trainer: BlockTrainer, dense: Params, quantized: Stream, target: Stream, index: int, behind: WriteBehind
    ) -> Params:
        behind.wait()  # for the block before: a kill costs no more than the one in hand
        start = time.perf_counter()

        def on_epoch(stage: str, epoch: int, epochs: int, error: float) -> None:
            self.observer.on_epoch(index, stage, epoch, epochs, error)

        traced = index == self.profile_block
        with jax.profiler.trace(str(self.run.profile)) if traced else contextlib.nullcontext():
            trained, report = trainer.train(dense, quantized, target, index, on_epoch)
        seconds = time.perf_counter() - start
        record = {
            "block": index,
            "before": report.before,
            "after": report.after,
            "bits": report.bits,
            "seconds": round(seconds, 3),
            "flops": report.flops,
            "note": report.note,
        }

        def report_it() -> None:
            self.run.log(record)
            self.observer.on_block(index, report, seconds)

        behind.submit(partial(save_tree, self.run.block(index), trained), report_it)
        return trained

    def _trained_blocks(self, trainer: BlockTrainer) -> Iterator[Params]:
        for index in range(self.config.num_hidden_layers):
            yield load_tree(self.run.block(index), trainer.abstract_trained)

    def _packed_blocks(self, trainer: BlockTrainer) -> Params:
        packed = (trainer.pack(trained) for trained in self._trained_blocks(trainer))
        return stack_blocks(packed, self.config.num_hidden_layers, self.placement)

    def _tune(self, trainer: BlockTrainer, params: Params, stages: ModelStages) -> Params:
        """The packed layers after the stages that train them as a whole."""
        dense = self.placement.put(params)

        def trained() -> Params:
            return stack_blocks(self._trained_blocks(trainer), self.config.num_hidden_layers, self.placement)

        def scaled() -> Params:
            if not self.calibration.scale_width:
                return dense["layers"]
            scales = self.placement.put_whole(stack_scales(self._load_scales()))
            return jax.jit(self._folded)(dense["layers"], scales)

        return stages.tune(dense, trained=trained, packed=partial(self._packed_blocks, trainer), scaled=scaled)


@lru_cache(maxsize=8)
def _block_trainer(
    config: LlamaConfig, elastic: ElasticConfig, calibration: CalibrationConfig, mesh: Mesh
) -> BlockTrainer:
    """One for all runs of a process with these settings, as in a notebook: none compiles again what another one has.

    It has no state but its programs.
    """
    return _TRAINERS[calibration.streams](
        config=config,
        elastic=elastic,
        calibration=calibration,
        samples=Samples.create(calibration),
        dtype=jnp.dtype(calibration.dtype),
        mesh=mesh,
    )
