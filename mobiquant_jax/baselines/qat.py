"""Block-wise QAT: everything in a block is trained, in the grid's range (EfficientQAT, arXiv 2407.11062, phase 1).

W_n = s (clip(round(W / s) + round(z), 0, 2^n - 1) - round(z))      W, s, z trained, roundings straight-through

The gains of the two norms, which stay in full precision, are trained at the rate of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mobiquant_jax.baselines.grid import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    round_straight_through,
    round_to_grid,
    scale_and_zero,
    shrunk_limits,
)
from mobiquant_jax.baselines.kernels import Params, get_kernels, with_kernels
from mobiquant_jax.baselines.settings import check_number, static
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec
from mobiquant_jax.baselines.training import Parametrization, Trained, build_fit, check_training, epoch_order

NORMS = ("attention_norm", "mlp_norm")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """Settings of block-wise QAT.

    Attributes:
        weight_lr: peak learning rate of weights and norms, AdamW without decay, cosine to a twentieth.
        scale_lr: of the scales and zero points.
        epochs: passes over the windows.
        batch_size: windows a step.
        loss: block error.
        propagated_weight: weight of a second target, the full-precision block on the quantized stream.
        shrink_steps: candidates in the search for the range that training starts from; 0 keeps minimum and maximum.
    """

    weight_lr: float = 1e-4
    scale_lr: float = 1e-4
    epochs: int = static(20)
    batch_size: int = static(1)
    loss: str = static("mse")
    propagated_weight: float = static(0.0)
    shrink_steps: int = static(0)

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_training("qat", self, weight_lr=self.weight_lr, scale_lr=self.scale_lr)
        check_number("qat.epochs", self.epochs, least=1)
        check_number("qat.shrink_steps", self.shrink_steps, least=0)

    @classmethod
    def recipe(cls, bits: int) -> "QATConfig":
        """The settings at a width."""
        return cls()


def parametrization(spec: QuantSpec) -> Parametrization:
    """What block-wise QAT trains: weights, scales and zero points of each kernel, and the norms."""

    def create(block: Params, settings: QATConfig) -> Trained:
        kernels = get_kernels(block, spec.config)
        grids = {
            path: scale_and_zero(*shrunk_limits(kernel, spec.group_size, spec.bits, settings.shrink_steps), spec.bits)
            for path, kernel in kernels.items()
        }
        scales, zeros = ({path: grid[part] for path, grid in grids.items()} for part in (0, 1))
        return {"weight": kernels, "scale": scales, "zero": zeros, "norm": {name: block[name] for name in NORMS}}

    def materialize(block: Params, trained: Trained) -> Params:
        def linear(weight: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
            return round_to_grid(weight, scale, round_straight_through(zero), spec.bits)

        kernels = jax.tree.map(linear, trained["weight"], trained["scale"], trained["zero"])
        return with_kernels(block, kernels) | trained["norm"]

    def optimizer(settings: QATConfig, steps: int) -> optax.GradientTransformation:
        def adamw(rate: float) -> optax.GradientTransformation:
            return optax.adamw(optax.cosine_decay_schedule(rate, steps, alpha=0.05), weight_decay=0.0)

        rates = {"scale": settings.scale_lr, "zero": settings.scale_lr}
        rates |= {"weight": settings.weight_lr, "norm": settings.weight_lr}
        return optax.partition({name: adamw(rate) for name, rate in rates.items()}, {name: name for name in rates})

    def project(trained: Trained) -> Trained:
        clip = partial(jnp.clip, min=SMALLEST_SCALE, max=LARGEST_SCALE)
        return trained | {"scale": jax.tree.map(clip, trained["scale"])}

    return Parametrization(create=create, materialize=materialize, optimizer=optimizer, project=project)


def build(spec: QuantSpec) -> Callable[[BlockTask], BlockOutcome]:
    """Block-wise QAT for the blocks of a model."""
    fit = build_fit(spec, parametrization(spec))

    def quantize_block(task: BlockTask) -> BlockOutcome:
        windows, settings = len(task.target), task.settings
        orders = [epoch_order(windows, settings.batch_size, settings.epochs, rng) for rng in task.rngs]
        return BlockOutcome(params=fit(task, np.stack(orders))[0])

    return quantize_block
