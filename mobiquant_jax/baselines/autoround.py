"""AutoRound (Cheng et al., arXiv 2309.05516): signed gradient descent on rounding offsets and clip factors.

W_n = s (clip(round(W / s + V) + z, 0, 2^n - 1) - z)        V in [-1/2, 1/2], starts at 0
hi  = alpha max(W_g)      lo = beta min(W_g)                 alpha, beta in [0, 1], start at 1

V <- V - lr_t sign(dL / dV)      lr_t = (1 - t / steps) / 200
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mobiquant_jax.baselines.grid import round_straight_through, round_to_grid, scale_and_zero
from mobiquant_jax.baselines.kernels import Kernels
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec
from mobiquant_jax.baselines.training import FitData, Parametrization, Trained, check_training, compile_fit
from mobiquant_jax.quant import unclipped_limits


@dataclass(frozen=True, kw_only=True)
class AutoRoundConfig:
    """Settings of AutoRound.

    Attributes:
        steps: iterations a block.
        batch_size: windows an iteration, drawn anew each time.
        rounding_lr: first step of the offsets, falling linearly to 0.
        clipping_lr: first step of the clip factors.
        loss: block error.
    """

    steps: int = 200
    batch_size: int = 8
    rounding_lr: float = 1 / 200
    clipping_lr: float = 1 / 200
    loss: str = "mse"

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_training(
            "autoround",
            steps=self.steps,
            batch_size=self.batch_size,
            loss=self.loss,
            rounding_lr=self.rounding_lr,
            clipping_lr=self.clipping_lr,
        )

    @classmethod
    def recipe(cls, bits: int) -> "AutoRoundConfig":
        """The published settings."""
        return cls()


def build(spec: QuantSpec, config: AutoRoundConfig) -> Callable[[BlockTask], BlockOutcome]:
    """AutoRound for the blocks of a model."""

    def create_linear(kernel: jax.Array) -> Trained:
        ones = jnp.ones((len(kernel) // spec.group_size, kernel.shape[1]))
        return {"offset": jnp.zeros_like(kernel), "high": ones, "low": ones}

    def materialize_linear(kernel: jax.Array, trained: Trained) -> jax.Array:
        lo, hi = unclipped_limits(kernel, spec.group_size)
        scale, zero = scale_and_zero(trained["low"] * lo, trained["high"] * hi, spec.bits, round_straight_through)
        return round_to_grid(kernel, scale, zero, spec.bits, trained["offset"])

    def project_linear(trained: Trained) -> Trained:
        factors = {name: jnp.clip(trained[name], 0.0, 1.0) for name in ("high", "low")}
        return {"offset": jnp.clip(trained["offset"], -0.5, 0.5)} | factors

    def optimizer(steps: int) -> optax.GradientTransformation:
        def descent(rate: float) -> optax.GradientTransformation:
            sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
            return optax.chain(sign, optax.scale_by_learning_rate(optax.linear_schedule(rate, 0.0, steps)))

        def labels(trained: Trained) -> Trained:
            return {
                path: {name: "rounding" if name == "offset" else "clipping" for name in trained[path]}
                for path in trained
            }

        groups = {"rounding": descent(config.rounding_lr), "clipping": descent(config.clipping_lr)}
        return optax.partition(groups, labels)

    parametrization = Parametrization(
        create=lambda kernels: {path: create_linear(kernel) for path, kernel in kernels.items()},
        materialize=lambda kernels, trained: _each(materialize_linear, kernels, trained),
        project=lambda trained: {path: project_linear(linear) for path, linear in trained.items()},
    )
    fit = compile_fit(spec, parametrization, optimizer, loss=config.loss, keep_best=True)

    def quantize_block(task: BlockTask) -> BlockOutcome:
        windows = len(task.quantized)
        if config.batch_size > windows:
            raise ValueError(f"autoround.batch_size={config.batch_size} exceeds the {windows} windows")
        drawn = [task.rng.choice(windows, config.batch_size, replace=False) for _ in range(config.steps)]
        data = FitData(inputs=task.quantized, targets=(task.target,), weights=(1.0,))
        return BlockOutcome(params=fit(task.dense, data, np.asarray(drawn, np.int32))[0])

    return quantize_block


def _each(function: Callable[[jax.Array, Trained], jax.Array], kernels: Kernels, trained: Trained) -> Kernels:
    return {path: function(kernel, trained[path]) for path, kernel in kernels.items()}
