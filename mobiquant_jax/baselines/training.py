"""Fitting a block's output by gradient descent through its fake-quantized kernels: one scan, no host in the loop.

A method is a `Parametrization`, which says what is trained, how a block follows from it, and by which optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mobiquant_jax.baselines.kernels import Params
from mobiquant_jax.baselines.settings import check_number
from mobiquant_jax.baselines.spec import BlockTask, QuantSpec, block_forward, positions
from mobiquant_jax.calibration.config import LOSSES
from mobiquant_jax.calibration.objective import objective, sample_error
from mobiquant_jax.calibration.optimizer import guarded_update
from mobiquant_jax.models import Block

Trained = Any
"""What is trained, a pytree."""


class TrainingSettings(Protocol):
    """What every trained method has among its settings."""

    @property
    def batch_size(self) -> int:
        """Windows a step."""

    @property
    def loss(self) -> str:
        """Block error, a name of ``calibration.config.LOSSES``."""

    @property
    def propagated_weight(self) -> float:
        """Weight of a second target, the full-precision block on the quantized stream."""


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """How a block follows from what is trained.

    Attributes:
        create: the starting values, from a dense block's parameters and the settings.
        materialize: ``(dense block, trained) -> fake-quantized block``, differentiable in the second.
        optimizer: from the settings and the number of steps.
        project: brings trained values back into their range after each step.
        keep_best: keep the values of the step with the lowest loss on its own batch instead of the last ones.
    """

    create: Callable[[Params, Any], Trained]
    materialize: Callable[[Params, Trained], Params]
    optimizer: Callable[[Any, int], optax.GradientTransformation]
    project: Callable[[Trained], Trained] = lambda trained: trained
    keep_best: bool = False


Fit = Callable[[BlockTask, Int[np.ndarray, "R steps batch"]], tuple[Params, Trained]]


def check_training(method: str, settings: TrainingSettings, **rates: float) -> None:
    """Raises ValueError, naming the field, unless the settings that all trained methods share make sense."""
    check_number(f"{method}.batch_size", settings.batch_size, least=1)
    if settings.loss not in LOSSES:
        raise ValueError(f"{method}.loss={settings.loss!r} is none of {', '.join(LOSSES)}")
    for name, rate in ({"propagated_weight": settings.propagated_weight} | rates).items():
        check_number(f"{method}.{name}", rate, least=0)


def epoch_order(windows: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Int[np.ndarray, "steps batch"]:
    """The windows of each step: every epoch takes all of them once, in a new order.

    Raises:
        ValueError: ``batch_size`` does not divide the number of windows.
    """
    if windows % batch_size:
        raise ValueError(f"batch size {batch_size} does not divide {windows} windows")
    return np.concatenate([rng.permutation(windows) for _ in range(epochs)]).reshape(-1, batch_size).astype(np.int32)


def build_fit(spec: QuantSpec, parametrization: Parametrization) -> Fit:
    """The fit of one block, for all runs of a task at once; compiled once for all blocks.

    A step whose loss or update is not finite changes nothing.

    Args:
        spec: model, width and type of the matmuls.
        parametrization: what is trained.

    Returns:
        ``(task, windows of each run's steps) -> (blocks with dequantized kernels, trained)``, leading axes R.
    """
    module = Block(spec.config, dtype=spec.dtype)

    def batch_loss(
        trained: Trained,
        dense: Params,
        x: Float[Array, "B T D"],
        targets: tuple[Float[Array, "B T D"], ...],
        settings: TrainingSettings,
    ) -> Float[Array, ""]:
        y, _ = module.apply({"params": parametrization.materialize(dense, trained)}, x, positions(x))
        errors = [objective(sample_error(y, target, settings.loss), settings.loss) for target in targets]
        return errors[0] + sum(settings.propagated_weight * error for error in errors[1:])

    def fit(
        settings: TrainingSettings,
        dense: Params,
        inputs: Float[Array, "N T D"],
        target: Float[Array, "N T D"],
        own: Float[Array, "N T D"] | None,
        order: Int[Array, "steps batch"],
    ) -> tuple[Params, Trained]:
        optimizer = parametrization.optimizer(settings, len(order))
        streams = (target,) if own is None else (target, own)

        def step(carry: Any, ids: Int[Array, " batch"]) -> tuple[Any, None]:
            trained, state, best, lowest = carry
            targets = tuple(stream[ids] for stream in streams)
            value, grads = jax.value_and_grad(batch_loss)(trained, dense, inputs[ids], targets, settings)
            if parametrization.keep_best:
                better = value < lowest
                best = jax.tree.map(partial(jnp.where, better), trained, best)
                lowest = jnp.where(better, value, lowest)
            trained, state, _ = guarded_update(optimizer, value, grads, trained, state)
            return (parametrization.project(trained), state, best, lowest), None

        start = parametrization.create(dense, settings)
        carry = (start, optimizer.init(start), start if parametrization.keep_best else {}, jnp.inf)
        (last, _, best, _), _ = jax.lax.scan(step, carry, order)
        trained = best if parametrization.keep_best else last
        return parametrization.materialize(dense, trained), trained

    runs = jax.jit(jax.vmap(fit, in_axes=(0, None, 0, None, 0, 0)))
    forward = jax.jit(jax.vmap(partial(block_forward, spec.config), in_axes=(None, 0)))

    def fit_task(task: BlockTask, order: Int[np.ndarray, "R steps batch"]) -> tuple[Params, Trained]:
        own = forward(task.dense, task.quantized) if task.settings.propagated_weight else None
        return runs(task.settings, task.dense, task.quantized, task.target, own, jnp.asarray(order))

    return fit_task
