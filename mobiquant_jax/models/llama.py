"""LLaMA as Linen modules: a thin shell over pure functions, with the linear map injected.

The factory `Block.linear` makes all seven linears of a block, so the same block serves the dense model, calibration and
the packed elastic runtime. ``control`` is any pytree and reaches every linear untouched: the runtime's routing policy.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.attention import attention, self_attention
from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.kv_cache import KVCache, LayerCache
from mobiquant_jax.models.layers import DenseLinear, RMSNorm, project, swiglu
from mobiquant_jax.models.rope import apply_rope, inverse_frequencies
from mobiquant_jax.sharding import constrain_batch, look_up

LinearFactory = Callable[..., nn.Module]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary embedding.

    Attributes:
        config: Architecture.
        linear: Makes a linear from ``features``, ``dtype`` and ``name``.
        dtype: Type of the activations.
    """

    config: LlamaConfig
    linear: LinearFactory = DenseLinear
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: LayerCache | None, control: Any
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Mix each token with the tokens before it.

        Args:
            x: Normalized activations.
            positions: Absolute position of each token, increasing along T.
            cache: Keys and values of earlier tokens, or None to attend within ``x`` alone.
            control: Passed to the linears.

        Returns:
            The attention's output and the cache with the new tokens in it.
        """
        cfg = self.config
        widths = {"q": cfg.num_attention_heads, "k": cfg.num_key_value_heads, "v": cfg.num_key_value_heads}
        heads = {
            name: self._linear(f"{name}_proj", count * cfg.head_dim)(x, control).reshape(
                *x.shape[:-1], count, cfg.head_dim
            )
            for name, count in widths.items()
        }  # [B, T, H or Hkv, hd]
        frequencies = inverse_frequencies(cfg)
        q, k = (apply_rope(heads[name], positions, frequencies) for name in ("q", "k"))
        v = heads["v"]
        if cache is None:
            mixed = self_attention(q, k, v, positions)
        else:
            cache = cache.write(k, v, positions)
            mixed = attention(q, cache.k, cache.v, positions, jnp.arange(cache.k.shape[1])[None])
        mixed = mixed.reshape(*x.shape[:-1], cfg.num_attention_heads * cfg.head_dim)
        return self._linear("o_proj", cfg.hidden_size)(mixed, control), cache

    def _linear(self, name: str, features: int) -> nn.Module:
        return self.linear(features=features, dtype=self.dtype, name=name)


class MLP(nn.Module):
    """The SwiGLU feed-forward layer.

    Attributes:
        config: Architecture.
        linear: Makes a linear from ``features``, ``dtype`` and ``name``.
        dtype: Type of the activations.
    """

    config: LlamaConfig
    linear: LinearFactory = DenseLinear
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], control: Any) -> Float[Array, "B T D"]:
        """Transform each token by itself: ``down(silu(gate(x)) * up(x))``.

        Args:
            x: Normalized activations.
            control: Passed to the linears.

        Returns:
            The layer's output.
        """
        cfg = self.config
        gate = self.linear(features=cfg.intermediate_size, dtype=self.dtype, name="gate_proj")(x, control)
        up = self.linear(features=cfg.intermediate_size, dtype=self.dtype, name="up_proj")(x, control)
        down = self.linear(features=cfg.hidden_size, dtype=self.dtype, name="down_proj")
        return down(swiglu(gate, up), control)


class Block(nn.Module):
    """One pre-norm transformer block.

    Attributes:
        config: Architecture.
        linear: Makes a linear from ``features``, ``dtype`` and ``name``; see `DenseLinear`.
        dtype: Type of the activations.
    """

    config: LlamaConfig
    linear: LinearFactory = DenseLinear
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
        control: Any = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Add the attention's and the feed-forward layer's outputs to the residual stream.

        Args:
            x: Residual stream.
            positions: Absolute position of each token, increasing along T.
            cache: Keys and values of earlier tokens, or None for a full pass.
            control: Passed to the linears.

        Returns:
            The residual stream after the block and the cache with the new tokens in it.
        """
        cfg = self.config
        attend = Attention(cfg, self.linear, self.dtype, name="attention")
        mixed, cache = attend(RMSNorm(cfg.rms_norm_eps, name="attention_norm")(x), positions, cache, control)
        x = constrain_batch(x + mixed)
        mlp = MLP(cfg, self.linear, self.dtype, name="mlp")
        return constrain_batch(x + mlp(RMSNorm(cfg.rms_norm_eps, name="mlp_norm")(x), control)), cache


