"""Batched text generation: prefill and decoding loop run on the device, without a host round trip per token."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.serving.sampling import SamplingConfig, sample

DecodeFn = Callable[[Any, Array, KVCache, Any], tuple[Array, Array, KVCache]]
"""``(variables, tokens [B, T], cache, bits) -> (logits [B, T, V], token_bits [B, T], cache)``, pure."""


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: New tokens; a row that ended is filled up with its end token.
        lengths: Tokens of each row that count, the end token included.
        mean_bits: Average bits of the tokens each row read: its prompt and the new tokens fed back.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    mean_bits: Float[Array, " B"]


class Chunk(NamedTuple):
    """What `stream` yields.

    Attributes:
        tokens: The tokens that each row gained; none once the row has ended.
        mean_bits: Average bits of the tokens each row has read so far.
    """

    tokens: list[Int[np.ndarray, " n"]]
    mean_bits: Float[np.ndarray, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _State:
    """The decoding loop's carry; ``step`` counts the columns of ``tokens`` that are filled."""

    cache: KVCache
    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]
    bits_sum: Float[Array, " B"]
    bits_count: Int[Array, " B"]
    step: Int[Array, ""]
    key: PRNGKeyArray

    @property
    def mean_bits(self) -> Float[Array, " B"]:
        return self.bits_sum / self.bits_count


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything about a generation that is fixed at compile time."""

    decode_fn: DecodeFn
    config: LlamaConfig
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    sampling: SamplingConfig
    cache_dtype: DTypeLike


def generate(
    decode_fn: DecodeFn,
    variables: Any,
    config: LlamaConfig,
    prompts: Int[ArrayLike, "B T"],
    lengths: Int[ArrayLike, " B"],
    *,
    max_new_tokens: int,
    key: PRNGKeyArray | None = None,
    bits: Any = None,
    sampling: SamplingConfig | None = None,
    eos_token_ids: Sequence[int] | None = None,
    cache_dtype: DTypeLike = jnp.float32,
) -> Generation:
    """Continue a batch of prompts until every row has ended or has ``max_new_tokens`` more.

    One program: prefill, then a loop on the device. It is compiled again for other shapes, ``decode_fn``,
    ``sampling`` or ``max_new_tokens``, and never for other ``bits``, ``variables`` or ``key``.

    Args:
        decode_fn: The model, see `DecodeFn`; a hashable callable such as ``ElasticModel.decode``.
        variables: The model's variables.
        config: The model's architecture.
        prompts: Token ids, padded on the right with any token of the vocabulary.
        lengths: Prompt tokens of each row, at least 1.
        max_new_tokens: Most tokens to add to a row.
        key: Randomness of sampling; needed unless decoding is greedy.
        bits: Average bits, a scalar or one per row; handed to ``decode_fn``.
        sampling: How tokens are drawn; greedy if None.
        eos_token_ids: Tokens that end a row; the model's own if None.
        cache_dtype: Type the keys and values are kept in.

    Returns:
        The new tokens with their lengths and average bits.

    Raises:
        ValueError: Wrong shapes, lengths outside the prompts, tokens outside the vocabulary, no key for sampling, or
            more tokens than the model's positions.
    """
    plan = _plan(decode_fn, config, max_new_tokens, eos_token_ids, sampling, cache_dtype)
    return _generate(plan, variables, *_checked_inputs(plan, prompts, lengths, bits, key))


def stream(
    decode_fn: DecodeFn,
    variables: Any,
    config: LlamaConfig,
    prompts: Int[ArrayLike, "B T"],
    lengths: Int[ArrayLike, " B"],
    *,
    max_new_tokens: int,
    chunk_tokens: int = 8,
    first_chunk_tokens: int | None = None,
    key: PRNGKeyArray | None = None,
    bits: Any = None,
    sampling: SamplingConfig | None = None,
    eos_token_ids: Sequence[int] | None = None,
    cache_dtype: DTypeLike = jnp.float32,
) -> Iterator[Chunk]:
    """Like `generate`, but hand the tokens over as they come, one host transfer per chunk.

    Args:
        decode_fn: The model, see `DecodeFn`; a hashable callable such as ``ElasticModel.decode``.
        variables: The model's variables.
        config: The model's architecture.
        prompts: Token ids, padded on the right with any token of the vocabulary.
        lengths: Prompt tokens of each row, at least 1.
        max_new_tokens: Most tokens to add to a row.
        chunk_tokens: Decoding steps between two chunks.
        first_chunk_tokens: Tokens of the first chunk, as many as of the others if None; 1 is what the prefill draws.
        key: Randomness of sampling; needed unless decoding is greedy.
        bits: Average bits, a scalar or one per row; handed to ``decode_fn``.
        sampling: How tokens are drawn; greedy if None.
        eos_token_ids: Tokens that end a row; the model's own if None.
        cache_dtype: Type the keys and values are kept in.

    Returns:
        The chunks; joined, each row's tokens are those of `generate`.

    Raises:
        ValueError: As `generate`, or a chunk would be empty.
    """
    first = chunk_tokens if first_chunk_tokens is None else first_chunk_tokens
    for name, count in ("chunk_tokens", chunk_tokens), ("first_chunk_tokens", first):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    plan = _plan(decode_fn, config, max_new_tokens, eos_token_ids, sampling, cache_dtype)
    # Checked here and not in the generator, so that a mistake shows at the call.
    inputs = _checked_inputs(plan, prompts, lengths, bits, key)
    return _stream(plan, variables, inputs, [0, *range(first, max_new_tokens, chunk_tokens), max_new_tokens])


def _stream(plan: _Plan, variables: Any, inputs: tuple[Any, ...], bounds: Sequence[int]) -> Iterator[Chunk]:
    prompts, lengths, bits, key = inputs
    state = _prefill_jit(plan, variables, prompts, lengths, bits, key)
    for start, stop in itertools.pairwise(bounds):
        state = _advance_jit(plan, variables, state, bits, stop)
        tokens, ends, ended, mean_bits = jax.device_get((state.tokens, state.lengths, state.ended, state.mean_bits))
        yield Chunk([row[start : min(end, stop)] for row, end in zip(tokens, ends, strict=True)], mean_bits)
        if ended.all():
            return


def _plan(
    decode_fn: DecodeFn,
    config: LlamaConfig,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] | None,
    sampling: SamplingConfig | None,
    cache_dtype: DTypeLike,
) -> _Plan:
    """Fill in the model's end tokens and greedy decoding where the caller left them out."""
    return _Plan(
        decode_fn=decode_fn,
        config=config,
        max_new_tokens=max_new_tokens,
        eos_token_ids=tuple(config.eos_token_ids if eos_token_ids is None else eos_token_ids),
        sampling=sampling or SamplingConfig(),
        cache_dtype=cache_dtype,
    )


