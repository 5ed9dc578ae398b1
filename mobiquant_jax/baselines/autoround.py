"""AutoRound (Cheng et al., arXiv 2309.05516): signed gradient descent on rounding offsets and clip factors.

W_n = s (clip(round(W / s + V) + z, 0, 2^n - 1) - z)        V in [-1/2, 1/2], starts at 0
hi  = alpha max(W_g, 0)   lo = beta min(W_g, 0)              alpha, beta in [0, 1], start at 1

V <- V - lr_t sign(dL / dV)      lr_t = (1 - t / steps) / steps, so that all steps together can just cross half a step
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mobiquant_jax.baselines.grid import round_straight_through, round_to_grid, scale_and_zero
from mobiquant_jax.baselines.kernels import Params, get_kernels, with_kernels
from mobiquant_jax.baselines.settings import check_number, static
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec
from mobiquant_jax.baselines.training import Parametrization, Trained, build_fit, check_training
from mobiquant_jax.quant import unclipped_limits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AutoRoundConfig:
    """Settings of AutoRound.

    Attributes:
        rounding_rate: first step of the offsets in units of ``1 / steps``, falling linearly to 0.
        clipping_rate: first step of the clip factors, likewise.
        steps: iterations a block.
        batch_size: windows an iteration, drawn anew each time.
        loss: block error.
        propagated_weight: weight of a second target, the full-precision block on the quantized stream.
    """

    rounding_rate: float = 1.0
    clipping_rate: float = 1.0
    steps: int = static(200)
    batch_size: int = static(8)
    loss: str = static("mse")
    propagated_weight: float = static(0.0)

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_training("autoround", self, rounding_rate=self.rounding_rate, clipping_rate=self.clipping_rate)
        check_number("autoround.steps", self.steps, least=1)

    @classmethod
    def recipe(cls, bits: int) -> "AutoRoundConfig":
        """The published settings."""
        return cls()


def parametrization(spec: QuantSpec) -> Parametrization:
    """What AutoRound trains: rounding offsets and clip factors of each kernel, by steps of one size."""

    def create(block: Params, _: AutoRoundConfig) -> Trained:
        kernels = get_kernels(block, spec.config)
        ones = {path: jnp.ones((len(kernel) // spec.group_size, kernel.shape[1])) for path, kernel in kernels.items()}
        return {"offset": jax.tree.map(jnp.zeros_like, kernels), "high": ones, "low": ones}

    def materialize(block: Params, trained: Trained) -> Params:
        def linear(kernel: jax.Array, offset: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
            lo, hi = unclipped_limits(kernel, spec.group_size)
            # With 0 inside, factors cannot turn the range of a group of one sign inside out.
            lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
            grid = scale_and_zero(low * lo, high * hi, spec.bits, round_straight_through)
            return round_to_grid(kernel, *grid, spec.bits, offset)

        kernels = get_kernels(block, spec.config)
        rounded = jax.tree.map(linear, kernels, trained["offset"], trained["high"], trained["low"])
        return with_kernels(block, rounded)

    def optimizer(settings: AutoRoundConfig, steps: int) -> optax.GradientTransformation:
        def descent(rate: float) -> optax.GradientTransformation:
            sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
            return optax.chain(sign, optax.scale_by_learning_rate(optax.linear_schedule(rate / steps, 0.0, steps)))

        rates = {"offset": settings.rounding_rate, "high": settings.clipping_rate, "low": settings.clipping_rate}
        return optax.partition({name: descent(rate) for name, rate in rates.items()}, {name: name for name in rates})

    def project(trained: Trained) -> Trained:
        limits = {"offset": (-0.5, 0.5), "high": (0.0, 1.0), "low": (0.0, 1.0)}
        return {name: jax.tree.map(lambda x, name=name: jnp.clip(x, *limits[name]), trained[name]) for name in limits}

    return Parametrization(create=create, materialize=materialize, optimizer=optimizer, project=project, keep_best=True)


def build(spec: QuantSpec) -> Callable[[BlockTask], BlockOutcome]:
    """AutoRound for the blocks of a model."""
    fit = build_fit(spec, parametrization(spec))

    def quantize_block(task: BlockTask) -> BlockOutcome:
        windows, settings = len(task.target), task.settings
        if settings.batch_size > windows:
            raise ValueError(f"autoround.batch_size={settings.batch_size} exceeds the {windows} windows")
        drawn = [
            [rng.choice(windows, settings.batch_size, replace=False) for _ in range(settings.steps)]
            for rng in task.rngs
        ]
        return BlockOutcome(params=fit(task, np.asarray(drawn, np.int32))[0])

    return quantize_block
