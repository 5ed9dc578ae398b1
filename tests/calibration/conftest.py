"""A model of two small blocks, the recipes for it, and streams to train a block on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import BlockTrainer, CalibrationConfig
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticConfig


@pytest.fixture(scope="session")
def config(small_config):
    return small_config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


@pytest.fixture(scope="session")
def elastic():
    """Two slices of four bits: half the work of the usual four, and every kind of it."""
    return ElasticConfig(group_size=8, slice_bits=(4, 4), router_hidden_size=4, budget_grid=(4.0, 5.0, 6.0, 8.0))


@pytest.fixture(scope="session")
def recipe():
    """A function that makes a recipe of seconds: four windows at two budgets."""

    def make(**changes):
        fields = dict(
            windows=4,
            window_length=16,
            budgets=(5.0, 6.0),
            epochs=4,
            joint_epochs=2,
            weight_lr=3e-3,
            threshold_windows=2,
            end_weight_lr=1e-3,
        )
        return CalibrationConfig(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def params(config):
    """A dense model whose norms are not all one."""
    rng = np.random.default_rng(31)
    params = jax.jit(Llama(config).init)(jax.random.key(30), jnp.zeros((1, 2), jnp.int32))["params"]

    def shaken(path, leaf):
        norm = "norm" in jax.tree_util.keystr(path)
        return leaf * jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype) if norm else leaf

    return jax.tree_util.tree_map_with_path(shaken, params)


@pytest.fixture(scope="session")
def dense(params):
    """The first dense block."""
    return jax.tree.map(lambda leaf: leaf[0], params["layers"])


@pytest.fixture(scope="session")
def make_trainer(config, elastic):
    def make(calibration, elastic=elastic, cls=BlockTrainer, config=config):
        return cls(config=config, elastic=elastic, calibration=calibration, samples=Samples.create(calibration))

    return make


@pytest.fixture(scope="session")
def streams():
    """``(trainer, dense block) -> (quantized stream, target)``: a noisy copy of random activations, and the target."""

    def make(trainer, dense, seed=32):
        rng = np.random.default_rng(seed)
        windows, length = trainer.calibration.windows, trainer.calibration.window_length
        full = rng.normal(size=(windows, length, trainer.config.hidden_size)).astype(np.float32)
        quantized = full[trainer.samples.window] + 0.01 * rng.normal(
            size=(len(trainer.samples.window), *full.shape[1:])
        )
        return jnp.asarray(quantized, jnp.float32), trainer.dense_block(dense, jnp.asarray(full))

    return make
