"""The serving layout: what each word holds, and that nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax import quant
from mobiquant_jax.ops import StackedWeight, TiledWeight, serving_weight, sliced_matmul, tile_weight, untile_weight


@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [(160, (40, 16), 32), (256, (16,), 256), (192, (5,), 64)])
def test_round_trip(inputs, outputs, group_size, stacked_weights):
    weights = stacked_weights(np.random.default_rng(0), 2, inputs, outputs, group_size)
    tiled = tile_weight(weights)
    assert tiled.segments == outputs and tiled.layers == 2 and tiled.group_size == group_size
    jax.tree.map(np.testing.assert_array_equal, list(untile_weight(tiled)), weights)


def test_words_hold_the_codes_the_kernels_expect(stacked_weights):
    rng = np.random.default_rng(1)
    (weight,) = stacked_weights(rng, 2, 256, (48,), 64)
    tiled = tile_weight([weight])
    layer, plane = 1, 2
    codes = np.asarray(quant.unpack(weight.planes[plane][layer], 2, 256))
    words, affine = np.asarray(tiled.planes[plane])[layer], np.asarray(tiled.affine)[layer]
    for output, k in zip(rng.integers(0, 48, 300), rng.integers(0, 256, 300), strict=True):
        tile, row, high = output // 16, output % 8, output % 16 // 8
        i, s, half, quad, p = k % 128 // 32, k // 16 % 2, k // 8 % 2, k // 2 % 4, k % 2
        word = words[tile, k // 128, row * 4 + quad, high + 2 * half]
        assert (word >> (2 * i + 8 * (2 * s + p))) & 3 == codes[k, output]
        pair = affine[tile, k // 64, row, high]
        assert (int(pair) >> 16) - 32768 == weight.zero[layer, k // 64, output]
        scale = np.uint32((int(pair) & 0xFFFF) << 16).view(np.float32)
        assert scale == np.float32(weight.scale[layer, k // 64, output])


def test_bytes_read_count_the_planes_of_the_depth(stacked_weights):
    tiled = tile_weight(stacked_weights(np.random.default_rng(2), 3, 256, (64, 32)))
    codes, groups = 256 * 96 // 4, 2 * 96 * 4
    assert [tiled.bytes_read(depth) for depth in (1, 4)] == [codes + groups, 4 * codes + groups]
    with pytest.raises(ValueError, match="depth 5"):
        tiled.bytes_read(5)


@pytest.mark.parametrize("tokens", [3, 300])
def test_without_a_gpu_tiled_weights_multiply_all_the_same(tokens, stacked_weights, exact_product):
    rng = np.random.default_rng(tokens)
    weights = stacked_weights(rng, 2, 160, (40, 24), 32)
    x = jnp.asarray(rng.normal(size=(tokens, 160)), jnp.float32)
    depths = jnp.asarray(rng.integers(1, 5, (2, tokens)))
    got = sliced_matmul(x, tile_weight(weights), depths, layer=jnp.int32(1))
    np.testing.assert_allclose(got, exact_product(x, weights, depths, 1), rtol=1e-4, atol=1e-4)


def test_linears_side_by_side_keep_their_depths(stacked_weights, exact_product):
    rng = np.random.default_rng()
    weights = stacked_weights(rng, 2, 96, (40, 24), 48)  # groups that cannot be tiled
    stack = serving_weight(weights)
    assert isinstance(stack, StackedWeight) and stack.segments == (40, 24) and stack.layers == 2
    x = jnp.asarray(rng.normal(size=(2, 3, 96)), jnp.float32)
    depths = jnp.asarray(rng.integers(1, 5, (2, 2, 3)))
    for depth in depths, depths[0]:
        got = sliced_matmul(x, stack, depth, layer=jnp.int32(1), dtype=jnp.float32)
        each = jnp.broadcast_to(depth, (2, 2, 3)).reshape(2, 6)
        want = exact_product(x.reshape(6, 96), weights, each, 1)
        np.testing.assert_allclose(got.reshape(6, 64), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="2 segments"):
        sliced_matmul(x, stack, jnp.ones((3, 2, 3), jnp.int32), layer=0)


def test_the_layout_follows_the_platform_unless_it_is_named(stacked_weights, monkeypatch):
    weights = stacked_weights(np.random.default_rng(0), 1, 64, (16,), 32)
    layouts = {"gpu": TiledWeight, "cpu": StackedWeight, "tpu": StackedWeight}
    for platform, layout in layouts.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert type(serving_weight(weights)) is layout
        assert type(serving_weight(weights, "gpu")) is TiledWeight
        assert type(serving_weight(weights, "reference")) is StackedWeight


def test_what_cannot_be_tiled_or_multiplied_says_why(stacked_weights):
    rng = np.random.default_rng(3)
    (weight,) = stacked_weights(rng, 1, 160, (16,), 32)
    (other,) = stacked_weights(rng, 1, 96, (16,), 32)
    with pytest.raises(ValueError, match="160 and 96 inputs"):
        tile_weight([weight, other])
    one = jax.tree.map(lambda leaf: leaf[0], weight)
    with pytest.raises(ValueError, match="must be"):
        tile_weight([one])
    (odd,) = stacked_weights(rng, 1, 96, (16,), 48)
    with pytest.raises(ValueError, match="group size 48"):
        tile_weight([odd])
    x, depth = jnp.ones((1, 160)), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="layer 0 does not fit a single kernel"):
        sliced_matmul(x, one, depth, layer=0)
    with pytest.raises(ValueError, match="layer None does not fit stacked"):
        sliced_matmul(x, weight, depth)
    with pytest.raises(NotImplementedError, match="TiledWeight"):
        sliced_matmul(x, one, depth, implementation="gpu")
    with pytest.raises(NotImplementedError, match="Hopper"):
        sliced_matmul(x, tile_weight([weight]), depth, implementation="gpu")
