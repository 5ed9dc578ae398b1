"""What a decode step hands to the kernels of all layers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.models.rope import inverse_frequencies
from mobiquant_jax.ops.decode_layers import DecodedLayers
from mobiquant_jax.serving import prepare
from mobiquant_jax.serving.one_call import expected_slices


@pytest.mark.parametrize("batch", [1, 2, 4, 16])
def test_slices_are_expected_that_three_products_in_four_read(batch):
    for bits in np.linspace(2, 8, 49):  # in steps of 1/8
        below, share = divmod(bits / 2, 1)  # tokens read this many slices, and this share of them one more
        likely = 1 - (1 - share) ** batch >= 0.75
        assert int(expected_slices(jnp.full(batch, bits, jnp.float32))) == below + likely, bits


def test_the_deepest_sequence_of_a_batch_counts():
    expected = jax.jit(expected_slices)
    assert int(expected(jnp.array([2.0, 8.0, 2.5]))) == 4
    assert int(expected(jnp.array([2.0, 2.0, 2.0]))) == 1


@pytest.fixture
def told(monkeypatch):
    """What the kernels were handed, call by call; they do nothing."""
    calls = []

    def kernels(x, rotation, positions, norms, eps, key, value, sites, thresholds, expected):
        calls.append({"rotation": rotation, "thresholds": thresholds, "expected": int(expected)})
        return DecodedLayers(x, key, value, jnp.ones((key.shape[0], 7, x.shape[0]), jnp.int32))

    monkeypatch.setattr("mobiquant_jax.serving.packed.supports_one_call", lambda *_: True)
    monkeypatch.setattr("mobiquant_jax.serving.one_call.decode_layers", kernels)
    return calls


def test_a_step_tells_the_kernels_what_to_expect(random_elastic, told):
    packed = prepare(random_elastic(0, ElasticConfig(group_size=32, budget_grid=(2.0, 8.0))), jnp.bfloat16, "gpu")
    cache = KVCache.create(packed.config, 2, 4, jnp.bfloat16)
    for bits in (2.0, 4.0, jnp.array([2.0, 6.0])):
        packed.decode(packed.variables, jnp.array([[1], [2]]), cache, bits)
    assert [call["expected"] for call in told] == [1, 2, 3]


def test_a_step_hands_over_each_linears_thresholds_and_the_rotation(random_elastic, told):
    grid = (2.0, 3.0, 5.0, 8.0)
    model = random_elastic(0, ElasticConfig(group_size=32, budget_grid=grid))
    packed = prepare(model, jnp.bfloat16, "gpu")
    cache = replace(KVCache.create(packed.config, 2, 8, jnp.bfloat16), length=jnp.array([3, 5]))
    bits = np.array([2.5, 6.0], np.float32)
    packed.decode(packed.variables, jnp.array([[1], [2]]), cache, jnp.asarray(bits))
    layers = model.variables["routing"]["layers"]
    parts = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
    tables = [layers[part][f"{name}_proj"]["thresholds"] for part, names in parts.items() for name in names]
    want = [[np.interp(bits, grid, of_layer) for of_layer in np.asarray(table)] for table in tables]
    np.testing.assert_allclose(told[0]["thresholds"], np.swapaxes(want, 0, 1), rtol=1e-5, atol=1e-6)
    angles = np.array([[3.0], [5.0]]) * inverse_frequencies(packed.config)
    np.testing.assert_allclose(told[0]["rotation"], [np.cos(angles), np.sin(angles)], atol=1e-6)
