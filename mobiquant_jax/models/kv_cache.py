"""Keys and values of the tokens seen so far, with one length per sequence."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.config import LlamaConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's keys and values; slot s of a sequence holds its token at position s.

    Attributes:
        k: Rotated keys.
        v: Values.
    """

    k: Float[Array, "B S Hkv hd"]
    v: Float[Array, "B S Hkv hd"]

    def write(
        self, k: Float[Array, "B T Hkv hd"], v: Float[Array, "B T Hkv hd"], positions: Int[Array, "B T"]
    ) -> "LayerCache":
        """Store the keys and values of tokens at their absolute positions.

        Args:
            k: Rotated keys of the new tokens.
            v: Values of the new tokens.
            positions: Slot of each token; one outside the cache is dropped.

        Returns:
            The cache with those slots replaced.
        """
        rows = jnp.arange(k.shape[0])[:, None]
        return LayerCache(
            k=self.k.at[rows, positions].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[rows, positions].set(v.astype(self.v.dtype), mode="drop"),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """All layers' keys and values.

    Sequences are left-aligned. A batch of ragged prompts is padded on the right: attention compares absolute positions,
    so a query never sees the slots after it, and once ``length`` is set back to the true lengths, the tokens that
    follow overwrite what the padding wrote.

    Attributes:
        k: Rotated keys.
        v: Values.
        length: Tokens held by each sequence: the position of its next token.
    """

    k: Float[Array, "L B S Hkv hd"]
    v: Float[Array, "L B S Hkv hd"]
    length: Int[Array, " B"]

    @classmethod
    def create(cls, config: LlamaConfig, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> "KVCache":
        """Make an empty cache.

        Args:
            config: Architecture.
            batch: Number of sequences.
            max_length: Slots per sequence, in tokens.
            dtype: Type the keys and values are kept in.

        Returns:
            A cache of zeros with length 0.
        """
        if batch < 1 or max_length < 1:
            raise ValueError(f"a cache needs at least one sequence and one slot, got {batch} and {max_length}")
        shape = (config.num_hidden_layers, batch, max_length, config.num_key_value_heads, config.head_dim)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), length=jnp.zeros(batch, jnp.int32))
