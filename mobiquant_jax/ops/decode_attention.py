"""Attention of one new token a sequence on Hopper GPUs, with its rotary embedding and its place in the cache.

``cuda/decode_attention.cu`` reads and writes the stacked cache of all layers in place: in XLA a layer's keys and values
are first copied out of it, three times the bytes.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops import compiler

SOURCE = Path(compiler.__file__).parent / "cuda" / "decode_attention.cu"
_TARGET = "mobiquant_decode_attention"
_GROUPS, _HEAD_SIZES = (1, 2, 3, 4, 8), (64, 128)


def decode_attention(
    qkv: Float[Array, "P B qkv"],
    rotation: Float[Array, "2 B half"],
    positions: Int[Array, " B"],
    layer: Int[Array, ""],
    key: Float[Array, "L B S Hkv hd"],
    value: Float[Array, "L B S Hkv hd"],
) -> tuple[Float[Array, "B heads"], Float[Array, "L B S Hkv hd"], Float[Array, "L B S Hkv hd"]]:
    """``softmax(rope(q) K^T / sqrt(hd)) V`` over the keys up to each token's own.

    Args:
        qkv: queries, keys and values of all heads side by side, float32, to be summed over the first axis; the sum is
            rounded to bfloat16, as are the rotated queries and keys.
        rotation: cosine and sine of the angles at the tokens' positions.
        positions: absolute position of each token; one outside the cache is not kept and not seen.
        layer: which layer of the cache.
        key: the cache's rotated keys, bfloat16; slot s holds the token at position s.
        value: the cache's values.

    Returns:
        The mixed values of all query heads side by side, in bfloat16, and the cache with the new token.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    if qkv.shape[1] != key.shape[1]:
        raise ValueError(f"projections {qkv.shape} and a cache {key.shape} of other batches")
    _, batch, _, kv_heads, head_dim = key.shape
    if rotation.shape != (2, batch, head_dim // 2):
        raise ValueError(f"rotation {rotation.shape} of other tokens or heads than {(2, batch, head_dim // 2)}")
    check_supported(qkv.shape[-1], key)
    heads = qkv.shape[-1] - 2 * kv_heads * head_dim
    cache = jax.ShapeDtypeStruct(key.shape, key.dtype)
    out = jax.ShapeDtypeStruct((batch, heads), jnp.bfloat16)
    call = jax.ffi.ffi_call(_TARGET, (cache, cache, out), input_output_aliases={4: 0, 5: 1})
    with jax.named_scope("attention"):
        key, value, mixed = call(qkv, rotation, positions.astype(jnp.int32), jnp.asarray(layer, jnp.int32), key, value)
    return mixed, key, value


def check_supported(qkv: int, key: Float[Array, "L B S Hkv hd"]) -> None:
    """Raises NotImplementedError, saying why, where the kernel cannot run on projections of this size."""
    check_shapes(qkv, key)
    _register()


def check_shapes(qkv: int, key: Float[Array, "L B S Hkv hd"]) -> None:
    """`check_supported`, without building the kernel."""
    kv_heads, head_dim = key.shape[3:]
    group = qkv // (kv_heads * head_dim) - 2
    compiler.check_hopper()
    if key.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the CUDA attention kernel reads a bfloat16 cache, not {key.dtype}")
    if head_dim not in _HEAD_SIZES or group not in _GROUPS:
        raise NotImplementedError(f"the CUDA attention kernel has no heads of {head_dim} in groups of {group}")


@functools.cache
def _register() -> None:
    compiler.register(compiler.compile_library(SOURCE), {_TARGET: "DecodeAttention"})