def _checked_inputs(plan: _Plan, prompts: Any, lengths: Any, bits: Any, key: PRNGKeyArray | None) -> tuple[Any, ...]:
    """Check what a user can get wrong and return the traced inputs ``(prompts, lengths, bits, key)``."""
    prompts, lengths = np.asarray(prompts), np.asarray(lengths)
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1] or not prompts.size:
        raise ValueError(f"prompts must be [B, T] and lengths [B], got {prompts.shape} and {lengths.shape}")
    longest = prompts.shape[1]
    if lengths.min() < 1 or lengths.max() > longest:
        raise ValueError(f"prompt lengths must be in [1, {longest}], got {lengths.min()} to {lengths.max()}")
    if prompts.min() < 0 or prompts.max() >= plan.config.vocab_size:
        raise ValueError(
            f"prompt tokens {prompts.min()} to {prompts.max()} do not fit a vocabulary of {plan.config.vocab_size}"
        )
    if plan.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {plan.max_new_tokens}")
    if lengths.max() + plan.max_new_tokens > plan.config.max_position_embeddings:
        raise ValueError(
            f"{lengths.max()} prompt tokens and {plan.max_new_tokens} new ones exceed the model's "
            f"{plan.config.max_position_embeddings} positions"
        )
    if key is None:
        if plan.sampling.temperature > 0:
            raise ValueError(f"sampling at temperature {plan.sampling.temperature} needs a key")
        key = jax.random.key(0)
    # As an array, bits is traced: a Python number would be too, but with a weak type of its own.
    bits = None if bits is None else jnp.asarray(bits, jnp.float32)
    return jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32), bits, key


