"""A decode step's layers in one call of CUDA kernels, where the platform and the model have them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.ops import TiledWeight
from mobiquant_jax.ops.decode_layers import RoutedLinears, check_supported, decode_layers
from mobiquant_jax.ops.sliced_matmul.layout import TILED_SLICE_BITS
from mobiquant_jax.routing import FusedRouter
from mobiquant_jax.serving.attention import rotation
from mobiquant_jax.serving.site import SITES, Site


def supports_one_call(x: Float[Array, "B T D"], cache: KVCache, sites: Mapping[str, Any]) -> bool:
    """Whether `layers_in_one_call` can run on this input, with these weights, on this platform."""
    if x.shape[1] != 1 or x.dtype != jnp.bfloat16 or jax.default_backend() != "gpu":
        return False
    if not all(_has_kernels(sites[name]) for name in SITES):
        return False
    try:
        check_supported(x.shape[0], cache.k, [_linears(sites[name]) for name in SITES])
    except NotImplementedError:
        return False
    return True


def layers_in_one_call(
    config: LlamaConfig,
    variables: Any,
    thresholds: Float[Array, "L linears B"],
    x: Float[Array, "B 1 D"],
    positions: Int[Array, "B 1"],
    cache: KVCache,
    bits: Float[Array, " B"],
) -> tuple[Float[Array, "B 1 D"], KVCache, Float[Array, "B 1"]]:
    """The residual stream after the last block, the cache with the new tokens, the weight bits each token read.

    Args:
        config: architecture.
        variables: `ServingArrays`.
        thresholds: of each linear, in the order of `SITES`, for each sequence.
        x: embedded tokens.
        positions: absolute position of each token.
        cache: keys and values of all layers; its length is left to the caller.
        bits: target average bits of each sequence; only a hint of how much to fetch ahead.
    """
    sites = [_linears(variables.sites[name]) for name in SITES]
    done = decode_layers(
        x[:, 0],
        rotation(config, positions),
        positions[:, 0],
        (variables.attention_norm, variables.mlp_norm),
        config.rms_norm_eps,
        cache.k,
        cache.v,
        sites,
        thresholds,
        expected=expected_slices(bits),
    )
    sizes = [2.0 * site.weight.in_features * outputs for site in sites for outputs in site.weight.segments]
    read = jnp.einsum("s,lsb->b", jnp.asarray(sizes, jnp.float32), done.depths.astype(jnp.float32))
    return done.x[:, None], KVCache(k=done.key, v=done.value, length=cache.length), read[:, None]


def expected_slices(bits: Float[Array, " B"]) -> Int[Array, ""]:
    """How many slices a product of a batch reads in three cases of four, if tokens take adjacent depths.

    A product reads what its deepest token needs. With ``bits`` between those of k slices and of k + 1, the share p of
    tokens reads k + 1, and a batch of B needs them with probability ``1 - (1 - p)^B``.

    Args:
        bits: target average bits of each sequence; the highest counts.
    """
    deepest = jnp.max(bits) / TILED_SLICE_BITS[0]
    return jnp.floor(deepest + 0.25 ** (1 / bits.shape[0])).astype(jnp.int32)


def _has_kernels(site: Any) -> bool:
    return (
        isinstance(site, Site)
        and isinstance(site.weight, TiledWeight)
        and isinstance(site.router, FusedRouter)
        and site.implementation in (None, "gpu")
    )


def _linears(site: Site) -> RoutedLinears:
    assert isinstance(site.weight, TiledWeight)
    return RoutedLinears(site.weight, site.router)
