"""What whole slices gain, measured, against what the routers expect of them.

`gains` takes the errors of different linears for independent. Weights that were tuned together are not: they make up
for one another's errors, the more so the longer they were tuned, and a slice that was tuned apart from the coarser ones
(`fine_slices`) differs from them by far more than it gains. What reading slice e at all linears really gains a token,
and what the routers expect of that,

    real_e = D_{e-1} - D_e        expected_e = E_t sum_l b_e size_l exp(S_tle)

with D_e the divergence of the model at uniform depth e from itself at full depth, then differ by a factor of its own
for each slice. Scores are corrected by its logarithm, as far as it takes slices back behind the coarser ones:

    S_e += min_{j <= e} log(real_j / expected_j) - log(real_2 / expected_2)

Slices are never put forward: at a mixture of depths weights make up for less than they do at a uniform one, for which
they were tuned.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.calibration.distillation import distillation_loss
from mobiquant_jax.models.elastic import ElasticModel, Variables
from mobiquant_jax.routing import Router, UniformDepth

FARTHEST = 12.0  # no gain at all puts a slice so far back, in nats


def measure_slices(
    model: ElasticModel, variables: Variables, batches: Int[Array, "n B T"]
) -> tuple[Float[Array, " E"], Float[Array, " E-1"]]:
    """Divergences at uniform depths, and what routers expect slices 2..E to gain; traceable.

    Args:
        model: an elastic model; of its variables nothing is read.
        variables: the model's, with routers.
        batches: tokens; each batch runs at every depth.

    Returns:
        ``(divergence of depth 1..E from full depth, expected gain of slices 2..E)``, both in nats a token. A slice's
        scores are those of the model at the depth before it.
    """
    assert model.elastic is not None, "only an elastic model has slices"
    slice_bits, sizes = model.elastic.slice_bits, model.config.linear_shapes()
    mean_size = float(np.mean([rows * columns for rows, columns in sizes.values()]))

    def run(tokens: Array, depth: Any) -> tuple[Array, Array]:
        policy = UniformDepth(depth=jnp.broadcast_to(depth, tokens.shape[:1]))
        with jax.default_matmul_precision("float32"):  # differences of divergences are small
            logits, state = model.module.apply(variables, tokens, policy, mutable=["scores"])
        expected = jnp.zeros(len(slice_bits) - 1)
        for path, (rows, columns) in sizes.items():
            part, name = path.split("/")
            (scores,) = state["scores"]["layers"][part][name]["scores"]  # [L, B, T, E-1]
            expected += rows * columns / mean_size * jnp.sum(jnp.mean(jnp.exp(scores), axis=(1, 2)), axis=0)
        return logits, expected * jnp.asarray(slice_bits[1:], jnp.float32)

    def batch(tokens: Int[Array, "B T"]) -> tuple[Array, Array]:
        full, _ = run(tokens, len(slice_bits))

        def at(depth: Array) -> tuple[Array, Array]:
            logits, expected = run(tokens, depth)
            return distillation_loss(logits, full), expected

        divergences, expected = jax.lax.map(at, jnp.arange(1, len(slice_bits)))
        return jnp.append(divergences, 0.0), jnp.diagonal(expected)

    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(batch, batches))


def slice_offsets(divergences: Float[Array, " E"], expected: Float[Array, " E-1"]) -> Float[Array, " E-1"]:
    """What is added to the scores of slices 2..E: 0 for the first of them, never more for a later one."""
    real = divergences[:-1] - divergences[1:]
    ratio = jnp.log(jnp.maximum(real, 1e-12)) - jnp.log(expected)
    return jnp.maximum(jax.lax.cummin(ratio - ratio[0]), -FARTHEST)


def add_offsets(routers: Any, offsets: Float[Array, " E-1"]) -> Any:
    """Routers, in any tree, whose scores are so much higher."""

    def add(router: Router) -> Router:
        return dataclasses.replace(router, output_bias=router.output_bias + offsets)

    return jax.tree.map(add, routers, is_leaf=lambda node: isinstance(node, Router))
