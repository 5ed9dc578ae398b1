"""Perplexity against float64 numpy, on stand-in models whose logits are known, and on a real model."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.evaluation import (
    PerplexityResult,
    evaluate_perplexity,
    parse_bits,
    perplexity_curve,
    perplexity_step,
)

VOCAB = 37


@dataclass
class Bigram:
    """Logits are a table's row for the token, sharpened by bits; a token uses 0.01 bits more than those left of it."""

    table: np.ndarray
    is_elastic: bool = True
    shapes: list[tuple] = field(default_factory=list)  # one entry a trace

    @property
    def variables(self) -> Any:
        return {"table": jnp.asarray(self.table, jnp.float32)}

    def forward(self, variables, tokens, bits):
        self.shapes.append((tokens.shape, bits.shape))
        sharpness = bits[:, None] if self.is_elastic else jnp.full((len(tokens), 1), 4.0)
        logits = variables["table"][tokens] * sharpness[..., None]
        used = sharpness + 0.01 * jnp.arange(tokens.shape[1]) if self.is_elastic else jnp.full(tokens.shape, 32.0)
        return logits, used


def reference(table: np.ndarray, windows: np.ndarray, bits: float) -> float:
    """exp(mean nll) in float64, one prediction at a time."""
    nll = []
    for window in windows:
        for token, target in zip(window[:-1], window[1:], strict=True):
            logits = table[token].astype(np.float64) * bits
            shifted = logits - logits.max()
            nll.append(np.log(np.exp(shifted).sum()) - shifted[target])
    return float(np.exp(np.mean(nll)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_equals_the_definition_whatever_the_batch(rng, batch_size: int):
    table, windows = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32), rng.integers(0, VOCAB, (5, 24))
    result = evaluate_perplexity(Bigram(table), windows, 3.5, batch_size=batch_size)
    assert result.perplexity == pytest.approx(reference(table, windows, 3.5), rel=1e-5)
    assert result.measured_bits == pytest.approx(3.5 + 0.01 * 11.5, abs=1e-5)
    assert (result.bits, result.tokens) == (3.5, 5 * 23)
    assert result.seconds > 0


def test_large_logits_do_not_overflow(rng):
    table, windows = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32) + 3e4, rng.integers(0, VOCAB, (3, 9))
    expected = reference(table, windows, 2.0)
    assert evaluate_perplexity(Bigram(table), windows, 2.0).perplexity == pytest.approx(expected, rel=0.02)


def test_hopeless_predictions_are_infinite_and_broken_ones_nan(rng):
    hopeless = np.where(np.eye(VOCAB), 1e4, 0).astype(np.float32)  # sure that each token repeats
    windows = np.tile(np.arange(6), (2, 1))
    assert evaluate_perplexity(Bigram(hopeless), windows, 8.0).perplexity == np.inf
    assert np.isnan(evaluate_perplexity(Bigram(hopeless * np.nan), windows, 8.0).perplexity)


def test_one_compilation_serves_all_bits(rng):
    model = Bigram(rng.normal(size=(VOCAB, VOCAB)))
    windows = rng.integers(0, VOCAB, (3, 8))
    bits_list = np.arange(2, 8.01, 0.25).tolist()
    assert len(bits_list) == 25
    step = perplexity_step(model)
    for bits in bits_list:
        evaluate_perplexity(model, windows, bits, batch_size=2, step=step)
    assert step._cache_size() == 1
    assert model.shapes == [((2, 8), (2,))]
    model.shapes.clear()
    seen = []
    results = perplexity_curve(model, windows, bits_list, batch_size=2, progress=seen.append)
    assert model.shapes == [((2, 8), (2,))]
    assert seen == results and [result.bits for result in results] == bits_list
    for result in results[::8]:
        assert result.perplexity == pytest.approx(reference(model.table, windows, result.bits), rel=1e-5)


def test_bits_are_one_number_a_sequence(rng):
    model = Bigram(rng.normal(size=(VOCAB, VOCAB)))
    windows = rng.integers(0, VOCAB, (3, 8))
    bits = np.array([2.0, 4.5, 8.0], np.float32)
    nll, used = perplexity_step(model)(model.variables, jnp.asarray(windows), jnp.asarray(bits))
    for i in range(3):
        alone = reference(model.table, windows[i : i + 1], bits[i])
        assert float(jnp.exp(nll[i] / 7)) == pytest.approx(alone, rel=1e-4)
        assert float(used[i]) == pytest.approx(bits[i] + 0.035, abs=1e-5)


def test_an_unquantized_model_ignores_bits(rng):
    model = Bigram(rng.normal(size=(VOCAB, VOCAB)), is_elastic=False)
    windows = rng.integers(0, VOCAB, (3, 8))
    plain, with_bits = (evaluate_perplexity(model, windows, bits) for bits in (None, 3.0))
    assert plain.bits is with_bits.bits is None
    assert plain.measured_bits == 32.0
    assert plain.perplexity == with_bits.perplexity == pytest.approx(reference(model.table, windows, 4.0), rel=1e-5)


def test_mistakes_are_named(rng):
    model, windows = Bigram(np.zeros((VOCAB, VOCAB))), rng.integers(0, VOCAB, (3, 8))
    for bits in (1.9, 8.5, float("nan")):
        with pytest.raises(ValueError, match=f"between 2 and 8, got {bits:g}"):
            evaluate_perplexity(model, windows, bits)
    with pytest.raises(ValueError, match="got 9"):
        perplexity_curve(model, windows, [2.0, 9.0])
    assert not model.shapes  # nothing ran before the list was checked
    with pytest.raises(ValueError, match="needs its average bits"):
        evaluate_perplexity(model, windows, None)
    with pytest.raises(ValueError, match=r"got shape \(0, 8\)"):
        evaluate_perplexity(model, windows[:0], 4.0)
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        evaluate_perplexity(model, windows, 4.0, batch_size=0)


def test_bits_lists_are_parsed_and_checked():
    assert parse_bits("2,3,4.5,8") == [2.0, 3.0, 4.5, 8.0]
    for text, named in (("2,12", "got 12"), ("1", "got 1"), ("2,x", "'x'"), ("", "''"), ("2,nan", "got nan")):
        with pytest.raises(ValueError, match=named):
            parse_bits(text)


def test_stories260k_has_its_known_nll(shared_data: Path):
    from mobiquant_jax.io.hf import load_hf
    from mobiquant_jax.models import Llama

    folder = shared_data / "stories260K"
    config, params = load_hf(folder)
    assert config.vocab_size == json.loads((folder / "config.json").read_text())["vocab_size"]

    @dataclass
    class Dense:
        variables: Any
        is_elastic: bool = False

        def forward(self, variables, tokens, bits):
            return Llama(config=config).apply(variables, tokens), jnp.full(tokens.shape, 32.0)

    result = evaluate_perplexity(Dense({"params": params}), np.load(folder / "windows.npy"), None, batch_size=16)
    assert isinstance(result, PerplexityResult) and result.tokens == 128 * 255
    assert np.log(result.perplexity) == pytest.approx(1.42076, abs=0.0005)
