"""Training all blocks together against the unquantized model's own predictions: what its stages share.

Block-wise training matches activations; what counts is the distribution over the next token. With teacher p (the
unquantized model) and student q (the same blocks through the nested quantizer, at a width or a budget drawn each step):

    L = log mean_t sum_v p_tv (log p_tv - log q_tv)

The logarithm gives every width the same pull: at 2 bits the divergence is a hundred times that at 8.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.calibration import shapes
from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.linears import Params, UniformWidth
from mobiquant_jax.calibration.optimizer import guarded_update
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.sharding import Placement, one_device, place


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TuningState:
    """What an epoch of distillation continues from.

    Attributes:
        params: parameters of the stacked blocks.
        optimizer: the optimizer's state.
    """

    params: Params
    optimizer: Any


def distillation_loss(student: Float[Array, "B T V"], teacher: Float[Array, "B T V"]) -> Float[Array, ""]:
    """Kullback-Leibler divergence of the student's distribution from the teacher's, in nats a token."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


@dataclass(frozen=True, kw_only=True)
class Distiller:
    """Trains parameters of all blocks at once; a stage says which. Call it under ``jax.set_mesh(distiller.mesh)``.

    Attributes:
        config: architecture.
        elastic: slicing and routing.
        calibration: the recipe.
        windows: calibration tokens, ``[W, T]``.
        generated: windows that the unquantized model wrote, ``[G, T]``; none if G is 0.
        dtype: type of the student's and teacher's matmuls.
        mesh: the devices; their batch axes divide the batch size.
    """

    STREAM: ClassVar[int]
    """Tells the random numbers of a stage from those of others."""

    config: LlamaConfig
    elastic: ElasticConfig
    calibration: CalibrationConfig
    windows: Int[np.ndarray, "W T"]
    generated: Int[np.ndarray, "G T"]
    dtype: DTypeLike = jnp.float32
    mesh: Mesh = field(default_factory=one_device)

    @property
    def stream(self) -> int:
        """`STREAM`, or where a stage has several parts that of this one; an epoch adds its number."""
        return self.STREAM

    @property
    def linear(self) -> Callable[..., nn.Module]:
        """The module of the student's linears."""
        raise NotImplementedError

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """What trains, and at which rate."""
        raise NotImplementedError

    @cached_property
    def abstract_params(self) -> Params:
        """Shapes and types of the stacked blocks' parameters."""
        raise NotImplementedError

    def draw_steps(self, rng: np.random.Generator) -> np.ndarray:
        """What says how deep the tokens of each of an epoch's steps read, ``[steps]`` or ``[steps, k]``: a width."""
        raise NotImplementedError

    def control(self, drawn: Array) -> Any:
        """What the linears are told in a step, of its entry of `draw_steps`."""
        return UniformWidth(width=drawn)

    def penalty(self, stats: Any, drawn: Array) -> Float[Array, ""]:
        """What is added to the loss, of what the layers sowed into ``stats``."""
        del stats, drawn
        return jnp.zeros(())

    def constrain(self, params: Params, before: Params) -> Params:
        """The parameters after a step, brought back to where they may lie; ``before`` are those before it."""
        del before
        return params

    @cached_property
    def placement(self) -> Placement:
        """Where every array lies."""
        return Placement.create(self.mesh, self.config, self.elastic)

    def init(self, params: Params) -> TuningState:
        """The state before the first epoch, from the stacked blocks' parameters."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(self._state, out_shardings=shardings)(params)

    def _state(self, params: Params) -> TuningState:
        return TuningState(params=params, optimizer=self.optimizer.init(params))

    @cached_property
    def abstract_state(self) -> TuningState:
        """Shapes, types and shardings of the state."""
        return self.placement.abstract(jax.eval_shape(self._state, self.abstract_params))

    @cached_property
    def abstract_dense(self) -> Params:
        """Shapes and types of the unquantized model's parameters; shared, see `shapes`."""
        return shapes.dense_model(self.config)

    @property
    def abstract_epoch(self) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
        """What an epoch runs, and shapes, types and shardings of its arguments, to be compiled where they are wanted.

        Neither the arguments nor the model is made.
        """
        shape = (self.steps, self.calibration.end_batch_size, self.windows.shape[1])
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.placement.batched(shape, dim=1))
        steps = self.draw_steps(np.random.default_rng())
        drawn = jax.ShapeDtypeStruct(steps.shape, steps.dtype, sharding=self.placement.replicated)
        return self._epoch, (self.abstract_state, self.placement.abstract(self.abstract_dense), (tokens, drawn))

    def epoch(self, state: TuningState, dense: Params, index: int) -> tuple[TuningState, float, bool]:
        """Steps over windows drawn from the calibration text and the generated one, each at depths of its own.

        Args:
            state: from ``init`` or the epoch before; donated.
            dense: the unquantized model's parameters.
            index: number of the epoch; with the seed it determines windows, order and depths.

        Returns:
            The new state, the epoch's mean divergence, and whether every step was finite.
        """
        cal = self.calibration
        rng = np.random.default_rng([cal.seed, self.stream + index])
        windows = self._draw_windows(rng)[: self.steps * cal.end_batch_size]
        batches = windows.reshape(self.steps, cal.end_batch_size, -1)
        tokens = place(batches, self.placement.batched(batches.shape, dim=1))
        plan = (tokens, self.placement.put_whole(self.draw_steps(rng)))
        with jax.transfer_guard("disallow"):
            state, divergences, healthy = self._epoch(state, dense, plan)
        return state, float(np.mean(jax.device_get(divergences))), bool(healthy)

    def _draw_windows(self, rng: np.random.Generator) -> Int[np.ndarray, "W T"]:
        """The share of generated windows that the recipe wants, the rest calibration text; shuffled."""
        share = self.calibration.end_generated_share if len(self.generated) else 0.0
        generated = min(round(share * len(self.windows)), len(self.generated))
        kept = rng.permutation(len(self.windows))[generated:]
        drawn = rng.permutation(len(self.generated))[:generated]
        return rng.permutation(np.concatenate([self.windows[kept], self.generated[drawn]]))

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.windows) // self.calibration.end_batch_size

    @cached_property
    def _epoch(self) -> jax.stages.Wrapped:
        """Jitted: one epoch as a scan over steps. A step with a non-finite loss or gradient changes nothing."""
        teacher: Callable[..., Any] = Llama(self.config, dtype=self.dtype).apply

        def step(carry: Any, inputs: Any, dense: Params) -> Any:
            state, healthy = carry
            tokens, drawn = inputs
            target = teacher({"params": dense}, tokens)
            (loss, divergence), grads = jax.value_and_grad(self._loss, has_aux=True)(
                state.params, dense, target, tokens, drawn
            )
            params, optimizer, finite = guarded_update(self.optimizer, loss, grads, state.params, state.optimizer)
            params = self.constrain(params, state.params)
            return (TuningState(params=params, optimizer=optimizer), healthy & finite), divergence

        def epoch(state: TuningState, dense: Params, plan: Any) -> Any:
            (state, healthy), divergences = jax.lax.scan(partial(step, dense=dense), (state, jnp.array(True)), plan)
            return state, divergences, healthy

        state = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        dense, whole = self.placement.shardings(self.abstract_dense), self.placement.replicated
        plan = (self.placement.batched((1, self.calibration.end_batch_size, 1), dim=1), whole)
        return jax.jit(epoch, donate_argnums=0, in_shardings=(state, dense, plan), out_shardings=(state, whole, whole))

    def _loss(
        self, layers: Params, dense: Params, target: Array, tokens: Array, drawn: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The loss of one step, and its divergence.

        Embedding, final norm and head are the unquantized model's; only the blocks have a gradient.
        """
        student: Callable[..., Any] = Llama(self.config, linear=self.linear, dtype=self.dtype, remat=True).apply
        variables = {"params": {**dense, "layers": layers}}
        logits, state = student(variables, tokens, self.control(drawn), mutable=["stats"])
        divergence = distillation_loss(logits, target)
        return jnp.log(divergence + 1e-6) + self.penalty(state.get("stats"), drawn), divergence
