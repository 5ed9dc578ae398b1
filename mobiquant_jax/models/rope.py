"""Rotary position embedding in Hugging Face's half-rotation layout, with llama3 frequency scaling."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    """Angle per position of each rotary pair, in float32 as transformers computes it.

    ``f_i = theta^(-2i / head_dim)``. With llama3 scaling, and ``turns = original_context * f / (2 pi)``: pairs with
    fewer turns than ``low_freq_factor`` are divided by ``factor``, those with more than ``high_freq_factor`` are kept,
    and between the two the scaled and the kept frequency are mixed linearly in ``turns``.

    Args:
        config: Architecture; ``head_dim``, ``rope_theta`` and ``rope_scaling`` are read.

    Returns:
        Radians per token of the ``head_dim / 2`` pairs, a host constant.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)  # [head_dim / 2]
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = np.float32(scaling.original_max_position_embeddings) * frequencies / np.float32(2 * np.pi)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (kept * frequencies + (1 - kept) * (frequencies / np.float32(scaling.factor))).astype(np.float32)


def apply_rope(
    x: Float[Array, "B T heads head_dim"],
    positions: Int[Array, "B T"],
    frequencies: Float[np.ndarray, " half"],
) -> Float[Array, "B T heads head_dim"]:
    """Rotate each head by its position, in float32.

    Pair i is ``(x[i], x[i + head_dim / 2])`` and turns by ``positions * frequencies[i]`` radians.

    Args:
        x: Queries or keys.
        positions: Absolute position of each token.
        frequencies: From `inverse_frequencies`.

    Returns:
        The rotated heads in the dtype of ``x``.
    """
    with jax.named_scope("rope"):
        angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B, T, 1, head_dim / 2]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)