def _prefill(plan: _Plan, variables: Any, prompts: Array, lengths: Array, bits: Any, key: PRNGKeyArray) -> _State:
    """Read the prompts and draw each row's first token."""
    batch, longest = prompts.shape
    with jax.named_scope("prefill"):
        cache = KVCache.create(plan.config, batch, longest + plan.max_new_tokens, plan.cache_dtype)
        logits, token_bits, cache = plan.decode_fn(variables, prompts, cache, bits)
        last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, V]
        real = jnp.arange(longest) < lengths[:, None]  # [B, T]
        state = _State(
            cache=replace(cache, length=lengths),
            tokens=jnp.full((batch, plan.max_new_tokens), next(iter(plan.eos_token_ids), 0), jnp.int32),
            lengths=jnp.zeros(batch, jnp.int32),
            ended=jnp.zeros(batch, bool),
            bits_sum=jnp.sum(jnp.where(real, token_bits, 0.0), axis=1, dtype=jnp.float32),
            bits_count=lengths,
            step=jnp.zeros((), jnp.int32),
            key=key,
        )
        return _append(plan, state, last)


def _append(plan: _Plan, state: _State, logits: Float[Array, "B V"]) -> _State:
    """Draw the next token of every row and note which rows it ends."""
    key, draw = jax.random.split(state.key)
    drawn = sample(draw, logits, plan.sampling)
    going = ~state.ended
    token = jnp.where(going, drawn, state.tokens[:, state.step])  # an ended row keeps its filling
    is_end = jnp.isin(token, jnp.asarray(plan.eos_token_ids, jnp.int32))
    return replace(
        state,
        tokens=state.tokens.at[:, state.step].set(token),
        lengths=state.lengths + going,
        ended=state.ended | is_end,
        step=state.step + 1,
        key=key,
    )


def _advance(plan: _Plan, variables: Any, state: _State, bits: Any, stop: ArrayLike) -> _State:
    """Decode until ``stop`` columns are filled or every row has ended."""

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.step < stop) & ~jnp.all(state.ended)

    def decode_step(state: _State) -> _State:
        logits, token_bits, cache = plan.decode_fn(variables, state.tokens[:, state.step - 1, None], state.cache, bits)
        going = ~state.ended
        state = replace(
            state,
            cache=cache,
            bits_sum=state.bits_sum + jnp.where(going, token_bits[:, 0], 0.0),
            bits_count=state.bits_count + going,
        )
        return _append(plan, state, logits[:, 0])

    with jax.named_scope("decode"):
        return jax.lax.while_loop(unfinished, decode_step, state)


@partial(jax.jit, static_argnums=0)
def _generate(plan: _Plan, variables: Any, prompts: Array, lengths: Array, bits: Any, key: PRNGKeyArray) -> Generation:
    state = _prefill(plan, variables, prompts, lengths, bits, key)
    state = _advance(plan, variables, state, bits, plan.max_new_tokens)
    return Generation(state.tokens, state.lengths, state.mean_bits)


_prefill_jit = jax.jit(_prefill, static_argnums=0)
# The old state is of no more use, so that its cache is updated in place.
_advance_jit = jax.jit(_advance, static_argnums=0, donate_argnums=2)
