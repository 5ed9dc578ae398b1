"""The n-bit grid against float64, and its gradients against the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.baselines.grid import (
    check_bits,
    fake_quantize,
    round_straight_through,
    round_to_grid,
    scale_and_zero,
    shrunk_limits,
)
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.quant import Clipping, limits

GROUP = 8


def weights(seed: int, rows: int = 32, columns: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (rows, columns)) * np.exp(rng.normal(size=(1, columns)))).astype(np.float32)


def grouped(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64).reshape(-1, GROUP, array.shape[1])  # [groups, size, out]


def reference(weight: np.ndarray, lo: np.ndarray, hi: np.ndarray, bits: int) -> np.ndarray:
    """Round to nearest between limits ``[groups, out]``, in float64."""
    top = 2**bits - 1
    scale = np.clip((hi - lo) / top, 1e-5, 1e4)[:, None]
    zero = np.round(-lo[:, None] / scale)
    codes = np.clip(np.round(grouped(weight) / scale) + zero, 0, top)
    return (scale * (codes - zero)).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_is_the_published_grid(bits: int):
    weight = weights(bits)
    lo, hi = grouped(weight).min(1), grouped(weight).max(1)
    found = np.asarray(round_to_nearest(jnp.asarray(weight), GROUP, bits))
    step = ((hi - lo) / (2**bits - 1)).repeat(GROUP, axis=0)
    wrong = np.abs(found - reference(weight, lo, hi, bits)) > 1e-4 * step
    assert wrong.mean() < 0.003  # a weight between two codes may fall to either side in float32
    assert np.all(np.abs(found - weight) <= 0.5001 * step + 1e-7)  # no weight lies outside its own range by a step


def test_groups_without_spread_keep_a_finite_scale():
    weight = jnp.concatenate([jnp.zeros((GROUP, 3)), jnp.full((GROUP, 3), 0.25)])
    found = np.asarray(round_to_nearest(weight, GROUP, 4))
    np.testing.assert_allclose(found, weight, atol=1e-5)


def test_only_widths_that_exist():
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"2 to 8 bits, got {bits}"):
            check_bits(bits)


@pytest.mark.parametrize("bits", [2, 3])
def test_shrunk_limits_are_the_best_of_all_candidates(bits: int):
    weight, steps = weights(20 + bits), 7
    lo, hi = grouped(weight).min(1), grouped(weight).max(1)
    errors = []
    for factor in np.linspace(1, 0.5, steps + 1):
        difference = np.abs(weight - reference(weight, factor * lo, factor * hi, bits))
        errors.append((grouped(difference) ** 2.4).sum(1))
    best = np.min(errors, axis=0)  # [groups, out]
    found_lo, found_hi = (
        np.asarray(limit, np.float64) for limit in shrunk_limits(jnp.asarray(weight), GROUP, bits, steps)
    )
    difference = np.abs(weight - reference(weight, found_lo, found_hi, bits))
    np.testing.assert_allclose((grouped(difference) ** 2.4).sum(1), best, rtol=1e-3)
    assert (best < 0.99 * errors[0]).any()  # shrinking does help somewhere
    plain = shrunk_limits(jnp.asarray(weight), GROUP, bits, 0)
    np.testing.assert_array_equal(plain[0], lo.astype(np.float32))
    np.testing.assert_array_equal(plain[1], hi.astype(np.float32))


def closed_form(weight, scale, zero, offset, bits, upstream):
    """Gradients of ``sum(upstream * W_n)`` in W, s and z for straight-through rounding, in float64.

    dW_n/dW = 1 inside the range     dW_n/ds = (q - z) - W/s inside, q - z outside     dW_n/dz = 0 inside, -s outside
    """
    top = 2**bits - 1
    steps = grouped(weight) / scale[:, None]
    codes = np.round(steps + grouped(offset)) + zero[:, None]
    inside = (codes >= 0) & (codes <= top)
    up = grouped(upstream)
    to_scale = np.clip(codes, 0, top) - zero[:, None] - inside * steps
    return (
        (up * inside).reshape(weight.shape),
        (up * to_scale).sum(1),
        (up * -scale[:, None] * ~inside).sum(1),
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_straight_through(bits: int):
    weight, rng = weights(40 + bits), np.random.default_rng(bits)
    upstream = rng.normal(size=weight.shape).astype(np.float32)
    offset = rng.uniform(-0.4, 0.4, weight.shape).astype(np.float32)
    # Limits inside the range, so that there are clipped weights as well as the many that sit on the two end codes.
    lo, hi = 0.7 * grouped(weight).min(1), 0.6 * grouped(weight).max(1)
    scale, zero = (
        np.asarray(part) for part in scale_and_zero(jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32), bits)
    )

    def total(weight, scale, zero, offset):
        return jnp.sum(upstream * round_to_grid(weight, scale, round_straight_through(zero), bits, offset))

    found = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(weight, scale, zero, offset)
    to_weight, to_scale, to_zero = closed_form(
        weight, scale.astype(np.float64), zero.astype(np.float64), offset, bits, upstream
    )
    np.testing.assert_allclose(found[0], to_weight, atol=1e-5)
    np.testing.assert_allclose(found[1], to_scale, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found[2], to_zero, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[3], to_weight * scale.repeat(GROUP, axis=0), rtol=1e-4, atol=1e-5)
    assert 0 < (to_weight == 0).mean() < 0.5


def test_the_gradient_of_clipping_stops_at_the_rounded_zero_point():
    bits, weight = 3, weights(60)
    upstream = np.random.default_rng(61).normal(size=weight.shape).astype(np.float32)
    clipping = Clipping(gamma=jnp.full((4, 12), 1.3), beta=jnp.full((4, 12), 0.4))

    def total(clipping: Clipping):
        return jnp.sum(upstream * fake_quantize(jnp.asarray(weight), *limits(jnp.asarray(weight), clipping), bits))

    found = jax.grad(total)(clipping)
    sigmoid = 1 / (1 + np.exp(-np.array([1.3, 0.4])))
    extremes = grouped(weight).max(1), grouped(weight).min(1)
    scale = (sigmoid[0] * extremes[0] - sigmoid[1] * extremes[1]) / 7
    zero = np.round(-sigmoid[1] * extremes[1] / scale)
    _, to_scale, _ = closed_form(weight, scale, zero, np.zeros_like(weight), bits, upstream)
    slope = sigmoid * (1 - sigmoid)
    np.testing.assert_allclose(found.gamma, to_scale * extremes[0] * slope[0] / 7, rtol=2e-4, atol=1e-3)
    np.testing.assert_allclose(found.beta, -to_scale * extremes[1] * slope[1] / 7, rtol=2e-4, atol=1e-3)


def test_rounding_is_an_integer_when_compiled_into_what_precedes_it(optimized):
    """As in ``x * c + (round(x * c) - x * c)``, whose sum a compiler may fuse with the product."""
    rng = np.random.default_rng(7)
    x, c = (jnp.asarray(rng.normal(scale=9, size=20_000), jnp.float32) for _ in range(2))
    found = np.asarray(jax.jit(lambda x, c: round_straight_through(x * c))(x, c))
    np.testing.assert_array_equal(found, np.round(found))
    slope = jax.jit(jax.grad(lambda x: jnp.sum(round_straight_through(x * c))))(x)
    np.testing.assert_array_equal(slope, c)
