"""Attention over the stacked cache of all layers, which is written in place."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.attention import attention
from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.models.rope import apply_rope, inverse_frequencies
from mobiquant_jax.ops.decode_attention import check_supported, decode_attention


def attend(
    config: LlamaConfig,
    qkv: list[Float[Array, "B T heads"]],
    positions: Int[Array, "B T"],
    cache: KVCache,
    layer: Int[Array, ""],
) -> tuple[Float[Array, "B T heads"], KVCache]:
    """Mixed values of every head, and the cache with the new tokens.

    Args:
        config: architecture.
        qkv: projected queries, keys and values.
        positions: absolute position of each token.
        cache: keys and values of all layers; its length is left to the caller.
        layer: which layer.
    """
    if positions.shape[1] == 1 and _has_kernel(qkv, cache):
        wide = jnp.concatenate(qkv, axis=-1)[:, 0].astype(jnp.float32)[None]
        mixed, k, v = decode_attention(wide, rotation(config, positions), positions[:, 0], layer, cache.k, cache.v)
        return mixed[:, None], KVCache(k=k, v=v, length=cache.length)
    q, k, v = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in qkv)
    frequencies = inverse_frequencies(config)
    q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
    written = cache.of_layer(layer).write(k, v, positions)
    slots = jnp.arange(cache.k.shape[2])[None]
    mixed = attention(q, written.k.astype(q.dtype), written.v.astype(q.dtype), positions, slots)
    return mixed.reshape(*q.shape[:2], -1), written.whole


def rotation(config: LlamaConfig, positions: Int[Array, "B 1"]) -> Float[Array, "2 B half"]:
    """Cosine and sine of the rotary angles of one token a sequence: one array, so that one kernel makes both."""
    angles = positions.astype(jnp.float32) * inverse_frequencies(config)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def _has_kernel(qkv: list[Float[Array, "B T heads"]], cache: KVCache) -> bool:
    if qkv[0].dtype != jnp.bfloat16:
        return False
    try:
        check_supported(sum(y.shape[-1] for y in qkv), cache.k)
    except NotImplementedError:
        return False
    return True
