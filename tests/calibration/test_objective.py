"""Block errors and the budget penalty against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration.objective import budget_penalty, objective, sample_error, scheduled_budget


@pytest.fixture
def pair():
    """Outputs and targets with an attention sink: one token of a thousand times the others' size."""
    rng = np.random.default_rng()
    target = rng.normal(size=(3, 7, 10))
    target[:, 0] *= 1e3
    return target + 0.1 * rng.normal(size=target.shape), target


def errors(pair, loss, dtype=jnp.float32):
    return np.asarray(sample_error(*(jnp.asarray(array, dtype) for array in pair), loss))


def test_mse(pair):
    output, target = pair
    np.testing.assert_allclose(errors(pair, "mse"), ((output - target) ** 2).mean(axis=(1, 2)), rtol=1e-3)


@pytest.mark.parametrize("loss", ["relative", "log_relative"])
def test_relative_error_counts_every_token_once(pair, loss):
    output, target = pair
    by_token = ((output - target) ** 2).sum(-1) / (target**2).sum(-1)
    np.testing.assert_allclose(errors(pair, loss), by_token.mean(axis=1), rtol=1e-3)
    sink_only = output.copy()
    sink_only[:, 1:] = target[:, 1:]
    assert np.all(errors((sink_only, target), loss) < 1e-4 * errors(pair, loss))


def test_errors_of_half_precision_are_taken_in_float32():
    target = np.full((1, 2, 256), 300.0)  # the square overflows float16, and bfloat16 would lose the sum
    np.testing.assert_allclose(errors((target + 1, target), "mse", jnp.float16), 1.0)
    np.testing.assert_allclose(errors((target + 2, target), "relative", jnp.bfloat16), (2 / 300) ** 2, rtol=1e-2)


def test_a_token_of_zeros_is_finite():
    zeros = np.zeros((1, 2, 4))
    assert errors((zeros, zeros), "relative") == 0.0
    grad = jax.grad(lambda y: objective(sample_error(y, jnp.zeros((1, 2, 4)), "log_relative"), "log_relative"))
    assert np.all(np.isfinite(grad(jnp.zeros((1, 2, 4)))))


def test_objective_is_a_mean_or_a_mean_of_logarithms():
    error = np.random.default_rng().uniform(1e-6, 10, 9)
    for loss in ("mse", "relative"):
        np.testing.assert_allclose(objective(jnp.asarray(error, jnp.float32), loss), error.mean(), rtol=1e-5)
    log = objective(jnp.asarray(error, jnp.float32), "log_relative")
    np.testing.assert_allclose(log, np.log(error).mean(), rtol=1e-4)


def test_schedule_falls_from_eight_bits_to_the_target_and_stays():
    progress = np.linspace(0, 1, 21)
    for last in (2.0, 3.5, 8.0):
        expected = np.where(progress < 0.8, 8 + (last - 8) * progress / 0.8, last)
        got = scheduled_budget(jnp.asarray(progress, jnp.float32), jnp.float32(last))
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_penalty_and_its_gradient():
    bits, target, weight = np.random.default_rng().uniform(2, 8, 3)
    value, grad = jax.value_and_grad(budget_penalty)(jnp.float32(bits), jnp.float32(target), weight)
    np.testing.assert_allclose(value, weight * (bits - target) ** 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, 2 * weight * (bits - target), rtol=1e-4, atol=1e-5)
