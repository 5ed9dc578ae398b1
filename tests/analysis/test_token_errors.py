"""Token errors and their statistics against numpy in float64 and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mobiquant_jax.analysis.retention import retained_sets, retention_scores
from mobiquant_jax.analysis.rows import Case, Row, Tally, excess
from mobiquant_jax.analysis.steps import Score
from mobiquant_jax.analysis.token_errors import LEVELS, overlap, rank_correlation, summarize, worst_tokens
from mobiquant_jax.routing import RandomDepth, score

RNG_SEED = 80


def test_probe_measures_each_linears_outputs_and_changes_none(model, steps, tokens):
    embedding = np.asarray(model.variables["params"]["embedder"]["embedding"], np.float64)
    layer = jax.tree.map(lambda leaf: leaf[0], {name: model.variables[name]["layers"] for name in ("params", "slices")})
    stream = embedding[np.asarray(tokens)]
    x = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + model.config.rms_norm_eps)
    x = x * np.asarray(layer["params"]["attention_norm"]["scale"], np.float64)  # what q, k and v read
    found, measured = steps.probed(model.variables, tokens)
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        weight = layer["slices"]["attention"][name]["weight"]
        low, full = (x @ np.asarray(weight.dequantize(depth), np.float64) for depth in (1, 2))
        magnitude = np.linalg.norm(full, axis=-1)
        errors = np.linalg.norm(low - full, axis=-1) / magnitude
        np.testing.assert_allclose(measured.errors[0, index], errors[..., None], rtol=1e-3)
        np.testing.assert_allclose(measured.magnitude[0, index], magnitude, rtol=1e-4)
        np.testing.assert_allclose(measured.norm[0, index], np.linalg.norm(x, axis=-1), rtol=1e-4)
        scores = score(layer["params"]["attention"][name]["router"], jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(measured.scores[0, index], scores, rtol=1e-3, atol=1e-4)

    plain, _ = steps.routed(model.variables, tokens, RandomDepth(bits=jnp.full(2, 8.0)), jax.random.key(0))
    assert float(found.nll) == pytest.approx(float(plain.nll), rel=1e-6) and float(found.bits) == 8.0


def test_worst_tokens_and_their_overlap():
    errors = np.random.default_rng(RNG_SEED).normal(size=(3, 2, 47)).astype(np.float32)  # K, batch, T
    worst = np.asarray(worst_tokens(jnp.asarray(errors)))
    shared = np.asarray(overlap(jnp.asarray(errors)))
    for batch in range(2):
        sets = [set(np.argsort(errors[k, batch])[-5:].tolist()) for k in range(3)]  # 4.7 tokens are five
        for k in range(3):
            assert set(np.flatnonzero(worst[k, batch]).tolist()) == sets[k]
        expected = [[len(sets[i] & sets[j]) / 5 for j in range(3)] for i in range(3)]
        np.testing.assert_allclose(shared[batch], expected, rtol=1e-6)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(RNG_SEED + 1)
    a = rng.normal(size=(4, 2, 61))
    b = a[:, :1] ** 3 * rng.uniform(-1, 1, (4, 1, 1)) + rng.normal(size=(4, 2, 61))
    found = np.asarray(rank_correlation(jnp.asarray(a), jnp.asarray(b)))
    for index in np.ndindex(4, 2):
        assert found[index] == pytest.approx(scipy.stats.spearmanr(a[index], b[index]).statistic, abs=1e-5)


def test_summary_of_a_window(random_probe):
    found = jax.tree.map(np.asarray, summarize(random_probe))
    for layer, linear in ((0, 1), (1, 2)):
        errors, magnitude, scores, norm = (
            np.asarray(values[layer, linear, 0])
            for values in (random_probe.errors, random_probe.magnitude, random_probe.scores, random_probe.norm)
        )
        np.testing.assert_allclose(found.mean[layer, linear], errors.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.quantiles[:, layer, linear], np.quantile(errors, LEVELS, axis=0), rtol=1e-4)
        absolute = errors * magnitude[:, None]
        squared = np.concatenate([absolute**2, np.zeros((len(errors), 1))], axis=1)
        for entry in range(2):  # slices 2 and 3
            removed = squared[:, entry] - squared[:, entry + 1]
            router, by_norm = (scipy.stats.spearmanr(v, removed).statistic for v in (scores[:, entry], norm))
            assert found.router_correlation[layer, linear, entry] == pytest.approx(router, abs=1e-3)
            assert found.norm_correlation[layer, linear, entry] == pytest.approx(by_norm, abs=1e-3)
        for values, by in ((found.overlap, absolute), (found.relative_overlap, errors)):
            first, second = (set(np.argsort(by[:, k])[-5:].tolist()) for k in range(2))
            assert values[layer, linear, 0, 1] == pytest.approx(len(first & second) / 5)


def test_retention_keeps_the_tokens_it_names(random_probe):
    sets = retained_sets(random_probe, 2, (2, 2, 4), jax.random.key(0))
    assert list(sets) == ["none", "random", "worst at 2 bits", "worst at 4 bits", "relatively worst at 4 bits"]
    kept = {name: np.asarray(mask)[:, :, 0].sum(axis=-1) for name, mask in sets.items()}
    assert np.all(kept.pop("none") == 0) and all(np.all(count == 5) for count in kept.values())  # of 47 tokens
    relative = np.asarray(random_probe.errors)
    absolute = relative * np.asarray(random_probe.magnitude)[..., None]
    for name, errors in (
        ("worst at 2 bits", absolute[..., 0]),
        ("worst at 4 bits", absolute[..., 1]),
        ("relatively worst at 4 bits", relative[..., 1]),
    ):
        mask = np.asarray(sets[name])
        for place in np.ndindex(mask.shape[:3]):
            assert errors[place][mask[place]].min() > errors[place][~mask[place]].max()


def test_retention_runs_every_set(model, steps, tokens):
    _, measured = steps.probed(model.variables, tokens)
    scores = retention_scores(steps, tokens, measured, jax.random.key(1))
    names = ("none", "random", "worst at 4 bits", "relatively worst at 4 bits")
    assert list(scores) == [Case(name, 4.0) for name in names]
    plain, _ = steps.routed(model.variables, tokens, RandomDepth(bits=jnp.full(2, 4.0)), jax.random.key(0))
    assert float(scores[Case("none", 4.0)].nll) == pytest.approx(float(plain.nll), rel=1e-5)
    for name in names[1:]:
        assert float(scores[Case(name, 4.0)].bits) == pytest.approx(4 + 4 * 2 / 24, rel=1e-5)
        assert abs(float(scores[Case(name, 4.0)].nll) - float(plain.nll)) > 1e-4


def test_rows_pair_their_windows():
    rng = np.random.default_rng(RNG_SEED + 2)
    hard, better = rng.uniform(1, 3, 6), rng.uniform(0, 0.1, 6)
    tally = Tally(10)
    for window in range(6):
        tally.add(
            {
                Case("b", 3.0): Score(nll=jnp.float32(10 * hard[window]), bits=jnp.float32(3 + 0.1 * window)),
                Case("a", 3.0): Score(nll=jnp.float32(10 * (hard[window] - better[window])), bits=jnp.float32(3)),
            }
        )
    plain, good = tally.rows()
    assert (plain.name, good.name) == ("b", "a") and plain.bits == pytest.approx(3.25)
    assert plain.perplexity == pytest.approx(np.exp(hard.mean()), rel=1e-5)
    ratio, error = excess(good, plain)
    assert ratio == pytest.approx(np.exp(-better.mean()) - 1, rel=1e-3)
    assert error == pytest.approx(np.exp(-better.mean()) * scipy.stats.sem(better), rel=1e-3)
    assert excess(*(Row("x", 3.0, 3.0, (nll,)) for nll in (2.0, 1.0))) == (pytest.approx(np.e - 1), np.inf)
