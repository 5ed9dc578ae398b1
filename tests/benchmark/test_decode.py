"""What decoding is timed on."""

import jax.numpy as jnp
import numpy as np

from mobiquant_jax.benchmark import BenchmarkSettings
from mobiquant_jax.benchmark.decode import _cache, _inputs
from mobiquant_jax.benchmark.memory import bytes_needed
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.serving import device_bytes, prepare


def test_the_sequences_of_a_batch_differ_and_take_different_depths(random_elastic):
    """Equal ones would read no deeper than one of them."""
    elastic = ElasticConfig(group_size=32, router_hidden_size=8, budget_grid=(2.0, 3.0, 5.0, 8.0))
    model = prepare(random_elastic(0, elastic), jnp.bfloat16)
    settings = BenchmarkSettings(context=6, steps=2, loops=1, batches=(8,), prefill=(4,))
    (tokens, bits), cache = _inputs(model, 8, 4.0), _cache(model, 8, settings)
    assert len(np.unique(tokens)) > 4 and len(np.unique(cache.k[0, :, 0, 0, 0])) > 4
    used = model.decode(model.variables, tokens, cache, bits)[1]
    assert len(np.unique(np.asarray(used))) > 4


def test_at_all_bits_a_step_reads_everything_but_the_other_tokens(random_elastic):
    elastic = ElasticConfig(group_size=32, budget_grid=(2.0, 8.0))
    model = prepare(random_elastic(0, elastic), jnp.bfloat16, "gpu")
    cache = _cache(model, 2, BenchmarkSettings(context=6, steps=2, loops=1, batches=(2,), prefill=(4,)))
    embedding = model.variables.embedding.nbytes
    assert model.variables.head is not None
    assert bytes_needed(model, cache, 8.0) == device_bytes((model.variables, cache.k, cache.v)) - embedding
