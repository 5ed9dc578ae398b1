"""Attention over the stacked cache, from the parts of the fused query, key and value projections."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.attention import attention
from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.models.rope import apply_rope, inverse_frequencies
from mobiquant_jax.ops.decode_attention import check_supported, decode_attention
from mobiquant_jax.serving.source import sum_parts


def attend(
    config: LlamaConfig,
    parts: Float[Array, "P B T qkv"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    layer: Int[Array, ""],
    dtype: DTypeLike,
) -> tuple[Float[Array, "B T heads"], KVCache]:
    """Mixed values of every head, and the cache with the new tokens.

    Args:
        config: architecture.
        parts: queries, keys and values side by side, to be summed over the first axis.
        positions: absolute position of each token.
        cache: keys and values of all layers; its length is left to the caller.
        layer: which layer.
        dtype: of the activations.
    """
    if parts.shape[2] == 1 and dtype == jnp.bfloat16:
        try:
            check_supported(parts.shape[-1], cache.k)
        except NotImplementedError:
            pass
        else:
            angles = positions.astype(jnp.float32) * inverse_frequencies(config)  # [B, hd / 2]
            wide = parts[:, :, 0].astype(jnp.float32)
            mixed, k, v = decode_attention(
                wide, jnp.cos(angles), jnp.sin(angles), positions[:, 0], layer, cache.k, cache.v
            )
            return mixed[:, None], KVCache(k=k, v=v, length=cache.length)
    ends = np.cumsum([config.num_attention_heads, config.num_key_value_heads]) * config.head_dim
    qkv = jnp.split(sum_parts(parts, dtype), ends, axis=-1)
    q, k, v = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in qkv)
    frequencies = inverse_frequencies(config)
    q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
    rows = jnp.arange(q.shape[0])[:, None]
    # The whole cache is carried and written in place: as scanned slices it would be copied once a token.
    cache = KVCache(
        k=cache.k.at[layer, rows, positions].set(k.astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[layer, rows, positions].set(v.astype(cache.v.dtype), mode="drop"),
        length=cache.length,
    )
    slots = jnp.arange(cache.k.shape[2])[None]
    mixed = attention(q, cache.k[layer].astype(q.dtype), cache.v[layer].astype(q.dtype), positions, slots)
    return mixed.reshape(*q.shape[:2], -1), cache
