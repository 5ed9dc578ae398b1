"""Which tokens lose most, whether they are the same at every width, and whether the router knows them.

Two measures of a token's error at depth k: what it loses of its own output, ``|x (W_k - W_E)| / |x W_E|`` (relative),
and ``|x (W_k - W_E)|`` (absolute), which weighs a token by what it passes on.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mobiquant_jax.analysis.probe import Probe

WORST_SHARE = 0.1
LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Where the distribution of relative errors is read."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenErrors:
    """Statistics over the tokens of a window, for each linear.

    Attributes:
        mean: mean relative error at depths 1..E-1.
        quantiles: of the relative errors, at `LEVELS`.
        overlap: how many of the worst tokens at one depth are among the worst at another, by absolute error.
        relative_overlap: the same by relative error.
        router_correlation: Spearman's, of the scores of slices 2..E with the squared absolute error each removes.
        norm_correlation: the same of the input's norm.
    """

    mean: Float[Array, "L N E-1"]
    quantiles: Float[Array, "levels L N E-1"]
    overlap: Float[Array, "L N E-1 E-1"]
    relative_overlap: Float[Array, "L N E-1 E-1"]
    router_correlation: Float[Array, "L N E-1"]
    norm_correlation: Float[Array, "L N E-1"]


def summarize(probe: Probe) -> TokenErrors:
    """The statistics of a window's probe."""
    by_depth = jnp.moveaxis(squared_errors(probe), -1, 0)  # [E, L, N, B, T]
    removed = by_depth[:-1] - by_depth[1:]  # [E-1, ...]
    scores = jnp.moveaxis(probe.scores, -1, 0)
    return TokenErrors(
        mean=jnp.mean(probe.errors, axis=(2, 3)),
        quantiles=jnp.quantile(probe.errors, jnp.asarray(LEVELS), axis=(2, 3)),
        overlap=overlap(_flat(by_depth[:-1])),
        relative_overlap=overlap(_flat(jnp.moveaxis(probe.errors, -1, 0))),
        router_correlation=jnp.moveaxis(rank_correlation(_flat(scores), _flat(removed)), 0, -1),
        norm_correlation=jnp.moveaxis(rank_correlation(_flat(probe.norm), _flat(removed)), 0, -1),
    )


def squared_errors(probe: Probe) -> Float[Array, "L N B T E"]:
    """Squared absolute errors at every depth, zero at the last one."""
    squared = jnp.square(probe.errors * probe.magnitude[..., None])
    return jnp.concatenate([squared, jnp.zeros_like(squared[..., :1])], axis=-1)


def worst_tokens(errors: Float[Array, "*batch T"], share: float = WORST_SHARE) -> Bool[Array, "*batch T"]:
    """Marks the tokens of largest error, exactly ``round(share * T)`` of them."""
    rank = jnp.argsort(jnp.argsort(errors, axis=-1, descending=True), axis=-1)
    return rank < round(share * errors.shape[-1])


def overlap(errors: Float[Array, "K *batch T"]) -> Float[Array, "*batch K K"]:
    """``|A_i & A_j| / |A_i|`` of the worst tokens A at K depths; independent sets would share `WORST_SHARE`."""
    worst = jnp.moveaxis(worst_tokens(errors), 0, -2).astype(jnp.float32)  # [*batch, K, T]
    return jnp.einsum("...it,...jt->...ij", worst, worst) / jnp.sum(worst[..., :1, :], axis=-1, keepdims=True)


def rank_correlation(a: Float[Array, "*#batch T"], b: Float[Array, "*#batch T"]) -> Float[Array, "*batch"]:
    """Spearman's rank correlation over the last axis; ties keep their order."""

    def centred(values: Float[Array, "*batch T"]) -> Float[Array, "*batch T"]:
        return jnp.argsort(jnp.argsort(values, axis=-1), axis=-1) - (values.shape[-1] - 1) / 2

    count = a.shape[-1]
    return jnp.sum(centred(a) * centred(b), axis=-1) / (count * (count**2 - 1) / 12)


def _flat(values: Float[Array, "*batch B T"]) -> Float[Array, "*batch BT"]:
    return values.reshape(*values.shape[:-2], -1)
