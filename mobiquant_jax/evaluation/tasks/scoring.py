"""Log-probabilities of continuations: padded to a few fixed lengths, gathered on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mobiquant_jax.evaluation.perplexity import LanguageModel

SHORTEST_BUCKET = 32

Request = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context, at least one, and of its continuation, at least one."""

ContinuationStep = Callable[[Any, Array, Array, Array, Array], tuple[Array, Array, Array]]
"""``(variables, tokens [B, T + 1], starts [B], ends [B], bits [B]) -> (log_probs [B], greedy [B], used_bits [B])``."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `score_continuations` returns, one entry a request.

    Attributes:
        log_probs: log-probability of the continuation after its context, in nats.
        greedy: whether each of the continuation's tokens is the most likely one.
        used_bits: summed over the tokens read, the average bits each used.
        tokens: number of tokens read: all of context and continuation but the last.
    """

    log_probs: Float[np.ndarray, " n"]
    greedy: Bool[np.ndarray, " n"]
    used_bits: Float[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]


def length_buckets(window: int) -> tuple[int, ...]:
    """Lengths that inputs are padded to: doubling from 32 up to the window, which is the last.

    Each is one compilation. Doubling wastes a quarter of the work of ratios of about 1.4 on the zero-shot tasks, and
    halves the number of compilations.

    Args:
        window: the longest input, in tokens.
    """
    buckets = [SHORTEST_BUCKET]
    while buckets[-1] < window:
        buckets.append(2 * buckets[-1])
    return (*buckets[:-1], window)


def continuation_step(model: LanguageModel) -> ContinuationStep:
    """Builds the jitted scoring of one batch.

    The logits stay on the device: what comes back are three numbers a row. With logits l and tokens y of a row whose
    continuation is y[start:end],

        log_prob = sum_{start <= t < end} l_(t-1)[y_t] - logsumexp(l_(t-1))
        greedy   = all_{start <= t < end} argmax(l_(t-1)) = y_t

    Bits and variables are arguments, so that the step compiles once per shape of ``tokens``: for all bits, and for all
    models whose variables have the same shapes.

    Args:
        model: its ``forward`` is compiled in.

    Returns:
        A jitted function, see `ContinuationStep`. A row with ``end`` 0 is filling: it reads and scores nothing.
    """

    @jax.jit
    def step(variables: Any, tokens: Array, starts: Array, ends: Array, bits: Array) -> tuple[Array, Array, Array]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]  # [B, T]
        logits, token_bits = model.forward(variables, inputs, bits)
        with jax.named_scope("continuation"):
            logits = logits.astype(jnp.float32)  # [B, T, V]
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, T]
            log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
            likeliest = jnp.argmax(logits, axis=-1) == targets
            place = jnp.arange(1, tokens.shape[1])  # of each target in its row
            read = place < ends[:, None]  # [B, T]
            scored = read & (place >= starts[:, None])
        return (
            jnp.sum(jnp.where(scored, log_probs, 0.0), axis=1),
            jnp.all(likeliest | ~scored, axis=1),
            jnp.sum(jnp.where(read, token_bits.astype(jnp.float32), 0.0), axis=1),
        )

    return step


def score_continuations(
    step: ContinuationStep,
    variables: Any,
    requests: Sequence[Request],
    bits: float,
    *,
    window: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Scores continuations after their contexts.

    A request whose context and continuation exceed the window by more than the one token that is never read loses the
    beginning of its context, as in lm-eval's HFLM. Requests are sorted into the buckets of `length_buckets`; every
    batch of a bucket has the same shape, the last one filled up with rows that do not count.

    Args:
        step: of `continuation_step`.
        variables: the model's variables.
        requests: token ids.
        bits: average bits, for all requests.
        window: longest input of the model, in tokens.
        batch_size: rows a step.
        progress: called with the number of requests that were scored since its last call.

    Returns:
        The scores in the order of the requests.

    Raises:
        ValueError: a context or continuation without tokens, or a continuation longer than the window.
    """
    rows = [_row(context, continuation, window) for context, continuation in requests]
    inputs = np.array([len(tokens) - 1 for tokens, _ in rows], np.int64)  # [n]
    buckets = np.array(length_buckets(window))
    bucket_of = np.searchsorted(buckets, inputs)  # [n]
    request_bits = jnp.full(batch_size, bits, jnp.float32)
    log_probs, used_bits = np.zeros(len(rows)), np.zeros(len(rows))
    greedy = np.zeros(len(rows), bool)
    # The longest first: a batch that does not fit the memory shows at once.
    for bucket in np.unique(bucket_of)[::-1]:
        members = np.flatnonzero(bucket_of == bucket)
        outputs = []
        for first in range(0, len(members), batch_size):
            batch = [rows[member] for member in members[first : first + batch_size]]
            outputs.append(step(variables, *_padded(batch, int(buckets[bucket]), batch_size), request_bits))
        # One transfer a bucket: the device is never waited for between two batches.
        found = [np.concatenate(arrays)[: len(members)] for arrays in zip(*jax.device_get(outputs), strict=True)]
        log_probs[members], greedy[members], used_bits[members] = found
        if progress is not None:
            progress(len(members))
    return Scores(log_probs=log_probs, greedy=greedy, used_bits=used_bits, tokens=inputs)


def _row(context: Sequence[int], continuation: Sequence[int], window: int) -> tuple[list[int], int]:
    """A request's tokens, cut from the left to ``window + 1``, and where in them the continuation starts."""
    if not len(context) or not len(continuation):
        raise ValueError(
            f"a request needs tokens of context and of continuation, got {len(context)} and {len(continuation)}"
        )
    if len(continuation) > window:
        raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the window of {window}")
    tokens = [*context, *continuation][-(window + 1) :]
    return tokens, len(tokens) - len(continuation)


def _padded(
    batch: Sequence[tuple[list[int], int]], bucket: int, batch_size: int
) -> tuple[Int[Array, "B T1"], Int[Array, " B"], Int[Array, " B"]]:
    """Tokens padded on the right, and the range of each continuation; rows beyond the batch are filling."""
    tokens = np.zeros((batch_size, bucket + 1), np.int32)
    starts, ends = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    for row, (ids, start) in enumerate(batch):
        tokens[row, : len(ids)] = ids
        starts[row], ends[row] = start, len(ids)
    return jnp.asarray(tokens), jnp.asarray(starts), jnp.asarray(ends)
