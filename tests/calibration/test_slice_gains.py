"""What whole slices gain: against divergences and sums computed one by one, and the offsets that follow from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration.routers import RouterTrainer, routers_of, with_routers
from mobiquant_jax.calibration.slice_gains import FARTHEST, add_offsets, measure_slices, slice_offsets
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.routing import UniformDepth


@pytest.fixture(scope="module")
def model(random_elastic):
    elastic = ElasticConfig(group_size=8, slice_bits=(2, 2, 4), router_hidden_size=4, budget_grid=(2.0, 4.0, 8.0))
    return random_elastic(71, elastic, vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2)


def test_against_divergences_and_expectations_computed_one_by_one(model):
    """Float64 from the logits and the scores on."""
    slice_bits, shapes = model.elastic.slice_bits, model.config.linear_shapes()
    batches = np.random.default_rng().integers(0, 61, (2, 3, 9)).astype(np.int32)
    divergences, expected = jax.jit(lambda v, b: measure_slices(model, v, b))(model.variables, batches)

    @jax.jit
    def run(depth):
        policy = UniformDepth(depth=jnp.full(6, depth))
        return model.module.apply(model.variables, batches.reshape(6, 9), policy, mutable=["stats", "scores"])

    logits, states = zip(*(run(depth) for depth in range(1, len(slice_bits) + 1)), strict=True)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    away = np.mean(np.sum(np.exp(log_p[-1]) * (log_p[-1] - log_p), axis=-1), axis=(1, 2))
    np.testing.assert_allclose(divergences, away, rtol=1e-3, atol=1e-6)

    mean_size = np.mean([rows * columns for rows, columns in shapes.values()])
    by_hand = np.zeros(len(slice_bits) - 1)
    for index, bits in enumerate(slice_bits[1:]):  # a slice's scores at the depth before it
        for path, (rows, columns) in shapes.items():
            part, name = path.split("/")
            scores = np.asarray(states[index]["scores"]["layers"][part][name]["scores"][0], np.float64)[..., index]
            by_hand[index] += bits * rows * columns / mean_size * np.exp(scores).mean(axis=(1, 2)).sum()
    np.testing.assert_allclose(expected, by_hand, rtol=1e-4)


def test_a_slice_is_taken_back_as_far_as_it_gains_less_than_expected_and_never_put_forward():
    gains = np.array([0.6, 0.03, 0.05, 0.01])
    expected = np.array([1.2, 0.6, 0.01, 0.02])  # factors of 1/2, 1/20, 5, 1/2
    divergences = np.append(np.cumsum(gains[::-1])[::-1], 0.0)
    offsets = slice_offsets(jnp.asarray(divergences), jnp.asarray(expected))
    np.testing.assert_allclose(offsets, [0, np.log(0.1), np.log(0.1), np.log(0.1)], rtol=1e-4)


def test_a_slice_that_gains_nothing_goes_to_the_end():
    offsets = slice_offsets(jnp.array([1.0, 0.2, 0.3, 0.0]), jnp.array([1.0, 0.1, 0.1]))
    np.testing.assert_allclose(offsets, [0, -FARTHEST, -FARTHEST])


def test_corrected_routers_differ_by_the_same_offsets_everywhere(model, recipe):
    """Measured with the given routers and in float32, on the windows that the recipe names and no others."""
    windows = np.random.default_rng(72).integers(0, 61, (6, 8)).astype(np.int32)
    calibration = recipe(windows=8, fit_batch_size=2, slice_windows=4)
    coarse = dataclasses.replace(model, dtype=jnp.bfloat16)
    trainer = RouterTrainer(model=coarse, calibration=calibration, windows=windows)
    before = add_offsets(routers_of(model.variables), jnp.array([0.7, 1.1]))
    after, measured = trainer.correct(before, model.variables)
    measure = jax.jit(lambda routers, batches: measure_slices(model, with_routers(model.variables, routers), batches))
    divergences, expected = measure(before, windows[:4].reshape(2, 2, 8))
    np.testing.assert_allclose(measured["divergences"], divergences, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(measured["expected"], expected, rtol=1e-4)
    np.testing.assert_allclose(measured["offsets"], slice_offsets(divergences, expected), rtol=1e-3, atol=1e-3)
    assert min(measured["offsets"]) < -0.01, "there is something to correct"
    jax.tree.map(np.testing.assert_array_equal, after, add_offsets(before, jnp.asarray(measured["offsets"])))

    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), before)
    with pytest.raises(ValueError, match="what whole slices gain is not finite"):
        trainer.correct(broken, model.variables)
