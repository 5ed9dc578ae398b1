"""Grouped-query attention as a pure function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_CHUNK = 128
_MOST_CHUNKS = 16
_MOST_ON_GPU = 4  # whose compiler tunes the products of every chunk


def attention(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B S Hkv hd"],
    v: Float[Array, "B S Hkv hd"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B S"],
) -> Float[Array, "B T H hd"]:
    """Causal attention where each key-value head serves ``H / Hkv`` neighbouring query heads.

    ``softmax(q k^T / sqrt(hd)) v`` over the keys whose position is not after the query's; scores, softmax and both
    accumulations are in float32.

    Args:
        q: Rotated queries.
        k: Rotated keys.
        v: Values.
        query_positions: Absolute position of each query.
        key_positions: Absolute position of each key.

    Returns:
        One vector per query and head, in the dtype of ``q``.
    """
    with jax.named_scope("attention"):
        batch, length, heads, head_dim = q.shape
        kv_heads = k.shape[2]
        grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)  # [B, T, Hkv, G, hd]
        scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        visible = key_positions[:, None, :] <= query_positions[:, :, None]  # [B, T, S]
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)  # [B, Hkv, G, T, S]
        mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
        return mixed.reshape(q.shape).astype(q.dtype)


def self_attention(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T Hkv hd"],
    v: Float[Array, "B T Hkv hd"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T H hd"]:
    """`attention` among the tokens of one sequence, whose positions increase from token to token.

    A chunk of queries reads only the keys up to its own end, which halves the work, and its scores stay in cache: on a
    CPU 2.5 to 3.5 times faster than all scores at once, at 256 to 2048 tokens. On a GPU, bfloat16 goes to cuDNN's
    fused kernel, forward and backward ten times faster than the chunks on an H100.

    Args:
        q: Rotated queries.
        k: Rotated keys.
        v: Values.
        positions: Absolute position of each token, strictly increasing along T.

    Returns:
        One vector per query and head, in the dtype of ``q``.
    """
    length, head_dim = q.shape[1], q.shape[-1]
    if q.dtype == jnp.bfloat16 and jax.default_backend() == "gpu" and length > 1 and head_dim in (64, 128):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    # The chunks are unrolled, so their number is bounded to bound the size of the program.
    most = _MOST_ON_GPU if jax.default_backend() == "gpu" else _MOST_CHUNKS
    chunk = max(_CHUNK, -(-length // most))
    mixed = [
        attention(q[:, start:end], k[:, :end], v[:, :end], positions[:, start:end], positions[:, :end])
        for start, end in ((start, min(start + chunk, length)) for start in range(0, length, chunk))
    ]
    return jnp.concatenate(mixed, axis=1)
