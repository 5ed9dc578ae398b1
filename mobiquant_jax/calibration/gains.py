"""What reading a slice gains a token: the target that routers are fitted to.

An error e in a linear's output at one token adds to the expected loss, to second order,

    E[loss(y + e)] - loss(y) = 1/2 E[(g . e)^2]

with g the gradient at y of a loss whose labels are drawn from the model itself: E[g g^T] is the Fisher information.
Slice e of the weights, ``R_e = W_e - W_{e-1}``, takes away an error ``x R_e``, which costs b_e bits for each of the
linear's weights. So what a token gains for the price is

    gain_e = (g . x R_e)^2 / (2 b_e size)

and the expected loss is least, at equal average bits, where all slices are read whose expected gain exceeds one price
for all tokens of all linears: a global threshold (Lagrange multiplier) on the logarithm of the expected gain.

That takes errors of different tokens, linears and slices for independent, gains for falling from slice to slice, and
the model at the depths of a step for the one whose loss counts. Where attention averages the errors of many tokens the
first does not hold: the gain of ``v_proj`` comes out too low.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobiquant_jax.models.elastic import ElasticLinear
from mobiquant_jax.ops import sliced_matmul
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import mask_depth


def pull_back(
    g: Float[Array, "B T out"], x: Float[Array, "B T in"], weight: SlicedWeight, masks: Float[Array, "B T E-1"]
) -> tuple[Float[Array, "B T in"], Float[Array, "B T E-1"]]:
    """A gradient with respect to the product, pulled back through the slices of the weight.

    On a part of the weight these are partial sums: of the first over the outputs, of the second over the inputs too.

    Returns:
        The gradient with respect to the input, in float32, and ``g . x R_e`` of slices 2..E.
    """
    reads = jnp.stack([weight.dequantize(k) for k in range(1, len(weight.planes) + 1)])
    residuals = jnp.diff(reads, axis=0, prepend=0.0)  # [E, in, out]
    back = jnp.einsum("bto,eio->btei", g, residuals.astype(g.dtype), preferred_element_type=jnp.float32)
    removed = jnp.einsum("btei,bti->bte", back[:, :, 1:], x.astype(jnp.float32))  # g . x R_e = x . (R_e g)
    return back[:, :, 0] + jnp.einsum("btei,bte->bti", back[:, :, 1:], masks), removed


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def scored_matmul(
    x: Float[Array, "B T in"],
    weight: SlicedWeight,
    masks: Float[Array, "B T E-1"],
    scores: Float[Array, "B T E-1"],
    prices: tuple[float, ...],
    matmul: Callable[..., Array] = sliced_matmul,
    pull: Callable[..., Any] = pull_back,
) -> Float[Array, "B T out"]:
    """``y[t] = x[t] @ W_{depth[t]}``, whose backward pass gives the scores the gradient of their own likelihood.

    Were a gain exponentially distributed with mean ``exp(S)``, its negative log-likelihood would be
    ``S + gain exp(-S)``. Its expectation is least at ``S = log E[gain]`` whatever the true distribution, so

        d/dS = 1 - gain exp(-S)

    is the cotangent of the scores, and routers learn from nothing but the backward pass of the model's loss. The
    input gets the true gradient of the product; the weight gets none.

    Args:
        x: inputs.
        weight: the sliced kernel.
        masks: of slices 2..E, prefixes of ones.
        scores: of slices 2..E; the product does not depend on them.
        prices: what slices 2..E cost.
        matmul: `sliced_matmul`, or what stands for it on a mesh.
        pull: `pull_back`, likewise.
    """
    del scores, prices, pull
    return matmul(x, weight, mask_depth(masks))


def _forward(
    x: Array,
    weight: SlicedWeight,
    masks: Array,
    scores: Array,
    prices: tuple[float, ...],
    matmul: Callable[..., Array],
    pull: Callable[..., Any],
) -> Any:
    return scored_matmul(x, weight, masks, scores, prices, matmul, pull), (x, weight, masks, scores)


def _backward(
    prices: tuple[float, ...],
    matmul: Callable[..., Array],
    pull: Callable[..., Any],
    saved: Any,
    g: Float[Array, "B T out"],
) -> Any:
    del matmul
    x, weight, masks, scores = saved
    to_x, removed = pull(g, x, weight, masks)
    gains = removed**2 / (2 * jnp.asarray(prices))
    return to_x.astype(x.dtype), None, None, 1 - gains * jnp.exp(-scores)


scored_matmul.defvjp(_forward, _backward)


class GainLinear(ElasticLinear):
    """An `ElasticLinear` whose router, in the backward pass, is fitted to what its slices gain.

    Attributes:
        mean_size: parameters of the model's average linear, the unit of prices: scores then compare linears.
    """

    mean_size: float = 1.0

    def multiply(
        self, x: Float[Array, "B T in"], weight: SlicedWeight, masks: Float[Array, "B T E-1"], scores: Array
    ) -> Float[Array, "B T out"]:
        """See `ElasticLinear`."""
        size = x.shape[-1] * self.features / self.mean_size
        prices = tuple(bits * size for bits in self.elastic.slice_bits[1:])
        return scored_matmul(x, weight, jax.lax.stop_gradient(masks), scores, prices, self.matmul, self.pull)

    @property
    def pull(self) -> Callable[..., Any]:
        """`pull_back`, on each device's own shards where there is a mesh."""
        if self.placement is None:
            return pull_back
        assert self.name is not None, "a block names its linears"
        return self.placement.matmul_gradient(self.name, pull_back)
