"""A site: the linears of a block that share one input, with their weights fused and their routers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops import TiledWeight, sliced_matmul, tile_weight
from mobiquant_jax.ops.sliced_matmul import routed_gpu
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import FusedRouter, Router
from mobiquant_jax.serving.source import Gated, Normed, Plain, Source, read_source


class SiteOutput(NamedTuple):
    """What a site returns.

    Attributes:
        parts: the outputs of its linears side by side, as a sum still to be taken over the first axis.
        residual: the residual stream after the update, ``[B, T, D]``; None unless the source is `Normed`.
        read: weight bits each token read in all the linears.
    """

    parts: Float[Array, "P B T out"]
    residual: Any
    read: Float[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Site:
    """Fused linears of every layer.

    Attributes:
        weight: the kernels, in the serving layout.
        router: decides each token's depth in each linear.
    """

    weight: TiledWeight
    router: FusedRouter

    @property
    def segments(self) -> tuple[int, ...]:
        """Outputs of each linear."""
        return self.weight.segments

    def thresholds_at(self, bits: Float[Array, " B"]) -> Any:
        """What `__call__` takes as thresholds: once for all layers."""
        return self.router.thresholds_at(bits)

    def __call__(self, source: Source, thresholds: Any, layer: Int[Array, ""], dtype: DTypeLike) -> SiteOutput:
        """Makes the input, routes and multiplies.

        Args:
            source: what the input is made of.
            thresholds: see `thresholds_at`.
            layer: which layer.
            dtype: of the multiplication.
        """
        product = self._in_one_kernel(source, thresholds, layer, dtype)
        if product is None:
            x, residual = read_source(source, layer, dtype)
            depths = self.router.depths(x, thresholds, layer)
            parts = sliced_matmul(x, self.weight, depths, layer=layer, dtype=dtype)[None]
        else:
            parts, residual, depths = product
        size = 2.0 * self.weight.in_features * jnp.asarray(self.segments, jnp.float32)
        return SiteOutput(parts, residual, jnp.tensordot(size, depths, 1))

    def _in_one_kernel(self, source: Source, thresholds: Any, layer: Int[Array, ""], dtype: DTypeLike) -> Any:
        """``(parts, residual, depths)`` of a decode step on a Hopper GPU, else None."""
        batch, length = _leading(source)
        tokens = batch * length
        if jax.default_backend() != "gpu" or not isinstance(self.router, FusedRouter) or dtype != jnp.bfloat16:
            return None
        try:
            routed_gpu.check_supported(tokens, self.weight, self.router)
        except NotImplementedError:
            return None
        with jax.named_scope("routed_matmul"):
            parts, residual, depths = routed_gpu.routed_matmul(
                weight=self.weight,
                router=self.router,
                thresholds=jnp.repeat(thresholds, length, axis=-1),
                layer=layer,
                **_flat_source(source, tokens),
            )
        return (
            parts.reshape(-1, batch, length, parts.shape[-1]),
            None if residual is None else residual.reshape(batch, length, -1),
            depths.reshape(-1, batch, length),
        )


def _leading(source: Source) -> tuple[int, int]:
    batch, length = (source.halves[0] if isinstance(source, Gated) else source.x).shape[:2]
    return batch, length


def _flat_source(source: Source, tokens: int) -> dict[str, Any]:
    """Arguments of `routed_gpu.routed_matmul`, batch and time as one axis."""
    if isinstance(source, Plain):
        return {"source": "plain", "x": source.x.astype(jnp.bfloat16).reshape(tokens, -1)}
    update = source.update if isinstance(source, Normed) else source.halves
    flat = update.astype(jnp.float32).reshape(update.shape[0], tokens, -1)
    if isinstance(source, Gated):
        return {"source": "gated", "update": flat}
    x = source.x.astype(jnp.bfloat16).reshape(tokens, -1)
    return {"source": "normed", "x": x, "update": flat, "gain": source.gain, "eps": source.eps}


def fuse_site(
    weights: Sequence[SlicedWeight],
    routers: Sequence[Router],
    tables: Sequence[Float[Array, "L grid"]],
    grid: tuple[float, ...],
    dtype: DTypeLike,
) -> Site:
    """Makes a site of linears that share their input.

    Args:
        weights: each linear's kernels, stacked over layers.
        routers: each linear's routers, stacked over layers.
        tables: each linear's thresholds.
        grid: average bits of the thresholds.
        dtype: type of the routers' first layers.

    Raises:
        ValueError: the weights cannot be fused.
    """
    return Site(
        weight=tile_weight(weights),
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
