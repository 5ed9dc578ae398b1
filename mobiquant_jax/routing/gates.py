"""Binary gates with a straight-through gradient, and the token depths they make."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gate(
    scores: Float[Array, "*batch E-1"], threshold: Float[Array, "*#batch 1"] | float, temperature: float
) -> Float[Array, "*batch E-1"]:
    """Opens a gate where the score exceeds the threshold, ``g = 1[S > tau]``.

    Args:
        scores: router scores of slices 2..E.
        threshold: tau, broadcast against the scores; higher means fewer slices.
        temperature: width T of the surrogate ``sigmoid((S - tau) / T)`` whose gradient replaces the step's.

    Returns:
        0.0 or 1.0, with the surrogate's gradient.
    """
    surrogate = jax.nn.sigmoid((scores - threshold) / temperature)
    hard = (scores > threshold).astype(scores.dtype)
    return hard + (surrogate - jax.lax.stop_gradient(surrogate))


def prefix_masks(gates: Float[Array, "*batch E-1"]) -> Float[Array, "*batch E-1"]:
    """Keeps a slice only where every slice before it is kept: ``m_e = prod_{j <= e} g_j``.

    A residual means nothing without the code it corrects, so masks are prefixes and a token has a depth.
    """
    return jnp.cumprod(gates, axis=-1)


def depth_masks(depth: Int[Array, "*batch"], slices: int) -> Float[Array, "*batch E-1"]:
    """The masks of slices 2..E at given depths (1..E)."""
    return (depth[..., None] > jnp.arange(1, slices)).astype(jnp.float32)


def mask_depth(masks: Float[Array, "*batch E-1"]) -> Int[Array, "*batch"]:
    """The depth of each token, ``1 + sum_e m_e``: slice 1 is always read."""
    return 1 + jnp.sum(masks, axis=-1).astype(jnp.int32)


def mask_bits(masks: Float[Array, "*batch E-1"], slice_bits: tuple[int, ...]) -> Float[Array, "*batch"]:
    """The bits each token reads, ``b_1 + sum_e b_e m_e``; differentiable in the masks."""
    return slice_bits[0] + masks @ jnp.asarray(slice_bits[1:], masks.dtype)
