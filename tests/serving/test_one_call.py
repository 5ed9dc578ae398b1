"""What a decode step is told to fetch ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.models.kv_cache import KVCache
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


def test_a_step_tells_the_kernels_what_to_expect(random_elastic, monkeypatch):
    packed = prepare(random_elastic(0, ElasticConfig(group_size=32, budget_grid=(2.0, 8.0))), jnp.bfloat16, "gpu")
    told = []

    def kernels(x, rotation, positions, norms, eps, key, value, sites, thresholds, expected):
        told.append(int(expected))
        return DecodedLayers(x, key, value, jnp.ones((key.shape[0], 7, x.shape[0]), jnp.int32))

    monkeypatch.setattr("mobiquant_jax.serving.packed.supports_one_call", lambda *_: True)
    monkeypatch.setattr("mobiquant_jax.serving.one_call.decode_layers", kernels)
    cache = KVCache.create(packed.config, 2, 4, jnp.bfloat16)
    tokens = jnp.array([[1], [2]])
    for bits in (2.0, 4.0, jnp.array([2.0, 6.0])):
        packed.decode(packed.variables, tokens, cache, bits)
    assert told == [1, 2, 3]
