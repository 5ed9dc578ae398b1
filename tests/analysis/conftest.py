"""A small elastic model of two slices, which compiles in half the time of four, and measurements that need no model."""

import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.analysis.probe import Probe
from mobiquant_jax.analysis.steps import Steps
from mobiquant_jax.io.checkpoint import save_checkpoint
from mobiquant_jax.models.elastic import ElasticConfig

LENGTH = 24


@pytest.fixture(scope="session")
def model(random_elastic):
    elastic = ElasticConfig(group_size=16, slice_bits=(4, 4), router_hidden_size=4, budget_grid=(4.0, 5.0, 6.0, 8.0))
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    return random_elastic(50, elastic, **sizes)


@pytest.fixture(scope="session")
def tokens(model):
    return jnp.asarray(np.random.default_rng(51).integers(0, model.config.vocab_size, (2, LENGTH)))


@pytest.fixture(scope="session")
def steps(model):
    return Steps(model=model)


@pytest.fixture(scope="session")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("analysis") / "checkpoint"
    save_checkpoint(path, model, {"origin": "drawn at random"})
    return path


@pytest.fixture(scope="session")
def random_probe():
    """Measurements of two layers of three linears and three slices, drawn at random."""
    rng = np.random.default_rng(52)
    batch = (2, 3, 1, 47)

    def draw(*shape):
        return jnp.asarray(rng.exponential(size=(*batch, *shape)), jnp.float32)

    return Probe(errors=draw(2), magnitude=draw(), scores=draw(2), norm=draw(), bits=draw())