class Head(nn.Module):
    """The untied output head; its logits stay in float32.

    Attributes:
        features: Size of the vocabulary.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Project onto the vocabulary.

        Args:
            x: Normalized activations.

        Returns:
            Logits.
        """
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        return project(x, kernel)


class Llama(nn.Module):
    """A LLaMA language model; its blocks are scanned, so every leaf under ``layers`` has a leading layer axis.

    Attributes:
        config: Architecture.
        linear: Makes a block's linears from ``features``, ``dtype`` and ``name``; see `DenseLinear`.
        dtype: Type of the activations; parameters are cast to it where they are used.
        remat: Recompute each block's activations in the backward pass.
    """

    config: LlamaConfig
    linear: LinearFactory = DenseLinear
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Create the embedding, the scanned blocks, the final norm and the head."""
        cfg = self.config
        self.embedder = nn.Embed(cfg.vocab_size, cfg.hidden_size, dtype=self.dtype)
        # Inside a scan the loop already keeps XLA from merging the recomputation with the forward pass.
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        self.layers = block(cfg, self.linear, self.dtype)
        self.final_norm = RMSNorm(cfg.rms_norm_eps)
        if not cfg.tie_word_embeddings:
            self.lm_head = Head(cfg.vocab_size)

    def __call__(self, tokens: Int[Array, "B T"], control: Any = None) -> Float[Array, "B T V"]:
        """Predict the next token after every token, in one full pass.

        Args:
            tokens: Token ids; positions count from 0.
            control: Passed to the linears.

        Returns:
            Logits in float32.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x, _ = self._over_layers(self.embed(tokens), positions, None, control)
        return self.unembed(x)

    def decode(
        self, tokens: Int[Array, "B T"], cache: KVCache, control: Any = None
    ) -> tuple[Float[Array, "B T V"], KVCache]:
        """Predict the next token after every token, given the cached ones: prefill and single step alike.

        Args:
            tokens: Token ids that follow what the cache holds.
            cache: Keys and values of earlier tokens; needs room for T more.
            control: Passed to the linears.

        Returns:
            Logits in float32, and the cache with every ``length`` grown by T.

        Raises:
            ValueError: The batch differs from the cache's, or T exceeds the cache's slots.
        """
        batch, length = tokens.shape
        if cache.k.shape[1] != batch or cache.k.shape[2] < length:
            raise ValueError(f"tokens {tokens.shape} do not fit a cache of {cache.k.shape[1:3]} (sequences, slots)")
        positions = cache.length[:, None] + jnp.arange(length, dtype=jnp.int32)
        x, written = self._over_layers(self.embed(tokens), positions, cache, control)
        assert written is not None, "a block returns the cache it is given"
        return self.unembed(x), replace(written, length=cache.length + length)

    def _over_layers(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: KVCache | None, control: Any
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The residual stream after all blocks, and the cache with the new tokens' keys and values."""

        def step(block: Block, carry: tuple[Array, KVCache | None], layer: Int[Array, ""]) -> tuple[Any, None]:
            x, cache = carry
            x, seen = block(x, positions, None if cache is None else cache.of_layer(layer), control)
            return (x, None if seen is None else seen.whole), None

        scan = nn.scan(
            step,
            variable_axes={"params": 0, "slices": 0, "routing": 0, "stats": 0, "scores": 0},
            split_rngs={"params": True, "routing": True},
        )
        carry, _ = scan(self.layers, (x, cache), jnp.arange(self.config.num_hidden_layers))
        return carry

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look the tokens up.

        Args:
            tokens: Token ids.

        Returns:
            The residual stream that enters the first block.
        """
        with jax.named_scope("embed"):
            return constrain_batch(look_up(self.embedder.embedding, tokens).astype(self.dtype))

    def unembed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Apply the final norm and the head.

        Args:
            x: The residual stream that leaves the last block.

        Returns:
            Logits in float32.
        """
        with jax.named_scope("unembed"):
            x = self.final_norm(x)
            return project(x, self.embedder.embedding.T) if self.config.tie_word_embeddings else self.lm_head(x)
