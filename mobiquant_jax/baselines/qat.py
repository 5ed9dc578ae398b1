"""Block-wise QAT: weights, scales and zero points of a block are all trained (EfficientQAT, arXiv 2407.11062, phase 1).

W_n = s (clip(round(W / s) + round(z), 0, 2^n - 1) - round(z))      W, s, z trained, roundings straight-through
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from mobiquant_jax.baselines.grid import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    round_straight_through,
    round_to_grid,
    scale_and_zero,
    shrunk_limits,
)
from mobiquant_jax.baselines.kernels import Kernels
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec
from mobiquant_jax.baselines.training import (
    FitData,
    Parametrization,
    Trained,
    check_training,
    compile_fit,
    epoch_order,
)


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """Settings of block-wise QAT.

    Attributes:
        epochs: passes over the windows.
        batch_size: windows a step.
        weight_lr: peak learning rate of the weights, AdamW without decay, cosine to a twentieth.
        scale_lr: of the scales and zero points.
        shrink_steps: candidates in the search for the range that training starts from; 0 keeps minimum and maximum.
        loss: block error.
    """

    epochs: int = 20
    batch_size: int = 1
    weight_lr: float = 1e-4
    scale_lr: float = 1e-4
    shrink_steps: int = 0
    loss: str = "mse"

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_training(
            "qat",
            steps=self.epochs,
            batch_size=self.batch_size,
            loss=self.loss,
            weight_lr=self.weight_lr,
            scale_lr=self.scale_lr,
            shrink_steps=self.shrink_steps,
        )

    @classmethod
    def recipe(cls, bits: int) -> "QATConfig":
        """The settings at a width."""
        return cls()


def build(spec: QuantSpec, config: QATConfig) -> Callable[[BlockTask], BlockOutcome]:
    """Block-wise QAT for the blocks of a model."""

    def create_linear(kernel: jax.Array) -> Trained:
        scale, zero = scale_and_zero(*shrunk_limits(kernel, spec.group_size, spec.bits, config.shrink_steps), spec.bits)
        return {"kernel": kernel, "scale": scale, "zero": zero}

    def materialize_linear(trained: Trained) -> jax.Array:
        scale = jnp.clip(trained["scale"], SMALLEST_SCALE, LARGEST_SCALE)
        return round_to_grid(trained["kernel"], scale, round_straight_through(trained["zero"]), spec.bits)

    def optimizer(steps: int) -> optax.GradientTransformation:
        def adamw(rate: float) -> optax.GradientTransformation:
            return optax.adamw(optax.cosine_decay_schedule(rate, steps, alpha=0.05), weight_decay=0.0)

        def labels(trained: Trained) -> Trained:
            return {
                path: {name: "weight" if name == "kernel" else "grid" for name in trained[path]} for path in trained
            }

        return optax.partition({"weight": adamw(config.weight_lr), "grid": adamw(config.scale_lr)}, labels)

    def create(kernels: Kernels) -> Trained:
        return {path: create_linear(kernel) for path, kernel in kernels.items()}

    def materialize(_: Kernels, trained: Trained) -> Kernels:
        return {path: materialize_linear(linear) for path, linear in trained.items()}

    fit = compile_fit(spec, Parametrization(create=create, materialize=materialize), optimizer, loss=config.loss)

    def quantize_block(task: BlockTask) -> BlockOutcome:
        order = epoch_order(len(task.quantized), config.batch_size, config.epochs, task.rng)
        data = FitData(inputs=task.quantized, targets=(task.target,), weights=(1.0,))
        return BlockOutcome(params=fit(task.dense, data, order)[0])

    return quantize_block
