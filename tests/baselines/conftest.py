"""A small random model, windows, and the methods compiled once for all tests: compilation is most of their time."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.baselines import METHODS, QuantSpec, autoround, omniquant, qat
from mobiquant_jax.baselines.training import build_fit
from mobiquant_jax.models import Llama, LlamaConfig

GROUP_SIZE = 16
TRAINED = {"omniquant": omniquant, "qat": qat, "autoround": autoround}


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


@pytest.fixture(scope="session")
def block(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), params["layers"])


@pytest.fixture(scope="session")
def spec(config) -> QuantSpec:
    return QuantSpec(config=config, bits=2, group_size=GROUP_SIZE)


@pytest.fixture(scope="session")
def fits(spec):
    """The fit of each trained method at two bits."""
    return {name: build_fit(spec, module.parametrization(spec)) for name, module in TRAINED.items()}


@pytest.fixture(scope="session")
def builders(spec, fits):
    """The block function of each method at two bits, the trained ones with the fits above."""
    built = {name: METHODS[name].build(spec) for name in ("gptq", "awq")}
    for name, module in TRAINED.items():
        with mock.patch.object(module, "build_fit", lambda *_, fit=fits[name]: fit):
            built[name] = METHODS[name].build(spec)
    return built
