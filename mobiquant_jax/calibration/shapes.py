"""Shapes and types of stacked blocks on their way through calibration: one trace each for all stages and runs.

They are shared: nobody changes them.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp

from mobiquant_jax.calibration.linears import Params, pack_block, trainable
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig


def of_block(layers: Params) -> Params:
    """Those of one block, of the stacked ones'."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers)


@lru_cache(maxsize=8)
def dense_model(config: LlamaConfig) -> Params:
    """Of the unquantized model's parameters, whose ``layers`` are stacked."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params: Params = jax.eval_shape(lambda tokens: Llama(config).init(jax.random.key(0), tokens), tokens)["params"]
    return params


@lru_cache(maxsize=8)
def trained_layers(config: LlamaConfig, elastic: ElasticConfig) -> Params:
    """Of the blocks' parameters while they are trained."""

    def make(layers: Params) -> Params:
        keys = jax.random.split(jax.random.key(0), config.num_hidden_layers)
        return jax.vmap(lambda dense, key: trainable(dense, config, elastic, key))(layers, keys)

    return jax.eval_shape(make, dense_model(config)["layers"])


@lru_cache(maxsize=8)
def packed_layers(config: LlamaConfig, elastic: ElasticConfig) -> Params:
    """Of the elastic blocks' variables."""
    return jax.eval_shape(stacked_packing(config, elastic), trained_layers(config, elastic))


@lru_cache(maxsize=8)
def packing(config: LlamaConfig, elastic: ElasticConfig) -> Callable[[Params], Params]:
    """`pack_block` of a model: one function for equal arguments, so that all who compile it share its trace."""
    return partial(pack_block, config=config, elastic=elastic)


@lru_cache(maxsize=8)
def stacked_packing(config: LlamaConfig, elastic: ElasticConfig) -> Callable[[Params], Params]:
    """The same of stacked blocks."""
    return jax.vmap(packing(config, elastic))
