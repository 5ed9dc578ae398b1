"""The block reconstruction error and the budget penalty."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sample_error(output: Float[Array, "B T D"], target: Float[Array, "B T D"], loss: str) -> Float[Array, " B"]:
    """The error of each window's block output.

        mse        mean_td (y - y*)^2
        relative   mean_t  sum_d (y - y*)^2 / sum_d y*^2

    The next block normalizes each token by its RMS, so the relative error is what it sees; the plain one is ruled by an
    attention sink whose energy is 10^4 times the median token's.

    Args:
        output: the quantized block's output.
        target: the full-precision block's.
        loss: a name of ``config.LOSSES``; ``"log_relative"`` measures as ``"relative"``.
    """
    squared = jnp.square(output.astype(jnp.float32) - target.astype(jnp.float32))  # [B, T, D]
    if loss == "mse":
        return jnp.mean(squared, axis=(1, 2))
    energy = jnp.sum(jnp.square(target.astype(jnp.float32)), axis=-1)  # [B, T]
    return jnp.mean(jnp.sum(squared, axis=-1) / (energy + 1e-6), axis=1)


def objective(error: Float[Array, " B"], loss: str) -> Float[Array, ""]:
    """What is minimized: the mean error over windows, or the mean of its logarithm."""
    return jnp.mean(jnp.log(error + 1e-12) if loss == "log_relative" else error)


def scheduled_budget(progress: Float[Array, ""], last: Float[Array, ""], first: float = 8.0) -> Float[Array, ""]:
    """B*(t): from full precision down to the target, linear in the share of steps done, then held for a fifth."""
    return first + (last - first) * jnp.minimum(progress / 0.8, 1.0)


def budget_penalty(bits: Float[Array, ""], target: Float[Array, ""], weight: float) -> Float[Array, ""]:
    """``lambda (B - B*)^2`` over the block's average bits."""
    with jax.named_scope("budget_penalty"):
        return weight * jnp.square(bits - target)
