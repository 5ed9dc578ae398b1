"""Calibration of a whole model, block by block, over a full-precision and a quantized activation stream.

All of it lies on one mesh. The streams are split over its batch axes: a device, and so a process, holds and computes
its own windows. In the devices' memory are one block and its optimizer, the next block's weights, which are read while
this one trains, and both streams or, where ``calibration.streams`` keeps those on the host, two batches of them. A
trained block is written while the streams go through it and through the next full-precision one. What follows the
blocks (tuning, with routers too, or of slices alone, fitting routers, recording thresholds) needs the whole
model there.

Order on ``resume``: the folder's blocks and channel scales are read instead of trained and found, all but blocks that
are damaged; streams are recomputed through them, so a resumed run continues with the very numbers of an uninterrupted
one.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mobiquant_jax import distributed
from mobiquant_jax.calibration.block import BlockReport, BlockTrainer, Stream
from mobiquant_jax.calibration.channel_scales import ChannelScales, find_scales, fold, stack_scales
from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.distillation import Distiller, TuningState
from mobiquant_jax.calibration.end_to_end import EndToEndTrainer
from mobiquant_jax.calibration.epochs import SavedEpochs
from mobiquant_jax.calibration.generated import write_windows
from mobiquant_jax.calibration.host_block import HostBlockTrainer
from mobiquant_jax.calibration.linears import Params
from mobiquant_jax.calibration.read_ahead import read_ahead
from mobiquant_jax.calibration.routed_tuning import RoutedTrainer
from mobiquant_jax.calibration.routers import Routers, RouterState, RouterTrainer, with_routers
from mobiquant_jax.calibration.run_dir import FINE, ROUTED, ROUTER, SLICE, TUNING, RunDir
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.calibration.slice_tuning import SliceTuner
from mobiquant_jax.calibration.stacking import stack_blocks
from mobiquant_jax.calibration.thresholds import collect_scores, record_thresholds, shared_thresholds
from mobiquant_jax.calibration.tiers import lower_finer, overlap
from mobiquant_jax.calibration.write_behind import WriteBehind
from mobiquant_jax.io import layer
from mobiquant_jax.io.checkpoint import DamagedTree, load_tree, save_tree
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel, Variables
from mobiquant_jax.quant import CODE_BITS, widths
from mobiquant_jax.routing import UniformDepth
from mobiquant_jax.sharding import Placement, one_device

SCALE_WINDOWS = 16  # on which a block's channel scales are found, or as near as devices hold equal parts of


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
            trainer = _TRAINERS[cal.streams](
                config=self.config,
                elastic=self.elastic,
                calibration=cal,
                samples=Samples.create(cal),
                dtype=jnp.dtype(cal.dtype),
                mesh=self.mesh,
            )
            self._train_blocks(trainer, params, windows)
            if cal.distils_coarse or cal.has_finer_slices:
                layers = self._tune(trainer, params, windows)
            else:
                layers = self._packed_blocks(trainer)
            return self._finish(params, layers, windows)

    def _train_blocks(self, trainer: BlockTrainer, params: Params, windows: Int[np.ndarray, "W T"]) -> None:
        """Brings the run's folder to hold every block."""
        done = self._finished_blocks()
        self.observer.on_start(self.config.num_hidden_layers, done)
        embedder = self.placement.put({"embedder": params["embedder"]})
        full = trainer.embed(embedder, windows)
        quantized = trainer.embed(embedder, windows[trainer.samples.window])
        del embedder

        def read(index: int) -> Params:
            return self.placement.put(jax.tree.map(lambda leaf: layer(leaf, index), params["layers"]))

        scales = self._load_scales()
        with WriteBehind() as behind:
            for index, dense in enumerate(read_ahead(read, self.config.num_hidden_layers)):
                if self.calibration.scale_width:
                    dense = self._scaled(dense, full, index, scales)
                target = trainer.dense_block(dense, full)
                trained = self._load(self.run.block(index), trainer.abstract_trained)
                if trained is None:
                    trained = self._train_block(trainer, dense, quantized, target, index, behind)
                quantized = trainer.packed_block(trainer.pack(trained), quantized)
                full = target

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

    def _load(self, path: Path, like: Any) -> Any:
        """A saved tree, or None where there is none, or a damaged one, which is removed."""
        if not distributed.from_main(int(path.is_dir())):
            return None
        try:
            return load_tree(path, like)
        except DamagedTree as error:
            self.observer.on_damaged(str(error))
            self.run.remove(path)
            return None

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

    def _tune(self, trainer: BlockTrainer, params: Params, windows: Int[np.ndarray, "W T"]) -> Params:
        """End-to-end tuning from the trained blocks, and the finer slices on top: packed."""
        cal = self.calibration
        dense = self.placement.put(params)
        common: dict[str, Any] = dict(
            config=self.config,
            elastic=self.elastic,
            calibration=cal,
            windows=windows,
            generated=self._generated(dense, windows),
            dtype=jnp.dtype(cal.dtype),
            mesh=self.mesh,
        )
        layers = self._tune_coarse(trainer, common, dense) if cal.distils_coarse else self._packed_blocks(trainer)
        if cal.has_finer_slices:

            def original() -> Params:
                if not cal.scale_width:
                    return dense["layers"]
                scales = stack_scales(self._load_scales())
                return jax.jit(self._folded)(dense["layers"], self.placement.put_whole(scales))

            finer = tuple(width for width in widths(self.elastic.slice_bits) if width > cal.fine_above)
            fine = SliceTuner(
                **common, final_width=cal.fine_above, reads=finer, epochs=cal.fine_epochs, rate=cal.fine_lr
            )
            layers = self._tune_slices(fine, layers, original, dense, FINE, "finer slices")
        return layers

    def _tune_coarse(self, trainer: BlockTrainer, common: dict[str, Any], dense: Params) -> Params:
        """The packed layers after tuning at uniform widths, then routed, and then each slice alone."""
        cal = self.calibration
        tuner = EndToEndTrainer(**common)

        def blocks() -> Params:
            return stack_blocks(self._trained_blocks(trainer), self.config.num_hidden_layers, self.placement)

        def uniform() -> Params:
            return self._distil(tuner, blocks, dense, TUNING, "end to end", cal.end_epochs)

        tuned = self._tune_routed(common, uniform, tuner, dense) if cal.routed_epochs else uniform()
        layers = tuner.pack(tuned)
        if cal.slice_epochs:
            coarse = widths(self.elastic.slice_bits)[: cal.coarse_depth(self.elastic.slice_bits)]
            for final, width in pairwise(coarse):
                rate = cal.slice_lr * 2 ** (CODE_BITS - width)
                alone = SliceTuner(**common, final_width=final, reads=(width,), epochs=cal.slice_epochs, rate=rate)
                stage, title = f"{SLICE}/{width}", f"slice to {width} bits"
                layers = self._tune_slices(alone, layers, lambda: tuned, dense, stage, title)
        return layers

    def _tune_slices(
        self,
        tuner: SliceTuner,
        layers: Params,
        weights: Callable[[], Params],
        dense: Params,
        stage: str,
        title: str,
    ) -> Params:
        """The packed layers after a stage that starts from ``weights()``."""
        tuned = self._distil(tuner, lambda: tuner.begin(layers, weights()), dense, stage, title, tuner.epochs)
        return layers | {"slices": tuner.slices(tuned)}

    def _tune_routed(
        self, common: dict[str, Any], uniform: Callable[[], Params], tuner: EndToEndTrainer, dense: Params
    ) -> Params:
        """The blocks' parameters after routed tuning, routers too."""
        cal = self.calibration
        recorded, others = self._split_windows(common["windows"])

        def start() -> Params:
            params = uniform()
            model = self._model(dense, tuner.pack(params))
            routers = self._first_routers(model, recorded, others)
            return params | {
                part: {name: linear | routers[part][name] for name, linear in params[part].items()} for part in routers
            }

        # Only where they are missing, and kept no longer than until training takes them.
        started = [] if distributed.from_main(int(self.run.thresholds.is_file())) else [start()]
        routed = RoutedTrainer(**(common | {"windows": others}), pairs=self.run.load_thresholds())

        def begin() -> Params:
            return started.pop() if started else start()

        return self._distil(routed, begin, dense, ROUTED, "routed", cal.routed_epochs)

    def _first_routers(
        self, model: ElasticModel, recorded: Int[np.ndarray, "n T"], others: Int[np.ndarray, "m T"]
    ) -> Routers:
        """Those that routed tuning starts from; their thresholds are on disk before anything depends on them."""
        cal = self.calibration
        fitter = RouterTrainer(
            model=dataclasses.replace(model, dtype=jnp.dtype(cal.dtype)),
            calibration=cal,
            windows=others,
            most_bits=cal.fine_above,
        )
        routers = fitter.start(model.variables).routers
        if not distributed.from_main(int(self.run.thresholds.is_file())):
            model = dataclasses.replace(model, variables=with_routers(model.variables, routers))
            budgets = tuple(bits for bits in self.elastic.budget_grid if bits <= cal.fine_above)
            found = shared_thresholds(model, recorded, budgets, cal.coarse_depth(self.elastic.slice_bits))
            pairs = np.stack([budgets, found], axis=-1)
            distributed.on_main(f"saving '{self.run.thresholds}'", partial(self.run.save_thresholds, pairs))
        return routers

    def _distil(
        self, distiller: Distiller, first: Callable[[], Params], dense: Params, stage: str, title: str, epochs: int
    ) -> Params:
        """The parameters after the epochs of one stage, ``first()`` before them."""
        if not epochs:
            return first()  # without an optimizer's state

        def start() -> TuningState:
            return distiller.init(first())

        def epoch(state: TuningState, number: int) -> tuple[TuningState, dict[str, Any]]:
            state, divergence, healthy = distiller.epoch(state, dense, number)
            return state, {"divergence": divergence, "healthy": healthy}

        def report(done: int, seconds: float, record: dict[str, Any]) -> None:
            self.observer.on_tuned(title, done, epochs, record["divergence"], record["healthy"], seconds)

        return self._stage(stage, epochs, distiller.abstract_state).run_all(start, epoch, report).params

    def _stage(self, name: str, epochs: int, like: Any) -> SavedEpochs:
        load = partial(self._load, like=like)
        seconds = self.calibration.end_save_seconds
        return SavedEpochs(run=self.run, stage=name, epochs=epochs, save_seconds=seconds, load=load)

    def _split_windows(self, windows: Int[np.ndarray, "W T"]) -> tuple[np.ndarray, np.ndarray]:
        """The windows that thresholds are recorded on, and those that routers are fitted to."""
        shuffled = np.random.default_rng(self.calibration.seed).permutation(windows)
        recorded, others = np.split(shuffled, [self.calibration.threshold_windows])
        return recorded, others

    def _fit_routers(
        self, model: ElasticModel, recorded: Int[np.ndarray, "n T"], others: Int[np.ndarray, "m T"]
    ) -> Variables:
        """The variables with routers fitted to them: all or, after routed tuning, what scores the finer slices."""
        cal = self.calibration
        kept = cal.tuned_scores(self.elastic.slice_bits)
        if kept == len(self.elastic.slice_bits) - 1:
            return model.variables
        trainer = RouterTrainer(
            model=dataclasses.replace(model, dtype=jnp.dtype(cal.dtype)), calibration=cal, windows=others, kept=kept
        )

        def epoch(state: RouterState, number: int) -> tuple[RouterState, dict[str, Any]]:
            state, healthy = trainer.epoch(state, model.variables, number)
            return state, {"healthy": healthy}

        def report(done: int, seconds: float, record: dict[str, Any]) -> None:
            self.observer.on_fitted(done, cal.fit_epochs, record["healthy"], seconds)

        stage = self._stage(ROUTER, cal.fit_epochs, trainer.abstract_state)
        routers = stage.run_all(lambda: trainer.start(model.variables), epoch, report).routers
        if kept:

            @jax.jit
            def measure(routers: Routers, variables: Variables, tokens: Int[Array, "n T"]) -> Array:
                coarse = UniformDepth(depth=jnp.array([kept + 1]))
                return overlap(collect_scores(model, with_routers(variables, routers), tokens, coarse), kept)

            by = float(measure(routers, model.variables, self.placement.put_batch(recorded)))
            if not np.isfinite(by):
                raise ValueError(f"the routers' scores of finer slices reach {by} nats into those of coarse ones")
            routers = lower_finer(routers, by, kept)
        return with_routers(model.variables, routers)

    def _generated(self, params: Params, windows: Int[np.ndarray, "W T"]) -> Int[np.ndarray, "G T"]:
        """The windows that the unquantized model wrote: those of the run's folder, so that it resumes with the same."""
        cal = self.calibration
        if not cal.end_generated_windows or not cal.distils:
            return windows[:0]
        if not distributed.from_main(int(self.run.generated.is_file())):
            written = write_windows(
                self.config,
                params,
                windows,
                cal.end_generated_windows,
                seed=cal.seed,
                dtype=jnp.dtype(cal.dtype),
                progress=self.observer.on_generated,
            )
            distributed.on_main(f"saving '{self.run.generated}'", lambda: self.run.save_generated(written))
        return np.load(self.run.generated)

    def _finish(self, params: Params, layers: Params, windows: Int[np.ndarray, "W T"]) -> Variables:
        """Puts the untouched parts around the packed layers, fits their routers and records thresholds."""
        around = self.placement.put({name: part for name, part in params.items() if name != "layers"})
        model = self._model(around, layers)
        recorded, others = self._split_windows(windows)
        if self.calibration.recipe == "elastic":
            model = dataclasses.replace(model, variables=self._fit_routers(model, recorded, others))
        return record_thresholds(model, recorded, self.calibration.threshold_scope, self.observer.on_budget)

    def _model(self, params: Params, layers: Params) -> ElasticModel:
        """The elastic model of packed layers, and of the parameters around the dense ones."""
        variables: Variables = {
            "params": {**params, "layers": layers["params"]},
            "slices": {"layers": layers["slices"]},
            "routing": {"layers": layers["routing"]},
        }
        return ElasticModel(config=self.config, elastic=self.elastic, variables=variables, placement=self.placement)
