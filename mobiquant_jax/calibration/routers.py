"""Fitting the routers of a finished elastic model to what its slices gain (see `gains`), all linears at once.

The weights stay as they are. Each step runs the model on windows whose tokens read random depths of a budget's average,
draws labels from the model's own predictions, and goes backward once: every score gets the gradient of its likelihood.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.gains import GainLinear
from mobiquant_jax.calibration.optimizer import grouped_adamw, guarded_update
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticModel, Variables
from mobiquant_jax.routing import RandomDepth, Router
from mobiquant_jax.sharding import Placement, one_device, place

Routers = dict[str, dict[str, dict[str, Router]]]
"""``{part: {name: {"router": Router}}}``, each array with a leading layer axis."""

LINEAR_RANGE = 16.0  # silu(z) is z above it, and log rms(x) lies far above -16


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RouterState:
    """What an epoch continues from.

    Attributes:
        routers: the routers.
        optimizer: the optimizer's state.
    """

    routers: Routers
    optimizer: Any


def routers_of(variables: Variables) -> Routers:
    """The routers among a model's variables."""
    layers = variables["params"]["layers"]
    return {part: dict(layers[part]) for part in layers if part in ("attention", "mlp")}


def with_routers(variables: Variables, routers: Routers) -> Variables:
    """The variables with other routers."""
    params = variables["params"]
    return {**variables, "params": {**params, "layers": {**params["layers"], **routers}}}


def magnitude_router(router: Router) -> Router:
    """A router that scores every slice ``2 log rms(x)``: an error grows with its input, a gain with its square.

    One hidden unit carries the logarithm, where its activation is linear; the others have no effect yet.
    """
    return dataclasses.replace(
        router,
        hidden=router.hidden.at[..., 0].set(0.0),
        magnitude=jnp.zeros_like(router.magnitude).at[..., 0].set(1.0),
        hidden_bias=jnp.zeros_like(router.hidden_bias).at[..., 0].set(LINEAR_RANGE),
        output=jnp.zeros_like(router.output).at[..., 0, :].set(2.0),
        output_bias=jnp.full_like(router.output_bias, -2.0 * LINEAR_RANGE),
    )


