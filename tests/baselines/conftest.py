"""A small random model and the real stories260K, with windows, for all baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.models import Llama, LlamaConfig

GROUP_SIZE = 16


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )


@pytest.fixture(scope="session")
def params(config):
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(Llama(config).init)(jax.random.key(7), tokens)["params"]
    rng = np.random.default_rng(8)
    for norm in ("attention_norm", "mlp_norm"):  # a few large channels, as real models have
        scale = params["layers"][norm]["scale"]
        params["layers"][norm]["scale"] = jnp.asarray(np.exp(rng.normal(size=scale.shape)), jnp.float32)
    return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="session")
def windows(config) -> np.ndarray:
    return np.random.default_rng(9).integers(0, config.vocab_size, (6, 20)).astype(np.int32)


@pytest.fixture
def block(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), params["layers"])
