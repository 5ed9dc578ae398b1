"""Training one block: jitted once, used for every block of the model.

Everything lies on a mesh, of one device or of many: parameters and optimizer state as `Placement` says, streams split
over the batch; `host_block` keeps the streams on the host. Numbers are those of one device, but for the order of sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.calibration import shapes
from mobiquant_jax.calibration.block_functions import BlockFunctions
from mobiquant_jax.calibration.config import CalibrationConfig, Stage, stages
from mobiquant_jax.calibration.flops import epoch_flops
from mobiquant_jax.calibration.linears import Params, trainable
from mobiquant_jax.calibration.optimizer import grouped_adamw
from mobiquant_jax.calibration.samples import Samples, draw_widths, drawn_widths
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.sharding import Placement, constrain_batch, one_device

Stream = jax.Array | np.ndarray  # [S or W, T, D]
RISE_LIMIT = 1.5  # a block whose error grows beyond this multiple of its best is stopped


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What training did to one block.

    Attributes:
        before: geometric mean of the block errors before training: at every width that training draws or, in the recipe
            "paper", at every budget.
        after: the same of the parameters kept.
        bits: average bits that these used.
        note: why training stopped early or fell back, or "".
        flops: floating-point operations of the training steps; see `flops.epoch_flops`.
    """

    before: float
    after: float
    bits: float
    note: str
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BlockTrainer:
    """The compiled pieces of block-wise calibration.

    Streams are arrays over samples (a window at a budget), ``[S, T, D]``; the target stream is over windows,
    ``[W, T, D]``. Call the methods under ``jax.set_mesh(trainer.mesh)``.

    Attributes:
        config: architecture.
        elastic: slicing and routing.
        calibration: the recipe.
        samples: windows and budgets of the quantized stream.
        dtype: type of the block's matmuls; parameters, streams and errors stay float32.
        mesh: the devices; their batch axes divide the batch size and the number of windows.
    """

    config: LlamaConfig
    elastic: ElasticConfig
    calibration: CalibrationConfig
    samples: Samples
    dtype: DTypeLike = jnp.float32
    mesh: Mesh = field(default_factory=one_device)

    @cached_property
    def placement(self) -> Placement:
        """Where every array lies."""
        return Placement.create(self.mesh, self.config, self.elastic)

    @cached_property
    def functions(self) -> BlockFunctions:
        """What happens to one batch."""
        return BlockFunctions(
            config=self.config,
            elastic=self.elastic,
            calibration=self.calibration,
            placement=self.placement,
            dtype=self.dtype,
        )

    def train(
        self,
        dense: Params,
        quantized: Stream,
        target: Stream,
        index: int,
        on_epoch: Callable[[str, int, int, float], None] = lambda stage, epoch, epochs, error: None,
    ) -> tuple[Params, BlockReport]:
        """Trains one block through its stages, keeping the best epoch.

        A non-finite loss, or an error that has grown by half over the best, ends training; the best parameters seen so
        far, at worst the untrained ones, are kept.

        Args:
            dense: the full-precision block's parameters.
            quantized: the quantized stream that enters the block, ``[S, T, D]``.
            target: the full-precision stream that leaves it, ``[W, T, D]``.
            index: number of the block; with the seed it determines routers and shuffling.
            on_epoch: called with (stage, epoch, epochs, error) after each epoch.

        Returns:
            The trained parameters (``pack`` makes the elastic block of them) and a report.
        """
        cal = self.calibration
        params = self._start(dense, np.int32(index))
        rng = np.random.default_rng([cal.seed, index])
        streams = (quantized, target, self._plan(self.samples.window))
        evaluate = partial(self._evaluate, streams=streams)
        before, bits = evaluate(params)
        best, best_error, note, flops = params, before, "", 0.0
        for stage in stages(cal):
            step_count = stage.epochs * self._steps_per_epoch
            optimizer_state = self._init_optimizer[stage](params)
            params = self._copy(best)  # the epoch donates its parameters; the best ones outlive it
            for epoch in range(stage.epochs):
                ids, scalars = self._epoch_plan(stage, rng)
                progress = (epoch * len(ids) + np.arange(len(ids), dtype=np.float32)) / step_count
                plan = self._plan((ids, scalars, progress))
                with jax.transfer_guard("disallow"):
                    params, optimizer_state, healthy = self.epoch_fn(stage)(
                        params, optimizer_state, dense, streams, plan
                    )
                error, used = evaluate(params)
                flops += self._epoch_flops(stage)
                on_epoch(stage.name, epoch + 1, stage.epochs, error)
                if not bool(healthy) or not math.isfinite(error):
                    note = f"non-finite loss in epoch {epoch + 1} of stage '{stage.name}': kept the best step before it"
                    break
                if error < best_error:
                    best, best_error, bits = self._copy(params), error, used
                elif error > RISE_LIMIT * best_error:
                    note = f"error rose to {error:.3g} in epoch {epoch + 1} of stage '{stage.name}': kept the best step"
                    break
            if note:
                break
        return best, BlockReport(before=before, after=best_error, bits=bits, note=note, flops=flops)

    def embed(self, params: Params, windows: Int[np.ndarray, "N T"]) -> Stream:
        """The stream of windows or samples that enters the first block, of the embedder's parameters."""
        embed = jax.jit(self.functions.embed, out_shardings=self._batched(len(windows)))
        return embed(params, self.placement.put_batch(windows))

    @cached_property
    def pack(self) -> Callable[[Params], Params]:
        """Jitted: trained parameters to the elastic block's variables."""
        pack = shapes.packing(self.config, self.elastic)
        return jax.jit(pack, in_shardings=(self._param_shardings,), out_shardings=self._packed_shardings)

    @cached_property
    def abstract_dense(self) -> Params:
        """Shapes, types and shardings of one dense block's parameters."""
        return self.placement.abstract(shapes.of_block(shapes.dense_model(self.config)["layers"]))

    @cached_property
    def abstract_trained(self) -> Params:
        """Shapes, types and shardings of what ``train`` returns."""
        return self.placement.abstract(shapes.of_block(shapes.trained_layers(self.config, self.elastic)))

    @cached_property
    def dense_block(self) -> Callable[..., Stream]:
        """Jitted ``(params, stream [W, T, D]) -> stream``: the full-precision block, a window a device at a time."""
        shards = self.placement.batch_shards

        def apply(params: Params, stream: Float[Array, "W T D"]) -> Float[Array, "W T D"]:
            # [W / shards, shards, T, D]: each device goes through the windows that it holds.
            mine = stream.reshape(shards, -1, *stream.shape[1:]).swapaxes(0, 1)
            out = jax.lax.map(partial(self.functions.dense, params), mine)
            return out.swapaxes(0, 1).reshape(stream.shape)

        full = self._batched(self.calibration.windows)
        return jax.jit(
            apply,
            donate_argnums=1,
            in_shardings=(self.placement.shardings(self.abstract_dense), full),
            out_shardings=full,
        )

    @cached_property
    def packed_block(self) -> Callable[..., Stream]:
        """Jitted ``(variables, stream [S, T, D]) -> stream``: the packed block, each sample at its own budget.

        The thresholds are each batch's own quantiles, so every batch meets its budget exactly.
        """
        ids, bits = self.samples.steps(self.calibration.batch_size)

        def apply(variables: Params, stream: Float[Array, "S T D"]) -> Float[Array, "S T D"]:
            batched = stream.reshape(len(ids), -1, *stream.shape[1:])  # in-order steps: samples are contiguous
            # Exchanged once for the whole stream, so that every step finds its batch spread over all devices.
            spread = jax.lax.with_sharding_constraint(batched, self.placement.batched(batched.shape, dim=1))
            out = jax.lax.map(lambda step: self.functions.packed(variables, *step), (spread, jnp.asarray(bits)))
            return out.reshape(stream.shape)

        quantized = self._batched(len(self.samples.window))
        in_shardings = (self._packed_shardings, quantized)
        return jax.jit(apply, donate_argnums=1, in_shardings=in_shardings, out_shardings=quantized)

    def _plan(self, tree: Any) -> Any:
        """Puts the numbers of steps where ``epoch_fn`` takes them from."""
        return self.placement.put_whole(tree)

    @cached_property
    def _param_shardings(self) -> Any:
        return self.placement.shardings(self.abstract_trained)

    @cached_property
    def _packed_shardings(self) -> Any:
        return self.placement.shardings(shapes.of_block(shapes.packed_layers(self.config, self.elastic)))

    @cached_property
    def _stream_shardings(self) -> Any:
        """Of the quantized stream, the target stream and the window of each sample."""
        samples, windows = len(self.samples.window), self.calibration.windows
        return self._batched(samples), self._batched(windows), self.placement.replicated

    def _batched(self, count: int) -> NamedSharding:
        return self.placement.batched((count, self.calibration.window_length, self.config.hidden_size))

    @cached_property
    def _start(self) -> Callable[[Params, Any], Params]:
        """Jitted ``(dense, index) -> params``: what training starts from; kernels and norms are the dense ones."""

        def start(dense: Params, index: Array) -> Params:
            key = jax.random.fold_in(jax.random.key(self.calibration.seed), index)
            return trainable(dense, self.config, self.elastic, key)

        return jax.jit(start, out_shardings=self._param_shardings)

    @cached_property
    def _copy(self) -> Callable[[Params], Params]:
        return jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=self._param_shardings)

    def _epoch_flops(self, stage: Stage) -> float:
        return epoch_flops(
            self.config,
            stage,
            windows=len(self.samples.window),
            length=self.calibration.window_length,
            slices=len(self.elastic.slice_bits),
            follows=self.calibration.propagated_weight > 0,
        )

    @property
    def _steps_per_epoch(self) -> int:
        return len(self.samples.window) // self.calibration.batch_size

    def _epoch_plan(self, stage: Stage, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids ``[steps, batch]`` and the number that sets each step's depths: a width, or a budget."""
        ids, bits = self.samples.steps(self.calibration.batch_size, rng)
        if stage.routing == "first_slice":
            return ids, np.full(len(ids), self.elastic.slice_bits[0], np.float32)
        if stage.routing == "uniform":
            return ids, draw_widths(bits, self.elastic.slice_bits, rng).astype(np.float32)
        return ids, bits

    def optimizer(self, stage: Stage) -> optax.GradientTransformation:
        """The optimizer of a stage."""
        steps = stage.epochs * self._steps_per_epoch
        return grouped_adamw(stage.weight_lr, stage.clipping_lr, stage.router_lr, steps)

    @cached_property
    def _state_shardings(self) -> dict[Stage, Any]:
        return {
            stage: self.placement.shardings(jax.eval_shape(self.optimizer(stage).init, self.abstract_trained))
            for stage in stages(self.calibration)
        }

    @cached_property
    def _init_optimizer(self) -> dict[Stage, Callable[[Params], Any]]:
        """Jitted: the state is made where it lies."""
        return {
            stage: jax.jit(self.optimizer(stage).init, out_shardings=shardings)
            for stage, shardings in self._state_shardings.items()
        }

    @cached_property
    def epochs(self) -> dict[Stage, jax.stages.Wrapped]:
        """The epochs of the recipe's stages, to be compiled where they are wanted."""
        return {stage: self._compile_epoch(stage) for stage in stages(self.calibration)}

    def epoch_fn(self, stage: Stage) -> Callable[..., Any]:
        """Jitted ``(params, optimizer_state, dense, streams, plan)``: one epoch; the first two are donated."""
        return self.epochs[stage]

    def _compile_epoch(self, stage: Stage) -> jax.stages.Wrapped:
        """Jitted: one epoch as a scan over steps."""
        step_fn = self.functions.step(stage, self.optimizer(stage))

        def step(carry: Any, inputs: Any, dense: Params, streams: Any) -> Any:
            ids, scalar, progress = inputs
            quantized, target, window = streams
            batch = (constrain_batch(quantized[ids]), constrain_batch(target[window[ids]]))
            return step_fn(carry, dense, batch, scalar, progress), None

        def epoch(params: Params, optimizer_state: Any, dense: Params, streams: Any, plan: Any) -> Any:
            carry = (params, optimizer_state, jnp.array(True))
            return jax.lax.scan(partial(step, dense=dense, streams=streams), carry, plan)[0]

        params, state, whole = self._param_shardings, self._state_shardings[stage], self.placement.replicated
        dense = self.placement.shardings(self.abstract_dense)
        return jax.jit(
            epoch,
            donate_argnums=(0, 1),
            in_shardings=(params, state, dense, self._stream_shardings, whole),
            out_shardings=(params, state, whole),
        )

    def _evaluate(self, params: Params, streams: Any) -> tuple[float, float]:
        """Geometric mean of the block errors, and the average bits used; see `BlockReport`."""
        return mean_errors(*jax.device_get(self._evaluate_fn(params, streams)))

    @cached_property
    def _evaluate_fn(self) -> Callable[..., Any]:
        def one(step: Any, params: Params, streams: Any) -> tuple[Array, Array]:
            sample, bits = step
            quantized, target, window = streams
            return self.functions.error(params, quantized[sample], target[window[sample]], bits)

        def every(params: Params, streams: Any) -> tuple[Array, Array]:
            return jax.lax.map(partial(one, params=params, streams=streams), self._evaluated)

        return jax.jit(
            every,
            in_shardings=(self._param_shardings, self._stream_shardings),
            out_shardings=self.placement.replicated,
        )

    @property
    def _evaluated(self) -> tuple[Int[np.ndarray, "N 1"], Float[np.ndarray, " N"]]:
        """Samples that are evaluated, and at how many bits: those of every budget or, for a width, of the nearest one.

        Lists of one sample: a slice at a position that is not constant would have the whole stream on every device.
        """
        budgets = np.asarray(self.samples.budgets, np.float32)
        drawn = np.asarray(drawn_widths(self.samples.budgets, self.elastic.slice_bits), np.float32)
        bits = budgets if self.calibration.recipe == "paper" else drawn
        nearest = np.argmin(np.abs(bits[:, None] - budgets), axis=1)
        return (nearest * self.samples.per_budget)[:, None], bits


def mean_errors(errors: Float[np.ndarray, " N"], bits: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """The geometric mean of the errors and the mean of the bits."""
    return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-20))))), float(np.mean(bits))
