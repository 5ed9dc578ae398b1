"""Weighted quantiles by bisection: no sort, for which a mesh would have to exchange all values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_STEPS = 33  # halve the 2^32 patterns of a float32 down to two neighbours
_MAGNITUDE = 0x7FFFFFFF


def cutoff(
    values: Float[Array, "*shape"], costs: Float[Array, "*shape"], limit: Float[Array, ""] | float
) -> Float[Array, ""]:
    """The least number that the values above it cost no more than a limit: one of the values, or -inf.

        min {c : sum_{i: v_i > c} cost_i <= limit}

    With costs of 1 and a limit of ``(1 - q) n`` that is the q-quantile.

    Args:
        values: finite; what a device flushes to zero is zero.
        costs: not negative.
        limit: not negative; may be traced.
    """
    values = values.astype(jnp.float32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # too much lies above the low one, not above the high one
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which their sum might overflow
        within = jnp.sum(jnp.where(values > _number(middle), costs, 0.0)) <= limit
        between = middle > low  # neighbours have no number between them: they are the result
        return jnp.where(within, low, middle), jnp.where(within & between, middle, high)

    bounds = (_rank(values.min()) - 1, _rank(values.max()))
    _, high = jax.lax.fori_loop(0, _STEPS, halve, bounds)
    found = jnp.min(jnp.where(values >= _number(high), values, jnp.inf))  # itself: zeros may pass for what is near
    return jnp.where(jnp.sum(costs) <= limit, -jnp.inf, found)


def _rank(number: Float[Array, ""]) -> Int[Array, ""]:
    """The integers in the order of the float32 numbers whose bits they hold."""
    bits = jax.lax.bitcast_convert_type(number, jnp.int32)
    return jnp.where(bits < 0, bits ^ _MAGNITUDE, bits)


def _number(rank: Int[Array, ""]) -> Float[Array, ""]:
    """Undoes `_rank`."""
    return jax.lax.bitcast_convert_type(jnp.where(rank < 0, rank ^ _MAGNITUDE, rank), jnp.float32)
