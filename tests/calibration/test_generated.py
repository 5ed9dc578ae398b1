"""Text by the unquantized model: what it starts from, and that it is the model's own distribution."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import generated
from mobiquant_jax.models import Llama


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(50).integers(0, 61, (4, 48)).astype(np.int32)


@pytest.fixture(scope="module")
def written(config, params, windows):
    reports = []
    found = generated.write_windows(
        config, params, windows, 40, seed=3, progress=lambda done, total: reports.append((done, total))
    )
    return found, reports


def test_every_text_continues_a_snippet_of_the_calibration_text(written, windows):
    found, reports = written
    assert found.shape == (40, 48) and found.dtype == np.int32
    text = windows.ravel()
    snippets = np.lib.stride_tricks.sliding_window_view(text, generated.PROMPT_LENGTH)
    for row in found:
        assert (snippets == row[: generated.PROMPT_LENGTH]).all(axis=1).any()
    assert len({row.tobytes() for row in found}) == 40
    assert reports[-1] == (40, 40)


def test_tokens_are_drawn_from_the_models_distribution(written, config, params):
    """On its own samples a model's mean surprise is its mean entropy."""
    found, _ = written
    logits = Llama(config).apply({"params": params}, jnp.asarray(found))
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, generated.PROMPT_LENGTH - 1 : -1]
    surprise = -np.take_along_axis(log_p, found[:, generated.PROMPT_LENGTH :, None], axis=-1)[..., 0]
    entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
    spread = np.sqrt(np.var(surprise) / surprise.size)
    assert abs(surprise.mean() - entropy.mean()) < 4 * spread
    uniform = np.random.default_rng(51).integers(0, config.vocab_size, surprise.shape)
    of_uniform = -np.take_along_axis(log_p, uniform[..., None], axis=-1)
    assert abs(of_uniform.mean() - entropy.mean()) > 8 * spread  # the test can tell


def test_seed_decides(config, params, windows, written):
    again = generated.write_windows(config, params, windows, 40, seed=3)
    np.testing.assert_array_equal(again, written[0])
    other = generated.write_windows(config, params, windows, 40, seed=4)
    assert np.any(other != again)


def test_memory_decides_how_many_texts_are_written_at_once(config, params, windows, monkeypatch):
    batches = []

    def answer(decode, variables, config, prompts, lengths, *, max_new_tokens, key, **settings):
        batches.append(len(prompts))
        return SimpleNamespace(tokens=jnp.zeros((len(prompts), max_new_tokens), jnp.int32))

    monkeypatch.setattr(generated, "generate", answer)
    heads, length, tokens = config.num_key_value_heads, 48, generated.PROMPT_LENGTH
    cache = 2 * 4 * config.num_hidden_layers * heads * config.head_dim * length
    monkeypatch.setattr(generated, "BATCH_BYTES", 15.5 * (cache + 4 * tokens * config.vocab_size))
    reports = []
    found = generated.write_windows(
        config, params, windows, 40, seed=3, progress=lambda done, total: reports.append((done, total))
    )
    assert batches == [14, 14, 14]  # of at most 15, as even as can be
    assert reports == [(14, 40), (28, 40), (40, 40)] and found.shape == (40, 48)
    assert len({row[: generated.PROMPT_LENGTH].tobytes() for row in found}) > 14  # each batch has its own beginnings


def test_windows_too_short_are_named(config, params, windows):
    with pytest.raises(ValueError, match="windows of 16 tokens are too short"):
        generated.write_windows(config, params, windows[:, :16], 4, seed=0)
