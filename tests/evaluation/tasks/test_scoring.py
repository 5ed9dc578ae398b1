"""Continuation scores against float64 numpy, on a stand-in model whose logits depend on all that was read."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.evaluation.tasks import continuation_step, length_buckets, score_continuations

VOCAB, WIDTH, DECAY = 41, 6, 0.9
WINDOW = 100  # buckets 32, 64, 100


@dataclass
class Fading:
    """Logits are a projection of the tokens read so far, older ones fainter, sharpened by bits."""

    embedding: np.ndarray
    head: np.ndarray
    is_elastic: bool = True
    shapes: list[tuple] = field(default_factory=list)  # one entry a trace

    @property
    def variables(self) -> Any:
        return {"embedding": jnp.asarray(self.embedding, jnp.float32), "head": jnp.asarray(self.head, jnp.float32)}

    def forward(self, variables, tokens, bits):
        self.shapes.append(tokens.shape)
        age = jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1])  # [T, T]
        weights = jnp.where(age >= 0, DECAY ** jnp.maximum(age, 0), 0.0)
        state = jnp.einsum("ts,bsd->btd", weights, variables["embedding"][tokens])
        logits = jnp.einsum("btd,dv->btv", state, variables["head"]) * bits[:, None, None] / 4
        return logits, bits[:, None] + 0.01 * tokens

    def logits(self, tokens, bits: float) -> np.ndarray:
        """Float64, one token at a time."""
        state, rows = np.zeros(WIDTH), []
        for token in tokens:
            state = DECAY * state + self.embedding[token].astype(np.float64)
            rows.append(state @ self.head.astype(np.float64) * bits / 4)
        return np.array(rows)


@pytest.fixture
def model(rng) -> Fading:
    return Fading(rng.normal(size=(VOCAB, WIDTH)), rng.normal(size=(WIDTH, VOCAB)) / 2)


def reference(model: Fading, context, continuation, bits: float) -> tuple[float, bool]:
    """One prediction at a time, after at most the last WINDOW tokens of what precedes the last one."""
    tokens = [*context, *continuation][-(WINDOW + 1) :]
    logits = model.logits(tokens[:-1], bits)[-len(continuation) :]
    total = sum(row[target] - np.log(np.exp(row).sum()) for row, target in zip(logits, continuation, strict=True))
    return float(total), logits.argmax(axis=1).tolist() == list(continuation)


def draw(rng, context: int, continuation: int) -> tuple[list[int], list[int]]:
    return rng.integers(0, VOCAB, context).tolist(), rng.integers(0, VOCAB, continuation).tolist()


def score(model, requests, bits=3.0, batch_size=4, step=None, **options):
    step = step or continuation_step(model)
    return score_continuations(step, model.variables, requests, bits, window=WINDOW, batch_size=batch_size, **options)


# Inputs of context + continuation - 1 tokens: at, below and above every bucket, and beyond the window.
EDGES = [(1, 1), (1, 32), (31, 1), (32, 1), (33, 1), (20, 44), (64, 1), (60, 6), (99, 1), (1, 100), (100, 1), (90, 30)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_the_definition_at_every_bucket_boundary(rng, model: Fading, batch_size: int):
    requests = [draw(rng, *lengths) for lengths in EDGES] + [
        draw(rng, *rng.integers(1, 60, 2).tolist()) for _ in range(10)
    ]
    requests = [requests[i] for i in rng.permutation(len(requests))]  # results come back in this order
    scores = score(model, requests, batch_size=batch_size)
    expected = [reference(model, *request, 3.0) for request in requests]
    np.testing.assert_allclose(scores.log_probs, [log_prob for log_prob, _ in expected], rtol=2e-5)
    assert scores.greedy.tolist() == [greedy for _, greedy in expected]
    assert scores.tokens.tolist() == [min(len(a) + len(b) - 1, WINDOW) for a, b in requests]


def test_used_bits_are_summed_over_the_tokens_read(rng, model: Fading):
    requests = [draw(rng, 3, 2), draw(rng, 50, 4)]
    scores = score(model, requests, bits=5.5, batch_size=4)  # with filling rows
    for request, used, tokens in zip(requests, scores.used_bits, scores.tokens, strict=True):
        read = [*request[0], *request[1]][:-1]
        assert used == pytest.approx(5.5 * tokens + 0.01 * sum(read), rel=1e-6)


def test_greedy_means_every_token_is_the_likeliest(rng, model: Fading):
    context, _ = draw(rng, 7, 1)
    continuation: list[int] = []
    for _ in range(5):
        continuation.append(int(model.logits([*context, *continuation], 3.0)[-1].argmax()))
    other = [*continuation[:-1], (continuation[-1] + 1) % VOCAB]
    first = [(continuation[0] + 1) % VOCAB, *continuation[1:]]
    assert score(model, [(context, c) for c in (continuation, other, first)]).greedy.tolist() == [True, False, False]


def test_a_compilation_a_bucket_whatever_bits_and_variables(rng, model: Fading):
    requests = [draw(rng, *lengths) for lengths in EDGES]
    step: Any = continuation_step(model)
    first = score(model, requests, 2.0, step=step)
    other = Fading(model.embedding + 0.1, model.head)
    for bits in (2.25, 3.0, 8.0):
        assert not np.allclose(score(model, requests, bits, step=step).log_probs, first.log_probs)
    assert not np.allclose(score(other, requests, 2.0, step=step).log_probs, first.log_probs)
    assert step._cache_size() == 3
    assert sorted(model.shapes) == [(4, 32), (4, 64), (4, WINDOW)]


def test_three_numbers_a_row_leave_the_device(model: Fading):
    rows = jax.ShapeDtypeStruct((5,), jnp.int32)
    outputs = jax.eval_shape(
        continuation_step(model),
        model.variables,
        jax.ShapeDtypeStruct((5, 33), jnp.int32),
        rows,
        rows,
        jax.ShapeDtypeStruct((5,), jnp.float32),
    )
    assert [(out.shape, out.dtype.name) for out in outputs] == [((5,), "float32"), ((5,), "bool"), ((5,), "float32")]


def test_large_logits_do_not_overflow(rng, model: Fading):
    model.head = model.head * 1e3
    scores = score(model, [draw(rng, 3, 4)])
    assert np.isfinite(scores.log_probs).all() and (scores.log_probs < 0).all()


def test_progress_counts_every_request(rng, model: Fading):
    seen: list[int] = []
    score(model, [draw(rng, *lengths) for lengths in EDGES], progress=seen.append)
    assert sum(seen) == len(EDGES) and len(seen) == 3
    assert len(score(model, []).log_probs) == 0


def test_mistakes_are_named(rng, model: Fading):
    for context, continuation in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"got {context} and {continuation}"):
            score(model, [draw(rng, context, continuation)])
    with pytest.raises(ValueError, match="continuation of 101 tokens exceeds the window of 100"):
        score(model, [draw(rng, 1, 101)])


def test_buckets_double_up_to_the_window():
    assert length_buckets(2048) == (32, 64, 128, 256, 512, 1024, 2048)
    assert length_buckets(100) == (32, 64, 100)
    assert length_buckets(64) == (32, 64)
    assert length_buckets(20) == (20,)
