"""A site: the linears of a block that share one input, with their weights fused and their routers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops import Implementation, StackedWeight, TiledWeight, serving_weight, sliced_matmul
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import FusedRouter, Router

# In the order in which a block reads them: the order of linears wherever all sites have one array.
SITES = {
    "qkv": ("attention/q_proj", "attention/k_proj", "attention/v_proj"),
    "o": ("attention/o_proj",),
    "gate_up": ("mlp/gate_proj", "mlp/up_proj"),
    "down": ("mlp/down_proj",),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Site:
    """Fused linears of every layer.

    Attributes:
        weight: the kernels, in a serving layout.
        router: decides each token's depth in each linear.
        implementation: of the elastic matmul; the platform's if None.
    """

    weight: TiledWeight | StackedWeight
    router: FusedRouter
    implementation: Implementation | None = field(default=None, metadata={"static": True})

    def __call__(
        self, x: Float[Array, "B T in"], thresholds: Float[Array, "L S B"], layer: Int[Array, ""], dtype: DTypeLike
    ) -> tuple[list[Float[Array, "B T out"]], Float[Array, "B T"]]:
        """Routes and multiplies.

        Args:
            x: activations.
            thresholds: of these linears, for each sequence.
            layer: which layer.
            dtype: of the multiplication and of the outputs.

        Returns:
            The outputs of each linear, and the weight bits each token read in all of them.
        """
        depths = self.router.depths(x, thresholds, layer)
        y = sliced_matmul(
            x.astype(dtype), self.weight, depths, layer=layer, dtype=dtype, implementation=self.implementation
        )
        ends = [sum(self.weight.segments[: i + 1]) for i in range(len(self.weight.segments) - 1)]
        read = 2.0 * self.weight.in_features * jnp.tensordot(jnp.asarray(self.weight.segments, jnp.float32), depths, 1)
        return jnp.split(y, ends, axis=-1), read


def of_sites(per_linear: Float[Array, "L linears B"]) -> dict[str, Float[Array, "L S B"]]:
    """Each site's part of what all linears have in one array, in the order of `SITES`; of none, nothing.

    Raises:
        ValueError: it is of some of the linears only.
    """
    linears = sum(map(len, SITES.values()))
    if per_linear.shape[1] not in (0, linears):
        raise ValueError(f"an array {per_linear.shape} of {per_linear.shape[1]} linears, not {linears}")
    parts, first = {}, 0
    for name, paths in SITES.items():
        parts[name] = per_linear[:, first : first + len(paths)]
        first += len(paths)
    return parts


def fuse_site(
    weights: Sequence[SlicedWeight],
    routers: Sequence[Router],
    dtype: DTypeLike,
    implementation: Implementation | None = None,
) -> Site:
    """Makes a site of linears that share their input.

    Args:
        weights: each linear's kernels, stacked over layers.
        routers: each linear's routers, stacked over layers.
        dtype: type of the routers' first layers.
        implementation: of the elastic matmul, which also chooses the weights' layout; the platform's if None.

    Raises:
        ValueError: the weights cannot be fused.
    """
    return Site(
        weight=serving_weight(weights, implementation),
        implementation=implementation,
        router=FusedRouter(
            hidden=jnp.concatenate([router.hidden for router in routers], axis=-1).astype(dtype),
            magnitude=jnp.stack([router.magnitude for router in routers], axis=1),
            hidden_bias=jnp.stack([router.hidden_bias for router in routers], axis=1),
            output=jnp.stack([router.output for router in routers], axis=1),
            output_bias=jnp.stack([router.output_bias for router in routers], axis=1),
        ),
    )
