"""The stages after the blocks, over the whole model: tuning, fitting routers, recording thresholds."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from mobiquant_jax import distributed
from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.distillation import Distiller, TuningState
from mobiquant_jax.calibration.end_to_end import EndToEndTrainer
from mobiquant_jax.calibration.epochs import SavedEpochs, load_or_remove
from mobiquant_jax.calibration.generated import write_windows
from mobiquant_jax.calibration.linears import Params
from mobiquant_jax.calibration.observer import Observer
from mobiquant_jax.calibration.routed_tuning import RoutedTrainer
from mobiquant_jax.calibration.routers import Routers, RouterState, RouterTrainer, routers_of, with_routers
from mobiquant_jax.calibration.run_dir import FINE, ROUTED, ROUTER, SLICE, TUNING, RunDir
from mobiquant_jax.calibration.slice_tuning import SliceTuner
from mobiquant_jax.calibration.thresholds import record_thresholds, scores_at_depth, shared_thresholds
from mobiquant_jax.calibration.tiers import lower_from, shift_below
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel, Variables
from mobiquant_jax.quant import CODE_BITS, widths
from mobiquant_jax.sharding import Placement


@dataclass(frozen=True, kw_only=True)
class ModelStages:
    """What a run does once its blocks are trained. Call it under ``jax.set_mesh(stages.mesh)``.

    Attributes:
        config: architecture.
        elastic: slicing and routing.
        calibration: the recipe.
        run: where states go.
        observer: is told of progress.
        mesh: the devices.
        windows: calibration tokens, ``[W, T]``.
    """

    config: LlamaConfig
    elastic: ElasticConfig
    calibration: CalibrationConfig
    run: RunDir
    observer: Observer
    mesh: Mesh
    windows: Int[np.ndarray, "W T"]

    @cached_property
    def placement(self) -> Placement:
        """Where every array lies."""
        return Placement.create(self.mesh, self.config, self.elastic)

    def tune(
        self,
        dense: Params,
        *,
        trained: Callable[[], Params],
        packed: Callable[[], Params],
        scaled: Callable[[], Params],
    ) -> Params:
        """The packed layers after the stages that train weights.

        Args:
            dense: parameters of the unquantized model, on the devices.
            trained: gives the stacked blocks' parameters, as their training left them.
            packed: gives the same packed.
            scaled: gives the unquantized blocks, their channels scaled.
        """
        cal = self.calibration
        common: dict[str, Any] = dict(
            config=self.config,
            elastic=self.elastic,
            calibration=cal,
            windows=self.windows,
            generated=self._generated(dense),
            dtype=jnp.dtype(cal.dtype),
            mesh=self.mesh,
        )
        layers, tuned = self._tune_coarse(trained, common, dense) if cal.distils_coarse else (packed(), {})
        if cal.has_finer_slices:
            finer = tuple(width for width in widths(self.elastic.slice_bits) if width > cal.fine_above)
            fine = SliceTuner(
                **common, final_width=cal.fine_above, reads=finer, epochs=cal.fine_epochs, rate=cal.fine_lr
            )

            def weights() -> Params:
                return scaled() | {part: tuned.pop(part) for part in tuple(tuned)}  # not kept while they train

            params = self._tune_slices(fine, layers, weights, dense, FINE, "finer slices")
            layers = layers | {"slices": fine.slices(params)}
        return layers

    def finish(self, around: Params, layers: Params) -> Variables:
        """The elastic model's variables: routers fitted, thresholds recorded.

        Args:
            around: the parameters that are not the blocks', on the devices.
            layers: the packed blocks.
        """
        model = self._model(around, layers)
        recorded, others = self._split_windows()
        if self.calibration.recipe == "elastic":
            model = dataclasses.replace(model, variables=self._fit_routers(model, recorded, others))
        return record_thresholds(model, recorded, self.calibration.threshold_scope, self.observer.on_budget)

    @property
    def _kept_scores(self) -> int:
        """Of how many slices, from the second on, routed tuning has trained the scores."""
        return self.calibration.tuned_scores(self.elastic.slice_bits)

    def _tune_coarse(
        self, trained: Callable[[], Params], common: dict[str, Any], dense: Params
    ) -> tuple[Params, Params]:
        """The packed layers after tuning at uniform widths, then routed, and then each slice alone.

        Also the weights, as they were tuned, that finer slices start from.
        """
        cal = self.calibration
        tuner = EndToEndTrainer(**common)

        def uniform() -> Params:
            return self._distil(tuner, trained, dense, TUNING, "end to end", cal.end_epochs)

        tuned = [self._tune_routed(common, uniform, tuner, dense) if cal.routed_epochs else uniform()]
        layers = tuner.pack(tuned[0])
        if not cal.slice_epochs:
            return layers, {"attention": tuned[0]["attention"]} if cal.fine_tuned_attention else {}
        left: Params = {}
        coarse = widths(self.elastic.slice_bits)[: cal.coarse_depth(self.elastic.slice_bits)]
        for final, width in pairwise(coarse):
            reads = tuple(read for read in coarse if read >= width)
            rate = cal.slice_lr * 2 ** (CODE_BITS - width)
            alone = SliceTuner(**common, final_width=final, reads=reads, epochs=cal.slice_epochs, rate=rate)
            stage, title = f"{SLICE}/{width}", f"slice to {width} bits"
            # Not kept in memory while the last one trains.
            weights = partial(tuned.pop if width == coarse[-1] else tuned.__getitem__, 0)
            params = self._tune_slices(alone, layers, weights, dense, stage, title)
            layers = layers | {"slices": alone.slices(params)}
            if cal.fine_tuned_attention and width == coarse[-1]:
                left = alone.tuned_attention(params)
            del params
        return layers, left

    def _tune_slices(
        self,
        tuner: SliceTuner,
        layers: Params,
        weights: Callable[[], Params],
        dense: Params,
        stage: str,
        title: str,
    ) -> Params:
        """The parameters after a stage that starts from ``weights()``, in the final bins of packed layers."""
        return self._distil(tuner, lambda: tuner.begin(layers, weights()), dense, stage, title, tuner.epochs)

    def _tune_routed(
        self, common: dict[str, Any], uniform: Callable[[], Params], tuner: EndToEndTrainer, dense: Params
    ) -> Params:
        """The blocks' parameters after routed tuning, routers too."""
        cal = self.calibration
        recorded, others = self._split_windows()

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
        depth = cal.coarse_depth(self.elastic.slice_bits)
        routers = self._in_tiers(model, fitter.start(model.variables).routers, recorded, depth)
        if not distributed.from_main(int(self.run.thresholds.is_file())):
            model = dataclasses.replace(model, variables=with_routers(model.variables, routers))
            budgets = tuple(bits for bits in self.elastic.budget_grid if bits <= cal.fine_above)
            found = shared_thresholds(model, recorded, budgets, depth)
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
        load = partial(load_or_remove, self.run, like=like, on_damaged=self.observer.on_damaged)
        seconds = self.calibration.end_save_seconds
        return SavedEpochs(run=self.run, stage=name, epochs=epochs, save_seconds=seconds, load=load)

    def _split_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """The windows that thresholds are recorded on, and those that routers are fitted to."""
        shuffled = np.random.default_rng(self.calibration.seed).permutation(self.windows)
        recorded, others = np.split(shuffled, [self.calibration.threshold_windows])
        return recorded, others

    def _fit_routers(
        self, model: ElasticModel, recorded: Int[np.ndarray, "n T"], others: Int[np.ndarray, "m T"]
    ) -> Variables:
        """The variables with routers fitted to them: all or, after routed tuning, what scores the finer slices.

        Routers that were tuned have their slices in tiers.
        """
        kept, all_scores = self._kept_scores, len(self.elastic.slice_bits) - 1
        routers = self._fitted(model, others, kept) if kept < all_scores else routers_of(model.variables)
        if kept:
            routers = self._in_tiers(model, routers, recorded, all_scores + 1)
        return with_routers(model.variables, routers)

    def _fitted(self, model: ElasticModel, others: Int[np.ndarray, "m T"], kept: int) -> Routers:
        """The routers after the epochs of fitting them, the first ``kept`` scores as they were."""
        cal = self.calibration
        trainer = RouterTrainer(
            model=dataclasses.replace(model, dtype=jnp.dtype(cal.dtype)), calibration=cal, windows=others, kept=kept
        )

        def epoch(state: RouterState, number: int) -> tuple[RouterState, dict[str, Any]]:
            state, healthy = trainer.epoch(state, model.variables, number)
            return state, {"healthy": healthy}

        def report(done: int, seconds: float, record: dict[str, Any]) -> None:
            self.observer.on_fitted(done, cal.fit_epochs, record["healthy"], seconds)

        stage = self._stage(ROUTER, cal.fit_epochs, trainer.abstract_state)
        return stage.run_all(lambda: trainer.start(model.variables), epoch, report).routers

    def _in_tiers(self, model: ElasticModel, routers: Routers, recorded: Int[np.ndarray, "n T"], depth: int) -> Routers:
        """The routers with the scores of the first ``depth`` slices in tiers, each measured where its tier begins.

        Raises:
            ValueError: scores that are not finite.
        """
        tokens = self.placement.put_batch(recorded)
        too_high = jax.jit(shift_below, out_shardings=self.placement.replicated)
        for border in range(1, depth - 1):
            scores = scores_at_depth(model, with_routers(model.variables, routers), tokens, border + 1)
            by = float(too_high(scores, self.placement.put_whole(np.int32(border))))
            if not np.isfinite(by):
                raise ValueError(f"the routers' scores are not finite: those of slice {border + 2} are {by} too high")
            routers = lower_from(routers, by, border)
        return routers

    def _generated(self, params: Params) -> Int[np.ndarray, "G T"]:
        """The windows that the unquantized model wrote: those of the run's folder, so that it resumes with the same."""
        cal = self.calibration
        if not cal.end_generated_windows or not cal.distils:
            return self.windows[:0]
        if not distributed.from_main(int(self.run.generated.is_file())):
            written = write_windows(
                self.config,
                params,
                self.windows,
                cal.end_generated_windows,
                seed=cal.seed,
                dtype=jnp.dtype(cal.dtype),
                progress=self.observer.on_generated,
            )
            distributed.on_main(f"saving '{self.run.generated}'", lambda: self.run.save_generated(written))
        return np.load(self.run.generated)

    def _model(self, params: Params, layers: Params) -> ElasticModel:
        """The elastic model of packed layers, and of the parameters around the dense ones."""
        variables: Variables = {
            "params": {**params, "layers": layers["params"]},
            "slices": {"layers": layers["slices"]},
            "routing": {"layers": layers["routing"]},
        }
        return ElasticModel(config=self.config, elastic=self.elastic, variables=variables, placement=self.placement)
