"""Fitting a block's output by gradient descent through its fake-quantized kernels: one scan, no host in the loop.

A method is a `Parametrization`, which says what is trained and how kernels follow from it, and an optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mobiquant_jax.baselines.kernels import Kernels, Params, get_kernels, with_kernels
from mobiquant_jax.baselines.spec import QuantSpec, positions
from mobiquant_jax.calibration.config import LOSSES
from mobiquant_jax.calibration.objective import objective, sample_error
from mobiquant_jax.calibration.optimizer import guarded_update
from mobiquant_jax.models import Block

Trained = dict[str, Any]
"""What is trained for each linear, by path."""


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """How a block's kernels follow from what is trained.

    Attributes:
        create: the starting values for a block's dense kernels.
        materialize: ``(dense kernels, trained) -> fake-quantized kernels``, differentiable in the second.
        project: brings trained values back into their range after each step.
    """

    create: Callable[[Kernels], Trained]
    materialize: Callable[[Kernels, Trained], Kernels]
    project: Callable[[Trained], Trained] = lambda trained: trained


def check_training(method: str, *, steps: int, batch_size: int, loss: str, **rates: float) -> None:
    """Raises ValueError, naming the field, unless a training recipe makes sense."""
    if steps < 1 or batch_size < 1:
        raise ValueError(f"{method} needs at least one pass and one window a step, got {steps} and {batch_size}")
    if loss not in LOSSES:
        raise ValueError(f"{method}.loss={loss!r} is none of {', '.join(LOSSES)}")
    for name, rate in rates.items():
        if rate < 0:
            raise ValueError(f"{method}.{name}={rate} must not be negative")


def epoch_order(windows: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Int[np.ndarray, "steps batch"]:
    """The windows of each step: every epoch takes all of them once, in a new order.

    Raises:
        ValueError: ``batch_size`` does not divide the number of windows.
    """
    if windows % batch_size:
        raise ValueError(f"batch size {batch_size} does not divide {windows} windows")
    return np.concatenate([rng.permutation(windows) for _ in range(epochs)]).reshape(-1, batch_size).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FitData:
    """What one block is fitted to.

    Attributes:
        inputs: the quantized stream that enters it.
        targets: streams that should leave it; their errors are added with the weights.
        weights: of the targets.
    """

    inputs: Float[Array, "N T D"]
    targets: tuple[Float[Array, "N T D"], ...]
    weights: tuple[float, ...]


def compile_fit(
    spec: QuantSpec,
    parametrization: Parametrization,
    optimizer: Callable[[int], optax.GradientTransformation],
    *,
    loss: str,
    keep_best: bool = False,
) -> Callable[[Params, FitData, Int[np.ndarray, "steps batch"]], tuple[Params, Trained]]:
    """Compiles the fit of one block; every block of the model can use it.

    A step whose loss or update is not finite changes nothing.

    Args:
        spec: model, width and type of the matmuls.
        parametrization: what is trained.
        optimizer: from the number of steps.
        loss: block error, a name of ``calibration.config.LOSSES``.
        keep_best: returns the values of the step with the lowest loss on its own batch instead of the last ones.

    Returns:
        Jitted ``(dense block, data, windows of each step) -> (block with dequantized kernels, trained)``.
    """
    module = Block(spec.config, dtype=spec.dtype)

    def batch_loss(trained: Trained, dense: Params, data: FitData, ids: Int[Array, " batch"]) -> Float[Array, ""]:
        fake = with_kernels(dense, parametrization.materialize(get_kernels(dense, spec.config), trained))
        x = data.inputs[ids]
        y, _ = module.apply({"params": fake}, x, positions(x))
        errors = (
            weight * objective(sample_error(y, target[ids], loss), loss)
            for weight, target in zip(data.weights, data.targets, strict=True)
        )
        return sum(errors, start=jnp.zeros(()))

    def fit(dense: Params, data: FitData, ids: Int[np.ndarray, "steps batch"]) -> tuple[Params, Trained]:
        kernels = get_kernels(dense, spec.config)
        transform = optimizer(len(ids))

        def step(carry: Any, ids: Int[Array, " batch"]) -> tuple[Any, None]:
            trained, state, best, lowest = carry
            value, grads = jax.value_and_grad(batch_loss)(trained, dense, data, ids)
            if keep_best:
                better = value < lowest
                best = jax.tree.map(lambda new, old: jnp.where(better, new, old), trained, best)
                lowest = jnp.where(better, value, lowest)
            trained, state, _ = guarded_update(transform, value, grads, trained, state)
            return (parametrization.project(trained), state, best, lowest), None

        start = parametrization.create(kernels)
        carry = (start, transform.init(start), start if keep_best else {}, jnp.inf)
        (last, _, best, _), _ = jax.lax.scan(step, carry, jnp.asarray(ids))
        trained = best if keep_best else last
        return with_kernels(dense, parametrization.materialize(kernels, trained)), trained

    return jax.jit(fit)
