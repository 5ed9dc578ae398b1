"""A site: the linears of a block that share one input, with their weights fused and their routers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops import Implementation, StackedWeight, TiledWeight, serving_weight, sliced_matmul
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import Router, lookup


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SiteRouter:
    """The routers of S linears that share an input, so that their first layers are one matmul.

    Attributes:
        hidden: first layers, ``[L, in, S * h]``.
        magnitude: weight of the input's log RMS in the first layers.
        hidden_bias: biases of the first layers.
        output: second layers.
        output_bias: biases of the second layers.
        thresholds: recorded thresholds at each average of ``grid``.
        grid: average bits of the thresholds.
    """

    hidden: Float[Array, "L D hiddens"]
    magnitude: Float[Array, "L S h"]
    hidden_bias: Float[Array, "L S h"]
    output: Float[Array, "L S h E-1"]
    output_bias: Float[Array, "L S E-1"]
    thresholds: Float[Array, "L S grid"]
    grid: tuple[float, ...] = field(metadata={"static": True})

    def depths(self, x: Float[Array, "B T in"], bits: Float[Array, " B"], layer: Int[Array, ""]) -> Int[Array, "S B T"]:
        """Depth of each token in each linear; the same as ``score`` and ``TableBudget`` linear by linear.

        Args:
            x: the site's input; the first layers multiply in the dtype of ``hidden``.
            bits: target average bits of each sequence.
            layer: which layer.
        """
        with jax.named_scope("router"):
            one: SiteRouter = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), self)
            linears, size = one.magnitude.shape
            wide = x.astype(jnp.float32)
            rms = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-12)
            product = jnp.einsum(
                "bti,ih->bth", (wide / rms).astype(one.hidden.dtype), one.hidden, preferred_element_type=jnp.float32
            )
            hidden = product.reshape(*x.shape[:2], linears, size) + jnp.log(rms)[..., None] * one.magnitude
            hidden = jax.nn.silu(hidden + one.hidden_bias)
            # Too small for a matmul: as a sum, it is one kernel with what surrounds it.
            scores = jnp.sum(hidden[..., None] * one.output, axis=-2) + one.output_bias  # [B, T, S, E-1]
            threshold = jnp.stack([lookup(table, self.grid, bits) for table in one.thresholds], axis=-1)  # [B, S]
            gates = scores > threshold[:, None, :, None]
            return 1 + jnp.moveaxis(jnp.sum(jnp.cumprod(gates, axis=-1, dtype=jnp.int32), axis=-1), -1, 0)


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
    router: SiteRouter
    implementation: Implementation | None = field(default=None, metadata={"static": True})

    def __call__(
        self, x: Float[Array, "B T in"], bits: Float[Array, " B"], layer: Int[Array, ""], dtype: DTypeLike
    ) -> tuple[list[Float[Array, "B T out"]], Float[Array, "B T"]]:
        """Routes and multiplies.

        Args:
            x: activations.
            bits: target average bits of each sequence.
            layer: which layer.
            dtype: of the multiplication and of the outputs.

        Returns:
            The outputs of each linear, and the weight bits each token read in all of them.
        """
        depths = self.router.depths(x, bits, layer)
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
        router=SiteRouter(
            hidden=jnp.concatenate([router.hidden for router in routers], axis=-1).astype(dtype),
            magnitude=jnp.stack([router.magnitude for router in routers], axis=1),
            hidden_bias=jnp.stack([router.hidden_bias for router in routers], axis=1),
            output=jnp.stack([router.output for router in routers], axis=1),
            output_bias=jnp.stack([router.output_bias for router in routers], axis=1),
            thresholds=jnp.stack(tables, axis=1),
            grid=grid,
        ),
    )
