"""A site: the linears of a block that share one input, with their weights fused and their routers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops import Implementation, StackedWeight, TiledWeight, serving_weight, sliced_matmul
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import FusedRouter, Router


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

    def thresholds_at(self, bits: Float[Array, " B"]) -> Any:
        """What `__call__` takes as thresholds: once for all layers."""
        return self.router.thresholds_at(bits)

    def __call__(
        self, x: Float[Array, "B T in"], thresholds: Any, layer: Int[Array, ""], dtype: DTypeLike
    ) -> tuple[list[Float[Array, "B T out"]], Float[Array, "B T"]]:
        """Routes and multiplies.

        Args:
            x: activations.
            thresholds: see `thresholds_at`.
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


def fuse_site(
    weights: Sequence[SlicedWeight],
    routers: Sequence[Router],
    tables: Sequence[Float[Array, "L grid"]],
    grid: tuple[float, ...],
    dtype: DTypeLike,
    implementation: Implementation | None = None,
) -> Site:
    """Makes a site of linears that share their input.

    Args:
        weights: each linear's kernels, stacked over layers.
        routers: each linear's routers, stacked over layers.
        tables: each linear's thresholds.
        grid: average bits of the thresholds.
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
            thresholds=jnp.stack(tables, axis=1),
            grid=grid,
        ),
    )
