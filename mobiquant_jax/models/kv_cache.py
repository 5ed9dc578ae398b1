"""Keys and values of the tokens seen so far, with one length per sequence."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.config import LlamaConfig


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

    def of_layer(self, layer: Int[Array, ""]) -> "LayerCache":
        """What one layer sees of it.

        Args:
            layer: Which one.
        """
        return LayerCache(whole=self, layer=layer)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's part of a cache; slot s of a sequence holds its token at position s.

    It keeps the whole cache and says which layer: a loop over layers that carries the whole writes it in place, whereas
    scanned slices are copied twice for every token.

    Attributes:
        whole: The cache of all layers.
        layer: Which one.
    """

    whole: KVCache
    layer: Int[Array, ""]

    @property
    def k(self) -> Float[Array, "B S Hkv hd"]:
        """Rotated keys."""
        return self.whole.k[self.layer]

    @property
    def v(self) -> Float[Array, "B S Hkv hd"]:
        """Values."""
        return self.whole.v[self.layer]

    def write(
        self, k: Float[Array, "B T Hkv hd"], v: Float[Array, "B T Hkv hd"], positions: Int[Array, "B T"]
    ) -> "LayerCache":
        """Store the keys and values of tokens at their absolute positions; lengths stay.

        Args:
            k: Rotated keys of the new tokens.
            v: Values of the new tokens.
            positions: Slot of each token; one outside the cache is dropped.

        Returns:
            The same layer of the cache with those slots replaced.
        """
        at = self.layer, jnp.arange(k.shape[0])[:, None], positions
        written = replace(
            self.whole,
            k=self.whole.k.at[at].set(k.astype(self.whole.k.dtype), mode="drop"),
            v=self.whole.v.at[at].set(v.astype(self.whole.v.dtype), mode="drop"),
        )
        return replace(self, whole=written)
