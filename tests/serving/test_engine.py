"""Generation against teacher forcing with full passes, on a small random model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.models import Llama
from mobiquant_jax.serving import SamplingConfig, generate, stream

LENGTHS = np.array([3, 9, 6])
NEW = 12


class Model:
    """A random model whose `bits` shifts the logits; a token with id i counts as read with `bits + i`."""

    def __init__(self, seed, config):
        self.config, self.module = config, Llama(config)
        self.traces = 0
        variables = jax.jit(self.module.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))
        # A loud embedding, so that the continuation depends on what was read.
        self.variables = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * 8 if "embedder" in str(path) else leaf, variables
        )
        self.full = jax.jit(lambda tokens: self.module.apply(self.variables, tokens))

    def decode(self, variables, tokens, cache, bits):
        self.traces += 1
        logits, cache = self.module.apply(variables, tokens, cache, method=self.module.decode)
        token_bits = jnp.reshape(bits, (-1, 1)) + tokens
        direction = jnp.sin(3.0 * jnp.arange(self.config.vocab_size))
        return logits + jnp.reshape(bits, (-1, 1, 1)) * direction, token_bits, cache

    def generate(self, prompts, lengths, max_new_tokens=NEW, **options):
        options = {"bits": 0.0} | options
        return generate(
            self.decode, self.variables, self.config, prompts, lengths, max_new_tokens=max_new_tokens, **options
        )

    def greedy(self, prompt, steps=NEW, bits=0.0):
        """The continuation by one full pass per token."""
        direction = np.sin(3.0 * np.arange(self.config.vocab_size))
        tokens = np.zeros(32, np.int32)
        tokens[: len(prompt)] = prompt
        for end in range(len(prompt), len(prompt) + steps):
            tokens[end] = np.argmax(np.asarray(self.full(tokens[None]))[0, end - 1] + bits * direction)
        return tokens[len(prompt) : len(prompt) + steps].tolist()


@pytest.fixture(scope="module")
def model(small_config):
    sizes = dict(vocab_size=47, hidden_size=32, intermediate_size=40, head_dim=8, max_position_embeddings=64)
    return Model(int(np.random.default_rng().integers(2**31)), small_config(**sizes, eos_token_ids=()))


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng().integers(0, 47, (3, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def continuations(model, prompts):
    return [model.greedy(row[:length]) for row, length in zip(prompts, LENGTHS, strict=True)]


def test_greedy_is_teacher_forcing_and_ragged_rows_are_independent(model, prompts, continuations):
    assert len({tuple(row) for row in continuations}) == 3, "the model must react to its prompt"
    result = model.generate(prompts, LENGTHS)
    assert result.tokens.shape == (3, NEW) and result.tokens.dtype == jnp.int32
    assert result.lengths.tolist() == [NEW] * 3
    assert result.tokens.tolist() == continuations
    for row, length in enumerate(LENGTHS):
        alone = model.generate(prompts[row : row + 1, :length], [length])
        assert alone.tokens[0].tolist() == continuations[row]


def test_the_padding_does_not_matter(model, prompts, continuations):
    other = np.where(np.arange(9) < LENGTHS[:, None], prompts, 46 - prompts)
    assert model.generate(other, LENGTHS).tokens.tolist() == continuations


def test_several_end_tokens_stop_their_rows(model, prompts, continuations):
    ends = (continuations[0][2], continuations[1][5])
    expected = []
    for row in continuations:
        stops = [at for at, token in enumerate(row) if token in ends]
        expected.append(row[: stops[0] + 1] if stops else row)
    result = model.generate(prompts, LENGTHS, eos_token_ids=ends)
    assert result.lengths.tolist() == [len(row) for row in expected]
    assert result.lengths[0] <= 3 and result.lengths[1] <= 6
    for row, want in zip(result.tokens.tolist(), expected, strict=True):
        assert row == want + [ends[0]] * (NEW - len(want))


def test_the_loop_stops_when_every_row_has_ended(model, prompts, continuations):
    steps = []

    def counted(variables, tokens, cache, bits):
        jax.debug.callback(lambda: steps.append(tokens.shape))
        return model.decode(variables, tokens, cache, bits)

    ends = [row[1] for row in continuations]
    result = generate(
        counted, model.variables, model.config, prompts, LENGTHS, max_new_tokens=NEW, bits=0.0, eos_token_ids=ends
    )
    jax.effects_barrier()
    assert max(result.lengths.tolist()) <= 2
    assert steps == [(3, 9)] + [(3, 1)] * (max(result.lengths.tolist()) - 1)


def test_the_end_tokens_of_the_model_are_the_default(model, prompts, continuations):
    config = dataclasses.replace(model.config, eos_token_ids=(continuations[0][0],))
    result = generate(model.decode, model.variables, config, prompts, LENGTHS, max_new_tokens=NEW, bits=0.0)
    assert result.lengths[0] == 1


def test_bits_of_each_row_reach_the_model(model, prompts):
    bits = np.array([0.0, 40.0, 3.0])
    result = model.generate(prompts, LENGTHS, bits=bits)
    for row, length in enumerate(LENGTHS):
        assert result.tokens[row].tolist() == model.greedy(prompts[row, :length], bits=bits[row])


def test_mean_bits_cover_the_tokens_read(model, prompts, continuations):
    ends = (continuations[0][2],)
    result = model.generate(prompts, LENGTHS, bits=0.5, eos_token_ids=ends)
    for row, length in enumerate(LENGTHS):
        new = result.tokens[row, : result.lengths[row]].tolist()
        # At bits=0.5 the tokens may differ from `continuations`; what was read is the prompt and all but the last.
        assert result.mean_bits[row] == pytest.approx(0.5 + np.mean([*prompts[row, :length], *new[:-1]]), rel=1e-5)


def test_top_k_of_one_is_greedy(model, prompts, continuations):
    sampling = SamplingConfig(temperature=1.0, top_k=1)
    result = model.generate(prompts, LENGTHS, sampling=sampling, key=jax.random.key(9))
    assert result.tokens.tolist() == continuations


def test_sampling_repeats_with_its_key_and_varies_without(model, prompts):
    sampling = SamplingConfig(temperature=2.0)
    first, again, other = (
        model.generate(prompts, LENGTHS, sampling=sampling, key=jax.random.key(seed)).tokens.tolist()
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({tuple(row) for row in np.transpose(first).tolist()}) > 2, "each step draws anew"


def test_changing_bits_compiles_nothing(model, prompts):
    model.generate(prompts, LENGTHS, bits=2.0)
    traces = model.traces
    for bits in np.arange(2, 8.25, 0.25):
        model.generate(prompts, LENGTHS, bits=float(bits))
    model.generate(prompts, LENGTHS, bits=4)
    assert model.traces == traces
    model.generate(prompts, LENGTHS, max_new_tokens=NEW - 1, bits=4)
    assert model.traces > traces, "the count must see a compilation"


@pytest.mark.parametrize("chunk_tokens", [1, 5, NEW, 50])
def test_streamed_chunks_join_to_the_generation(model, prompts, continuations, chunk_tokens):
    ends = (continuations[0][6],)
    options = dict(bits=0.0, eos_token_ids=ends, sampling=SamplingConfig(temperature=1.5), key=jax.random.key(4))
    want = model.generate(prompts, LENGTHS, **options)
    chunks = list(
        stream(
            model.decode,
            model.variables,
            model.config,
            prompts,
            LENGTHS,
            max_new_tokens=NEW,
            chunk_tokens=chunk_tokens,
            **options,
        )
    )
    assert len(chunks) == -(-max(want.lengths.tolist()) // chunk_tokens)
    for row, length in enumerate(want.lengths.tolist()):
        pieces = [chunk.tokens[row].tolist() for chunk in chunks]
        assert max(map(len, pieces)) <= chunk_tokens
        assert sum(pieces, []) == want.tokens[row, :length].tolist()
    np.testing.assert_allclose(chunks[-1].mean_bits, want.mean_bits, rtol=1e-6)


def test_the_first_chunk_has_a_size_of_its_own(model, prompts, continuations):
    def sizes(**options):
        inputs = model.decode, model.variables, model.config, prompts, LENGTHS
        chunks = list(stream(*inputs, max_new_tokens=NEW, bits=0.0, **options))
        assert sum((chunk.tokens[0].tolist() for chunk in chunks), []) == continuations[0]
        return [len(chunk.tokens[0]) for chunk in chunks]

    assert sizes(chunk_tokens=5, first_chunk_tokens=1) == [1, 5, 5, 1]
    assert sizes(chunk_tokens=3, first_chunk_tokens=20) == [NEW]
    with pytest.raises(ValueError, match="first_chunk_tokens must be at least 1, got 0"):
        sizes(first_chunk_tokens=0)


def test_streaming_compiles_once_for_all_chunks_and_bits(model, prompts):
    def run(bits):
        options = dict(max_new_tokens=NEW, chunk_tokens=5, bits=bits)
        return list(stream(model.decode, model.variables, model.config, prompts, LENGTHS, **options))

    assert len(run(2.0)) == 3
    traces = model.traces
    run(6.5)
    assert model.traces == traces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths=[3, 0, 6]), r"lengths must be in \[1, 9\], got 0 to 6"),
        (dict(lengths=[3, 10, 6]), r"lengths must be in \[1, 9\], got 3 to 10"),
        (dict(lengths=[3, 6]), r"got \(3, 9\) and \(2,\)"),
        (dict(prompts=np.full((3, 9), 47)), "47 to 47 do not fit a vocabulary of 47"),
        (dict(prompts=np.full((3, 9), -1)), "-1 to -1 do not fit a vocabulary of 47"),
        (dict(prompts=np.zeros((0, 9)), lengths=[]), r"got \(0, 9\)"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(max_new_tokens=56), "9 prompt tokens and 56 new ones exceed the model's 64 positions"),
        (dict(sampling=SamplingConfig(temperature=0.5)), "temperature 0.5 needs a key"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_requests(model, prompts, change, message):
    request = dict(prompts=prompts, lengths=LENGTHS, max_new_tokens=NEW, bits=0.0) | change
    with pytest.raises(ValueError, match=message):
        generate(model.decode, model.variables, model.config, **request)
    with pytest.raises(ValueError, match=message):
        stream(model.decode, model.variables, model.config, **request)


def test_chunks_need_a_token(model, prompts):
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        stream(model.decode, model.variables, model.config, prompts, LENGTHS, max_new_tokens=2, chunk_tokens=0)
