"""How the next token is drawn from the logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What is kept of the next token's distribution, in the order temperature, top-k, top-p.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep the k most likely tokens; None keeps all.
        top_p: Keep the fewest most likely tokens whose probabilities sum to at least p, at least one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def sample(key: PRNGKeyArray, logits: Float[Array, "B V"], config: SamplingConfig) -> Int[Array, " B"]:
    """Draw one token per row.

    The kept tokens are an exact count: equal logits at the edge of the top k do not widen it.

    Args:
        key: Randomness of this draw.
        logits: Next-token logits.
        config: What is kept of the distribution.

    Returns:
        Token ids in int32.
    """
    with jax.named_scope("sample"):
        if config.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scaled = logits.astype(jnp.float32) / config.temperature
        if config.top_k is None and config.top_p == 1:
            return jax.random.categorical(key, scaled).astype(jnp.int32)
        vocab = logits.shape[-1]
        ranked, tokens = jax.lax.top_k(scaled, min(config.top_k or vocab, vocab))  # [B, k], most likely first
        if config.top_p < 1:
            probabilities = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # what the more likely tokens already hold
            kept = (before < config.top_p).at[:, 0].set(True)
            ranked = jnp.where(kept, ranked, -jnp.inf)
        rank = jax.random.categorical(key, ranked)  # [B]
        return jnp.take_along_axis(tokens, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
