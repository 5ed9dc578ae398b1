"""What block-wise calibration does with one batch of windows, as functions of parameters and activations.

They are compiled where the streams are known to lie: in `block`, all of an epoch's steps as one program, or in
`host_block`, one step at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.calibration.config import CalibrationConfig, Stage
from mobiquant_jax.calibration.linears import NestedLinear, Params, RoutedLinear, UniformWidth
from mobiquant_jax.calibration.objective import budget_penalty, objective, sample_error, scheduled_budget
from mobiquant_jax.calibration.optimizer import guarded_update
from mobiquant_jax.models import Block, Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticLinear, average_bits
from mobiquant_jax.routing import BatchBudget, FixedThreshold
from mobiquant_jax.sharding import Placement


@dataclass(frozen=True, kw_only=True)
class BlockFunctions:
    """The functions of one block.

    Attributes:
        config: architecture.
        elastic: slicing and routing.
        calibration: the recipe.
        placement: where the packed block's kernels run.
        dtype: type of the matmuls in training and evaluation; the streams' are float32.
    """

    config: LlamaConfig
    elastic: ElasticConfig
    calibration: CalibrationConfig
    placement: Placement
    dtype: DTypeLike

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What enters the first block, of the embedder's parameters."""
        embed: Callable[..., Any] = Llama(self.config).apply
        return embed({"params": params}, tokens, method="embed")

    def dense(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The full-precision block."""
        return Block(self.config, dtype=jnp.float32).apply({"params": params}, x, _positions(x))[0]

    def packed(self, variables: Params, x: Float[Array, "B T D"], budget: Array) -> Float[Array, "B T D"]:
        """The packed block at so many average bits: the thresholds are the batch's own quantiles."""
        linear = partial(ElasticLinear, elastic=self.elastic, placement=self.placement)
        block = Block(self.config, linear=linear, dtype=jnp.float32)
        return block.apply(variables, x, _positions(x), None, BatchBudget(bits=budget))[0]

    def error(
        self, params: Params, x: Float[Array, "1 T D"], target: Float[Array, "1 T D"], bits: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The block error of one sample, and the average bits that its tokens used.

        In the recipe "paper" routers spend a budget of ``bits``; in "elastic", whose blocks do not train routers, all
        tokens read a width of ``bits``.
        """
        linear: Any = NestedLinear
        control: Any = UniformWidth(width=bits.astype(jnp.int32))
        if self.calibration.recipe == "paper":
            linear, control = RoutedLinear, BatchBudget(bits=bits)
        block = Block(self.config, linear=partial(linear, elastic=self.elastic), dtype=self.dtype)
        (y, _), state = block.apply({"params": params}, x, _positions(x), None, control, mutable=["stats"])
        used = jnp.mean(average_bits(self.config, state["stats"])) if "stats" in state else bits
        return sample_error(y, target, self.calibration.loss)[0], used

    def step(self, stage: Stage, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
        """``((params, optimizer_state, healthy), dense, batch, scalar, progress)`` to the carry after the step.

        A step with a non-finite loss or gradient changes nothing.
        """
        loss_fn = self.loss(stage)

        def step(carry: Any, dense: Params, batch: Any, scalar: Array, progress: Array) -> Any:
            params, optimizer_state, healthy = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, dense, batch, scalar, progress)
            params, optimizer_state, finite = guarded_update(optimizer, loss, grads, params, optimizer_state)
            return params, optimizer_state, healthy & finite

        return step

    def loss(self, stage: Stage) -> Callable[..., Array]:
        """``(params, dense, (x, target), scalar, progress)`` to what a step minimizes; ``dense`` is the block's own."""
        cal = self.calibration
        routed = stage.routing == "penalty"
        linear = RoutedLinear if routed else NestedLinear
        block = Block(self.config, linear=partial(linear, elastic=self.elastic), dtype=self.dtype)
        dense_block = Block(self.config, dtype=self.dtype)

        def control(scalar: Array) -> Any:
            if routed:
                return FixedThreshold(threshold=jnp.zeros(()), temperature=cal.temperature)
            return UniformWidth(width=scalar.astype(jnp.int32))

        def loss(params: Params, dense: Params, batch: Any, scalar: Array, progress: Array) -> Array:
            x, target = batch
            (y, _), state = block.apply({"params": params}, x, _positions(x), None, control(scalar), mutable=["stats"])
            total = objective(sample_error(y, target, cal.loss), cal.loss)
            if cal.propagated_weight:
                follow, _ = dense_block.apply({"params": dense}, x, _positions(x))
                total += cal.propagated_weight * objective(sample_error(y, follow, cal.loss), cal.loss)
            if routed:
                used = jnp.mean(average_bits(self.config, state["stats"]))
                total += budget_penalty(used, scheduled_budget(progress, scalar), cal.penalty)
            return total

        return loss


def _positions(x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
