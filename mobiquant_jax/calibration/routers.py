"""Fitting the routers of an elastic model to what its slices gain (see `gains`), all linears at once.

The weights stay as they are; so may the scores of the first slices, where `routed_tuning` has trained them. Each step
runs the model on windows whose tokens read random depths of a budget's average, draws labels from the model's own
predictions, and goes backward once: every score gets the gradient of its likelihood.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt

from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.gains import GainLinear
from mobiquant_jax.calibration.optimizer import FINAL_RATE, guarded_update
from mobiquant_jax.calibration.samples import spread_budgets
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel, Variables
from mobiquant_jax.quant import CODE_BITS, widths
from mobiquant_jax.routing import RandomDepth, Router
from mobiquant_jax.sharding import Placement

Routers = dict[str, dict[str, dict[str, Router]]]
"""``{part: {name: {"router": Router}}}``, each array with a leading layer axis."""

Batch = tuple[Int[Array, "B T"], Float[Array, ""], UInt[Array, ""]]
"""Of one step: tokens, the average bits that they read, and the seed of depths and labels."""

FAR_BELOW = 23.0  # scores so far below the gains' logarithm that 1 - mean(gain exp(-S)) has lost none of the mean

# Gradients of scores are of order one. Behind a norm the magnitude tells nothing and its weights' gradient is rounding
# alone, which Adam would scale up to full steps.
ADAM_EPS = 1e-5


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


def magnitude_router(router: Router, offset: float = 0.0) -> Router:
    """A router that scores every slice ``2 log rms(x)``: an error grows with its input, a gain with its square.

    Two hidden units carry it, since ``silu(z) - silu(-z) = z``; the others have no effect yet.

    Args:
        router: gives the shapes, and the first layer of the other units.
        offset: added to the scores.
    """
    signs = jnp.array([1.0, -1.0])
    return dataclasses.replace(
        router,
        hidden=router.hidden.at[..., :2].set(0.0),
        magnitude=jnp.zeros_like(router.magnitude).at[..., :2].set(signs),
        hidden_bias=jnp.zeros_like(router.hidden_bias),
        output=jnp.zeros_like(router.output).at[..., :2, :].set(2 * signs[:, None]),
        output_bias=jnp.full_like(router.output_bias, offset),
    )


@dataclass(frozen=True, kw_only=True)
class RouterTrainer:
    """Fits routers. Call it under ``jax.set_mesh`` of the model's mesh.

    Attributes:
        model: the elastic model; its dtype is that of the matmuls, and of its variables only shapes are read.
        calibration: the recipe.
        windows: calibration tokens, ``[W, T]``.
        kept: of so many slices, from the second on, the scores stay as they are; those of the others are fitted with
            the same hidden units.
        most_bits: budgets above are left out.
    """

    model: ElasticModel
    calibration: CalibrationConfig
    windows: Int[np.ndarray, "W T"]
    kept: int = 0
    most_bits: float = CODE_BITS

    @property
    def placement(self) -> Placement:
        """Where every array lies."""
        return self.model.placed

    @cached_property
    def abstract_state(self) -> RouterState:
        """Shapes, types and shardings of the state."""

        def make(routers: Routers) -> RouterState:
            return RouterState(routers=routers, optimizer=self._optimizer.init(routers))

        return self.placement.abstract(jax.eval_shape(make, routers_of(self.model.variables)))

    def start(self, variables: Variables) -> RouterState:
        """Routers that know magnitudes, and each linear's mean gain, as measured on a batch a budget.

        Where scores are kept, the others know the mean gain alone.
        """
        routers = self._below(routers_of(variables))
        gradients = self._measure(routers, variables, self._plan(0, len(self._budgets)))
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
        healthy = []
        plan = self._plan(index + 1, self._steps)
        with jax.transfer_guard("disallow"):
            for batch in plan:
                state, finite = self._step(state, variables, batch)
                healthy.append(finite)
        return state, all(jax.device_get(healthy))

    @property
    def abstract_step(self) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
        """A step as one program, and its arguments as shapes, types and shardings; a model of shapes will do."""
        shape, whole = (self.calibration.fit_batch_size, self.windows.shape[1]), self.placement.replicated
        batch = (
            jax.ShapeDtypeStruct(shape, self.windows.dtype, sharding=self.placement.batched(shape)),
            jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
            jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole),
        )
        return jax.jit(self._step, donate_argnums=0), (self.abstract_state, self.model.variables, batch)

    def _step(self, state: RouterState, variables: Variables, batch: Batch) -> tuple[RouterState, Array]:
        return self._update(state, self._gradients(state.routers, variables, batch))

    @property
    def _state_shardings(self) -> RouterState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @property
    def _steps(self) -> int:
        return len(self.windows) // self.calibration.fit_batch_size

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        steps = max(self.calibration.fit_epochs * self._steps, 1)
        return optax.adam(optax.cosine_decay_schedule(self.calibration.fit_lr, steps, alpha=FINAL_RATE), eps=ADAM_EPS)

    @property
    def _budgets(self) -> tuple[float, ...]:
        """Those at which the slices to be fitted are read or nearly so, and no others."""
        assert self.model.elastic is not None, "only an elastic model has routers"
        read = widths(self.model.elastic.slice_bits)[self.kept]
        return tuple(bits for bits in self.calibration.budgets if read <= bits <= self.most_bits) or (float(read),)

    def _plan(self, stream: int, steps: int) -> list[Batch]:
        """So many steps, on the devices; windows come again where there are too few."""
        cal = self.calibration
        rng = np.random.default_rng([cal.seed, 2_000_000 + stream])
        windows = np.resize(rng.permutation(self.windows), (steps * cal.fit_batch_size, self.windows.shape[1]))
        batches = windows.reshape(steps, cal.fit_batch_size, -1)
        bits = spread_budgets(self._budgets, steps, rng)
        seeds = rng.integers(2**32, size=steps, dtype=np.uint32)
        rows = zip(batches, np.asarray(bits, np.float32), seeds, strict=True)
        put, put_whole = self.placement.put_batch, self.placement.put_whole
        return [(put(tokens), *put_whole((budget, seed))) for tokens, budget, seed in rows]

    @property
    def _gradients(self) -> jax.stages.Wrapped:
        """See `_gradients_of`."""
        model = self.model
        assert model.elastic is not None, "only an elastic model has routers"
        return _gradients_of(model.config, model.elastic, model.placement, jnp.dtype(model.dtype))

    def _fitted(self, gradients: Routers) -> Routers:
        """The gradients of what is to be fitted, zeros of the rest."""
        if not self.kept:
            return gradients
        return jax.tree.map(partial(_of_outputs, first=self.kept), gradients, is_leaf=_is_router)

    def _measure(self, routers: Routers, variables: Variables, plan: list[Batch]) -> Routers:
        """The mean gradients over the steps of a plan."""
        return self._mean([self._gradients(routers, variables, batch) for batch in plan])

    @cached_property
    def _below(self) -> Callable[[Routers], Routers]:
        """Jitted: routers whose scores that are to be fitted lie far below all gains."""
        one = partial(_cleared, first=self.kept) if self.kept else partial(magnitude_router, offset=-FAR_BELOW)
        below = partial(jax.tree.map, one, is_leaf=_is_router)
        return jax.jit(below, out_shardings=self._state_shardings.routers)

    @cached_property
    def _mean(self) -> Callable[[list[Routers]], Routers]:
        def mean(gradients: list[Routers]) -> Routers:
            return self._fitted(jax.tree.map(lambda *steps: sum(steps) / len(steps), *gradients))

        return jax.jit(mean)

    @cached_property
    def _begin(self) -> Callable[..., RouterState]:
        """Jitted: the state at the mean gains that these gradients tell.

        The gradient of a bias is ``1 - mean(gain exp(-S))``, which ``log mean(gain exp(-S))`` more of bias brings to 0.
        """

        def center(router: Router, gradient: Router) -> Router:
            mean = jnp.maximum(1 - gradient.output_bias, 1e-6)  # gains are not negative, but sums of them round
            return dataclasses.replace(router, output_bias=router.output_bias + jnp.log(mean))

        def begin(routers: Routers, gradients: Routers) -> RouterState:
            routers = jax.tree.map(center, routers, gradients, is_leaf=_is_router)
            return RouterState(routers=routers, optimizer=self._optimizer.init(routers))

        return jax.jit(begin, out_shardings=self._state_shardings)

    @cached_property
    def _update(self) -> Callable[[RouterState, Routers], tuple[RouterState, Array]]:
        """Jitted: the state after a step, and whether it was taken: a gradient that is not finite changes nothing."""

        def update(state: RouterState, gradients: Routers) -> tuple[RouterState, Array]:
            routers, optimizer, finite = guarded_update(
                self._optimizer, jnp.zeros(()), self._fitted(gradients), state.routers, state.optimizer
            )
            return RouterState(routers=routers, optimizer=optimizer), finite

        return jax.jit(update, donate_argnums=0, out_shardings=(self._state_shardings, self.placement.replicated))


@lru_cache(maxsize=8)
def _gradients_of(
    config: LlamaConfig, elastic: ElasticConfig, placement: Placement | None, dtype: DTypeLike
) -> jax.stages.Wrapped:
    """Jitted ``(routers, variables, batch) -> gradients``, means over the batch's tokens.

    One program for all that measures and fits a model's routers: it takes longer to compile than all the rest.
    """
    mean_size = float(np.mean([rows * columns for rows, columns in config.linear_shapes().values()]))
    linear = partial(GainLinear, elastic=elastic, placement=placement, mean_size=mean_size)
    module = Llama(config, linear=linear, dtype=dtype, remat=True)

    def loss(routers: Routers, variables: Variables, tokens: Array, bits: Array, seed: Array) -> Array:
        depths, labels = jax.random.split(jax.random.key(seed))
        policy = RandomDepth(bits=jnp.broadcast_to(bits, tokens.shape[:1]))
        logits: Any = module.apply(with_routers(variables, routers), tokens, policy, rngs={"routing": depths})
        drawn = jax.random.categorical(labels, jax.lax.stop_gradient(logits))
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, drawn))

    def gradients(routers: Routers, variables: Variables, batch: Batch) -> Routers:
        summed = jax.grad(loss)(routers, variables, *batch)
        if placement is not None:
            summed = jax.lax.with_sharding_constraint(summed, placement.shardings(summed))
        return jax.tree.map(lambda g: g / batch[0].size, summed)

    return jax.jit(gradients)


def _cleared(router: Router, first: int) -> Router:
    """The router with scores far below all gains from an output on."""
    return dataclasses.replace(
        router,
        output=router.output.at[..., first:].set(0.0),
        output_bias=router.output_bias.at[..., first:].set(-FAR_BELOW),
    )


def _of_outputs(gradient: Router, first: int) -> Router:
    """The gradient with respect to the outputs from one on, alone."""
    nothing = jax.tree.map(jnp.zeros_like, gradient)
    return dataclasses.replace(
        nothing,
        output=gradient.output.at[..., :first].set(0.0),
        output_bias=gradient.output_bias.at[..., :first].set(0.0),
    )


def _is_router(node: Any) -> bool:
    return isinstance(node, Router)
