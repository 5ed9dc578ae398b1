"""The CUDA kernels on a GPU: ``JAX_PLATFORMS=cuda python -m pytest -m gpu tests``."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.ops import sliced_matmul, tile_weight

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")


def draw(rng, stacked_weights, tokens, inputs, outputs, group_size=128, layers=3):
    weights = stacked_weights(rng, layers, inputs, outputs, group_size)
    x = jnp.asarray(rng.normal(loc=0.1, size=(tokens, inputs)), jnp.bfloat16)
    depths = jnp.asarray(rng.integers(1, 5, (len(outputs), tokens)), jnp.int32)
    return weights, x, depths


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape and np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# Decode keeps the codes exact and x to 16 bits; prefill rounds each weight to bfloat16, as a dense bfloat16 model does.
LIMITS = {"decode": 1e-4, "prefill": 3e-3}


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 64, 300, 1030])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size"),
    [
        (4096, (1024, 256, 256), 128),
        (14336, (256,), 128),
        (576, (576, 192, 192), 64),
        (1536, (576,), 64),
        (160, (172, 172), 32),
        (512, (40,), 256),
        (512, (8192, 4096), 128),  # a cluster of the prefill kernel gets more than one tile
    ],
)
def test_matches_float64(tokens, inputs, outputs, group_size, stacked_weights, exact_product):
    rng = np.random.default_rng(tokens * 7 + inputs)
    weights, x, depths = draw(rng, stacked_weights, tokens, inputs, outputs, group_size)
    layer = int(rng.integers(3))
    matmul = jax.jit(partial(sliced_matmul, implementation="gpu"))
    got = matmul(x, tile_weight(weights), depths, layer=jnp.int32(layer))
    assert error(got, exact_product(x, weights, depths, layer)) < LIMITS["decode" if tokens <= 16 else "prefill"]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 16, 256, 700])
def test_one_depth_for_all(tokens, depth, stacked_weights, exact_product):
    rng = np.random.default_rng(tokens + depth)
    weights, x, depths = draw(rng, stacked_weights, tokens, 512, (256, 64))
    depths = jnp.full_like(depths, depth)
    got = sliced_matmul(x, tile_weight(weights), depths, layer=2, implementation="gpu", dtype=jnp.bfloat16)
    assert error(got.astype(jnp.float32), exact_product(x, weights, depths, 2)) < 5e-3


@pytest.mark.parametrize(
    ("group_size", "dtype"), [(128, "bfloat16"), (128, "float32"), (64, "bfloat16"), (32, "float32")]
)
def test_every_width_of_a_tile(group_size, dtype, stacked_weights, exact_product):
    rng = np.random.default_rng(group_size)
    # As many outputs as keep 66 clusters busy with one tile: cut in two, it would take two turns.
    outputs = 66 * 256
    weights = stacked_weights(rng, 1, 256, (outputs,), group_size)
    tiled = tile_weight(weights)
    matmul = jax.jit(partial(sliced_matmul, implementation="gpu", dtype=dtype))
    for width in range(2, 17):
        tokens = 16 * width - 3
        x = jnp.asarray(rng.normal(loc=0.1, size=(tokens, 256)), jnp.bfloat16)
        depths = jnp.full((1, tokens), width % 4 + 1)
        got = matmul(x, tiled, depths, layer=jnp.int32(0)).astype(jnp.float32)
        assert error(got, exact_product(x, weights, depths, 0)) < (5e-3 if dtype == "bfloat16" else LIMITS["prefill"])


@pytest.mark.parametrize("tokens", [40, 500, 2050])
@pytest.mark.parametrize("rare", [(0, 0, 0), (1, 1, 1), (64, 0, 65), (200, 17, 3)])
def test_depths_that_few_tokens_have(rare, tokens, stacked_weights, exact_product):
    rng = np.random.default_rng(tokens + sum(rare))
    weights, x, _ = draw(rng, stacked_weights, tokens, 256, (512, 128))
    depths = np.full((2, tokens), 2, np.int32)
    for row in depths:
        row[: sum(rare)] = np.repeat([1, 3, 4], rare)[:tokens]
        rng.shuffle(row)
    got = sliced_matmul(x, tile_weight(weights), jnp.asarray(depths), layer=1, implementation="gpu")
    assert error(got, exact_product(x, weights, depths, 1)) < LIMITS["prefill"]


@pytest.mark.parametrize("tokens", [2, 40])
def test_outliers_and_what_is_not_finite(tokens, stacked_weights, exact_product):
    rng = np.random.default_rng(tokens)
    weights, x, depths = draw(rng, stacked_weights, tokens, 512, (64,))
    tiled = tile_weight(weights)
    x = x.at[:, 7].multiply(3000.0).at[1].multiply(1e-20)  # an attention sink; and a token next to nothing
    got = sliced_matmul(x, tiled, depths, layer=0, implementation="gpu")
    want = exact_product(x, weights, depths, 0)
    # In decode, rounding within a group costs at most sqrt(128 / 12) / 32639 = 1e-4 of its largest input's part.
    for t in range(2):
        assert error(got[t], want[t]) < (2e-4 if tokens <= 16 else LIMITS["prefill"])
    for value in (np.inf, np.nan):
        got = np.asarray(sliced_matmul(x.at[0, 3].set(value), tiled, depths, layer=0, implementation="gpu"))
        assert not np.isfinite(got[0]).any() and np.isfinite(got[1:]).all()


def test_tokens_do_not_influence_each_other(stacked_weights):
    rng = np.random.default_rng(0)
    weights, x, depths = draw(rng, stacked_weights, 16, 1024, (512,))
    tiled = tile_weight(weights)
    together = np.asarray(sliced_matmul(x, tiled, depths, layer=1, implementation="gpu"))
    np.testing.assert_array_equal(
        together[:8], np.asarray(sliced_matmul(x[:8], tiled, depths[:, :8], layer=1, implementation="gpu"))
    )
    for t in (0, 5):
        alone = sliced_matmul(x[t : t + 1], tiled, depths[:, t : t + 1], layer=1, implementation="gpu")
        np.testing.assert_array_equal(together[t], np.asarray(alone)[0])


def test_changing_bits_compiles_nothing_and_waits_for_nothing(stacked_weights):
    rng = np.random.default_rng(1)
    weights, x, depths = draw(rng, stacked_weights, 4, 512, (256,))
    tiled = tile_weight(weights)

    @jax.jit
    def chain(x, tiled, depths):
        def layer(y, index):
            out = sliced_matmul(y, tiled, depths, layer=index, implementation="gpu")
            return jnp.tile(out, 2).astype(jnp.bfloat16), jnp.sum(out)

        return jax.lax.scan(layer, x, jnp.arange(3))

    jax.block_until_ready(chain(x, tiled, depths))
    others = [jax.block_until_ready(5 - depths), jnp.ones_like(depths)]
    with jax.transfer_guard("disallow"):  # any host round trip inside raises
        for depths in others:
            jax.block_until_ready(chain(x, tiled, depths))
    assert chain._cache_size() == 1


def test_stacked_weights_are_not_copied(stacked_weights):
    rng = np.random.default_rng(2)
    weights, x, depths = draw(rng, stacked_weights, 1, 512, (512,), layers=8)
    tiled = tile_weight(weights)

    def chain(x, tiled, depths):
        def layer(y, index):
            out = sliced_matmul(y, tiled, depths, layer=index, implementation="gpu")
            return out.astype(jnp.bfloat16), None

        return jax.lax.scan(layer, x, jnp.arange(8))[0]

    memory = jax.jit(chain).lower(x, tiled, depths).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tiled.bytes_read(1), memory
