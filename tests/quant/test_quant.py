"""The nested code against float64 numpy, the design's error table, and bit-exact round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax import quant


def nested_reference(weight, lo, hi, group_size, width):
    """Design section 2 in float64 numpy, written from the formulas."""
    w = weight.astype(np.float64).reshape(-1, group_size, weight.shape[1])
    s = ((hi - lo) / 4).astype(np.float32)
    s = s.astype(jnp.bfloat16).astype(np.float64)[:, None]
    z = np.round(-64 * lo.astype(np.float64)[:, None] / s)
    q = np.clip(np.floor(64 * w / s) + z, 0, 255)
    c = np.floor(q / 2 ** (8 - width))
    return (s * ((c + 0.5) / 2.0 ** (width - 2) - z / 64)).reshape(weight.shape)


def relative_rms(approximation, weight):
    return float(np.sqrt(np.mean((np.asarray(approximation) - weight) ** 2) / np.mean(weight**2)))


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(7).normal(size=(128 * 8, 512)).astype(np.float32)


# Relative RMS error of Gaussian groups of 128 (design section 2).
@pytest.mark.parametrize(("depth", "expected"), [(1, 0.383), (2, 0.096), (3, 0.024), (4, 0.0060)])
def test_error_table(gaussian, depth, expected):
    sliced = quant.round_to_nearest(jnp.asarray(gaussian), 128)
    assert relative_rms(sliced.dequantize(depth), gaussian) == pytest.approx(expected, rel=0.02)


# A separate round-to-nearest quantizer for each width, and the three mistakes the design warns of.
def test_error_table_of_alternatives(gaussian):
    w = gaussian.reshape(-1, 128, 512).astype(np.float64)
    lo, hi = w.min(1, keepdims=True), w.max(1, keepdims=True)

    def separate(bits):
        s = (hi - lo) / (2**bits - 1)
        return (np.clip(np.round(w / s) + np.round(-lo / s), 0, 2**bits - 1) - np.round(-lo / s)) * s

    for bits, expected in ((2, 0.504), (4, 0.101), (6, 0.024), (8, 0.0059)):
        assert relative_rms(separate(bits), w) == pytest.approx(expected, rel=0.02)
    s = (hi - lo) / 4
    z = np.round(-64 * lo / s)
    q = np.clip(np.floor(64 * w / s) + z, 0, 255)
    # Residual slices that are not zero-mean (q_e in place of q_e - 3/2) shift every weight by half a coarse step.
    not_centred = s * (
        np.floor(q / 64) + 0.5 + sum((np.floor(q / 4**i) % 4) / 4.0 ** (3 - i) for i in (2, 1, 0)) - z / 64
    )
    assert relative_rms(not_centred, w) == pytest.approx(0.5 * np.sqrt(np.mean(s**2)), rel=0.02)
    coarse_zero = np.round(-lo / s) * 64
    q = np.clip(np.floor(64 * w / s) + coarse_zero, 0, 255)
    assert relative_rms(s / 64 * (q + 0.5 - coarse_zero), w) == pytest.approx(0.030, abs=0.004)


@pytest.mark.parametrize("shared_clip", [1.0, 0.8])
def test_clipping_tension(gaussian, shared_clip):
    lo, hi = quant.unclipped_limits(jnp.asarray(gaussian), 128)
    sliced = quant.quantize(jnp.asarray(gaussian), shared_clip * lo, shared_clip * hi)
    error = {depth: relative_rms(sliced.dequantize(depth), gaussian) for depth in (1, 4)}
    if shared_clip == 0.8:
        assert error[1] < 0.383 and error[4] == pytest.approx(0.080, rel=0.1)
    else:
        assert error[4] < 0.0062


@pytest.mark.parametrize("group_size", [16, 64, 192])
@pytest.mark.parametrize("width", range(1, 9))
def test_decode_matches_float64(group_size, width):
    rng = np.random.default_rng(group_size + width)
    weight = (rng.normal(size=(192, 24)) * rng.uniform(0.01, 3) + rng.normal()).astype(np.float32)
    lo, hi = (np.asarray(v) for v in quant.unclipped_limits(jnp.asarray(weight), group_size))
    sliced = quant.quantize(jnp.asarray(weight), jnp.asarray(lo), jnp.asarray(hi))
    expected = nested_reference(weight, lo, hi, group_size, width)
    got = np.asarray(sliced.dequantize_width(width))
    step = np.repeat((hi - lo) / 256, group_size, axis=0)
    # float32 may put a weight on a bin edge into the neighbouring bin: rare, and off by one bin at most.
    different = np.abs(got - expected) > 1e-3 * step
    assert different.mean() < 2e-3
    assert np.all(np.abs(got - expected) <= 1.01 * step * 2 ** (8 - width))


@pytest.mark.parametrize("slice_bits", [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4), (1, 1, 2, 4), (8,)])
@pytest.mark.parametrize("in_features", [64, 172])
def test_pack_round_trip(slice_bits, in_features):
    rng = np.random.default_rng(in_features)
    codes = jnp.asarray(rng.integers(0, 256, (in_features, 5), dtype=np.uint8))
    ones = jnp.ones((in_features // 4, 5))
    sliced = quant.slice_codes(codes, ones, ones, slice_bits)
    np.testing.assert_array_equal(sliced.codes(), codes)
    assert [p.shape[0] for p in sliced.planes] == [-(-in_features * b // 32) for b in slice_bits]
    assert all(p.dtype == jnp.uint32 for p in sliced.planes)
    for depth, width in enumerate(quant.widths(slice_bits), 1):
        np.testing.assert_array_equal(sliced.dequantize(depth), sliced.dequantize_width(width))


def test_word_layout_is_little_endian():
    codes = jnp.asarray(np.arange(16, dtype=np.uint8)[:, None] % 4)
    expected = sum(int(c) << (2 * i) for i, c in enumerate(np.arange(16) % 4))
    assert int(quant.pack(codes, 2)[0, 0]) == expected


def test_depth_reads_only_its_planes(gaussian):
    sliced = quant.round_to_nearest(jnp.asarray(gaussian), 128)
    garbage = tuple(p if e < 2 else ~p for e, p in enumerate(sliced.planes))
    other = quant.SlicedWeight(
        planes=garbage, scale=sliced.scale, zero=sliced.zero, in_features=1024, slice_bits=sliced.slice_bits
    )
    np.testing.assert_array_equal(other.dequantize(2), sliced.dequantize(2))
    assert not np.array_equal(other.dequantize(3), sliced.dequantize(3))


def test_degenerate_groups():
    weight = jnp.concatenate([jnp.zeros((16, 3)), jnp.full((16, 3), 5.0), jnp.full((16, 3), -1e-3)])
    sliced = quant.round_to_nearest(weight, 16)
    np.testing.assert_allclose(sliced.dequantize(4), weight, rtol=2e-4, atol=1e-12)


def test_no_call_is_left_in_what_is_differentiated():
    """A call that is differentiated keeps more for the way back than the same operations: a sixth more bytes moved."""
    weight = jnp.ones((32, 4))
    clipping = quant.Clipping.create(32, 4, 16)

    def loss(weight):
        return jnp.sum(quant.fake_quantize(weight, clipping, 4))

    program = jax.make_jaxpr(jax.grad(loss))(weight)
    assert program.eqns and "fake_quantize" not in str(program)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
def test_fake_quantize_equals_encode_decode(width):
    rng = np.random.default_rng(width)
    weight = jnp.asarray(rng.normal(size=(128, 16)).astype(np.float32))
    clipping = quant.Clipping(
        gamma=jnp.asarray(rng.normal(2, 1, (2, 16)), jnp.float32),
        beta=jnp.asarray(rng.normal(2, 1, (2, 16)), jnp.float32),
    )
    expected = quant.quantize(weight, *quant.limits(weight, clipping)).dequantize_width(width)
    np.testing.assert_allclose(quant.fake_quantize(weight, clipping, width), expected, rtol=1e-5, atol=1e-6)


def test_fake_quantize_gradients():
    """Straight-through: one inside the range, zero for clipped weights, and tails that move the logits."""
    rng = np.random.default_rng(3)
    weight = jnp.asarray(rng.normal(size=(64, 4)).astype(np.float32))
    clipping = quant.Clipping(gamma=jnp.zeros((1, 4)), beta=jnp.zeros((1, 4)))  # half of the range is cut
    lo, hi = quant.limits(weight, clipping)
    interior = (weight > lo * 0.98) & (weight < hi * 0.98) & (weight != weight.max(0)) & (weight != weight.min(0))
    outside = ((weight < lo * 1.02) | (weight > hi * 1.02)) & (weight != weight.max(0)) & (weight != weight.min(0))
    grad = jax.grad(lambda w, c: quant.fake_quantize(w, c, 8).sum(), argnums=(0, 1))(weight, clipping)
    np.testing.assert_allclose(np.asarray(grad[0])[interior], 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(grad[0])[outside], 0.0, atol=1e-6)
    np.testing.assert_allclose(grad[1].gamma, expected_gamma_gradient(np.asarray(weight), sigmoid=0.5), rtol=1e-3)
    assert np.all(np.asarray(grad[1].beta) < 0)


def expected_gamma_gradient(weight, sigmoid):
    """Sum over a group of dW/dgamma in closed form, one group a column: s and z move, the clipped tails with them."""
    w = weight.astype(np.float64)
    lo, hi = sigmoid * w.min(0), sigmoid * w.max(0)
    s = ((hi - lo) / 4).astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    exact_z = -64 * lo / s
    z = np.round(exact_z)
    position = 64 * w / s + z
    code = np.clip(np.floor(position), 0, 255) + 0.5
    clipped = (position < 0) | (position > 255.996)
    d_scale = np.where(clipped, (code - z) / 64, (code - position) / 64).sum(0)
    d_zero = -(s / 64) * clipped.sum(0)
    d_hi = (d_scale - d_zero * exact_z / s) / 4  # ds/dhi = 1/4, dz/ds = -z/s
    return (d_hi * sigmoid * (1 - sigmoid) * w.max(0))[None]


def test_bad_input():
    with pytest.raises(ValueError, match="group size 48 does not divide the 64"):
        quant.round_to_nearest(jnp.ones((64, 2)), 48)
    with pytest.raises(ValueError, match=r"slice bits \(2, 2, 2\)"):
        quant.round_to_nearest(jnp.ones((64, 2)), 64, (2, 2, 2))
    sliced = quant.round_to_nearest(jnp.ones((64, 2)), 64)
    with pytest.raises(ValueError, match=r"depth 5 is outside 1\.\.4"):
        sliced.dequantize(5)
    with pytest.raises(ValueError, match="width 0"):
        sliced.dequantize_width(0)


def test_jit_and_storage(gaussian):
    sliced = jax.jit(quant.round_to_nearest, static_argnums=1)(jnp.asarray(gaussian), 128)
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(sliced)) / gaussian.size
    assert bits == 8.25