@dataclass(frozen=True, kw_only=True)
class RouterTrainer:
    """Fits routers. Call it under ``jax.set_mesh`` of the model's mesh.

    Attributes:
        model: the elastic model; its dtype is that of the matmuls.
        calibration: the recipe.
        windows: calibration tokens, ``[W, T]``.
    """

    model: ElasticModel
    calibration: CalibrationConfig
    windows: Int[np.ndarray, "W T"]

    @cached_property
    def placement(self) -> Placement:
        """Where every array lies."""
        return self.model.placement or Placement.create(one_device(), self.model.config, self.model.elastic)

    def start(self, variables: Variables) -> RouterState:
        """Routers that know magnitudes, and each linear's mean gain, as measured on some windows at every budget."""
        steps = min(len(self.calibration.budgets), self._steps)
        routers = jax.tree.map(magnitude_router, routers_of(variables), is_leaf=_is_router)
        gradients = self._measure(routers, variables, self._plan(0, steps))
        return self._begin(routers, gradients)

    def epoch(self, state: RouterState, variables: Variables, index: int) -> tuple[RouterState, bool]:
        """A pass over the windows, each batch at a budget of its own.

        Args:
            state: from ``start`` or the epoch before; donated.
            variables: the model's; its own routers are not read.
            index: number of the epoch; with the seed it determines order, budgets, depths and labels.

        Returns:
            The new state, and whether every step was finite.
        """
        state, healthy = self._epoch(state, variables, self._plan(index + 1, self._steps))
        return state, bool(healthy)

    @property
    def _steps(self) -> int:
        return len(self.windows) // self.calibration.end_batch_size

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        cal = self.calibration
        return grouped_adamw(0.0, 0.0, cal.fit_lr, cal.fit_epochs * self._steps)

    def _plan(self, stream: int, steps: int) -> Any:
        """Tokens, budgets and seeds of so many steps, on the devices."""
        cal = self.calibration
        rng = np.random.default_rng([cal.seed, 2_000_000 + stream])
        windows = rng.permutation(self.windows)[: steps * cal.end_batch_size]
        batches = windows.reshape(steps, cal.end_batch_size, -1)
        bits = rng.permutation(np.resize(np.asarray(cal.budgets, np.float32), steps))
        seeds = rng.integers(2**32, size=steps, dtype=np.uint32)
        return place(batches, self.placement.batched(batches.shape, dim=1)), *self.placement.put_whole((bits, seeds))

    @cached_property
    def _gradients(self) -> Callable[..., Routers]:
        """``(routers, variables, (tokens [B, T], bits, seed)) -> gradients``, means over the batch's tokens."""
        config, elastic = self.model.config, self.model.elastic
        assert elastic is not None, "only an elastic model has routers"
        mean_size = float(np.mean([rows * columns for rows, columns in config.linear_shapes().values()]))
        linear = partial(GainLinear, elastic=elastic, mean_size=mean_size)
        module = Llama(config, linear=linear, dtype=self.model.dtype, remat=True)

        def loss(routers: Routers, variables: Variables, tokens: Array, bits: Array, seed: Array) -> Array:
            depths, labels = jax.random.split(jax.random.key(seed))
            policy = RandomDepth(bits=jnp.broadcast_to(bits, tokens.shape[:1]))
            logits: Any = module.apply(with_routers(variables, routers), tokens, policy, rngs={"routing": depths})
            drawn = jax.random.categorical(labels, jax.lax.stop_gradient(logits))
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, drawn))

        def gradients(routers: Routers, variables: Variables, batch: Any) -> Routers:
            summed = jax.grad(loss)(routers, variables, *batch)
            return jax.tree.map(lambda g: g / batch[0].size, summed)

        return gradients

    @cached_property
    def _measure(self) -> Callable[..., Routers]:
        """Jitted: the mean gradients over the steps of a plan."""

        def measure(routers: Routers, variables: Variables, plan: Any) -> Routers:
            def step(total: Routers, batch: Any) -> tuple[Routers, None]:
                return jax.tree.map(jnp.add, total, self._gradients(routers, variables, batch)), None

            total, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, routers), plan)
            return jax.tree.map(lambda g: g / len(plan[0]), total)

        return jax.jit(measure)

    @cached_property
    def _begin(self) -> Callable[..., RouterState]:
        """Jitted: the state at the mean gains that these gradients tell.

        The gradient of a bias is ``1 - mean(gain exp(-S))``, which ``log mean(gain exp(-S))`` more of bias brings to 0.
        """

        def center(router: Router, gradient: Router) -> Router:
            mean = jnp.maximum(1 - gradient.output_bias, 1e-12)  # gains are not negative, but sums of them round
            return dataclasses.replace(router, output_bias=router.output_bias + jnp.log(mean))

        def begin(routers: Routers, gradients: Routers) -> RouterState:
            routers = jax.tree.map(center, routers, gradients, is_leaf=_is_router)
            return RouterState(routers=routers, optimizer=self._optimizer.init(routers))

        return jax.jit(begin)

    @cached_property
    def _epoch(self) -> Callable[..., tuple[RouterState, Array]]:
        """Jitted: one epoch as a scan over steps. A step with a non-finite gradient changes nothing."""

        def epoch(state: RouterState, variables: Variables, plan: Any) -> tuple[RouterState, Array]:
            def step(carry: Any, batch: Any) -> Any:
                state, healthy = carry
                gradients = self._gradients(state.routers, variables, batch)
                routers, optimizer, finite = guarded_update(
                    self._optimizer, jnp.zeros(()), gradients, state.routers, state.optimizer
                )
                return (RouterState(routers=routers, optimizer=optimizer), healthy & finite), None

            (state, healthy), _ = jax.lax.scan(step, (state, jnp.array(True)), plan)
            return state, healthy

        return jax.jit(epoch, donate_argnums=0)


def _is_router(node: Any) -> bool:
    return isinstance(node, Router)
