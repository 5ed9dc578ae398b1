"""Learnable weight clipping (OmniQuant, arXiv 2308.13137): group limits shrunk by two sigmoids.

hi = sigmoid(gamma) * max(W_g)        lo = sigmoid(beta) * min(W_g)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobiquant_jax.quant.grid import check_group_size, group

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: almost no clipping, with a gradient


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Clipping logits of one linear.

    Attributes:
        gamma: logit of the share of the group maximum that is kept, ``[groups, out]``.
        beta: logit of the share of the group minimum that is kept, ``[groups, out]``.
    """

    gamma: Float[Array, "groups out"]
    beta: Float[Array, "groups out"]

    @classmethod
    def create(cls, in_features: int, out_features: int, group_size: int) -> "Clipping":
        """Logits at their starting value.

        Raises:
            ValueError: if ``group_size`` does not divide ``in_features``.
        """
        check_group_size(in_features, group_size)
        logits = jnp.full((in_features // group_size, out_features), INITIAL_LOGIT, jnp.float32)
        return cls(gamma=logits, beta=logits)


def limits(
    weight: Float[Array, "in out"], clipping: Clipping
) -> tuple[Float[Array, "groups out"], Float[Array, "groups out"]]:
    """The clipped ``(lo, hi)`` of each group, differentiable in the weight and the logits."""
    grouped = group(weight, weight.shape[0] // clipping.gamma.shape[0])
    lo = jax.nn.sigmoid(clipping.beta) * jnp.min(grouped, axis=1)
    hi = jax.nn.sigmoid(clipping.gamma) * jnp.max(grouped, axis=1)
    return lo, hi


def unclipped_limits(
    weight: Float[Array, "in out"], group_size: int
) -> tuple[Float[Array, "groups out"], Float[Array, "groups out"]]:
    """The plain ``(min, max)`` of each group: round-to-nearest's range."""
    grouped = group(weight, group_size)
    return jnp.min(grouped, axis=1), jnp.max(grouped, axis=1)
