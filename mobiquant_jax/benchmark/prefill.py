"""The products of a prefill: tokens of mixed depths against packed weights, beside the same in bfloat16."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mobiquant_jax.benchmark.settings import BenchmarkSettings
from mobiquant_jax.benchmark.table import Row
from mobiquant_jax.benchmark.timing import busy_seconds, call_seconds, looped
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.ops import sliced_matmul
from mobiquant_jax.serving.random_weights import random_dense, random_packed

_LAYERS = 4  # enough that a layer's weights leave the cache before they are read again
_LOOPS = 5  # for each of a decoding step's loops, a prefill's products take so many times longer


def prefill_rows(
    config: LlamaConfig, elastic: ElasticConfig, keys: Sequence[Row], settings: BenchmarkSettings
) -> Iterator[Row]:
    """Time of a layer's four products over many tokens, depths drawn evenly from 1 to 4.

    Args:
        config: the architecture, of which a few layers are made.
        elastic: slicing and routing.
        keys: ``tokens`` of each row.
        settings: loops and repeats.

    Yields:
        ``mixed_ms`` and ``bf16_ms`` of a layer, their ``ratio``, and the same of the time that the device was busy.
    """
    small = dataclasses.replace(config, num_hidden_layers=min(_LAYERS, config.num_hidden_layers))
    packed = {n: s.weight for n, s in random_packed(small, elastic, jax.random.key(0)).variables.sites.items()}
    dense = {n: s.kernels for n, s in random_dense(small, jax.random.key(0)).variables.sites.items()}
    loops = -(-settings.loops // _LOOPS)
    passes = loops * small.num_hidden_layers
    for tokens in (key["tokens"] for key in keys):
        inputs = {name: _inputs(tokens, weight.in_features) for name, weight in packed.items()}
        depths = {name: _depths(len(weight.segments), tokens) for name, weight in packed.items()}
        calls: dict[str, Any] = {
            "mixed": partial(looped(_packed_layers, loops), packed, inputs, depths),
            "bf16": partial(looped(_dense_layers, loops), dense, inputs),
        }
        row: Row = {"tokens": tokens}
        for name, call in calls.items():
            row[f"{name}_ms"] = 1e3 * call_seconds(call, settings.repeats) / passes
            busy = busy_seconds(call)
            row[f"{name}_busy_ms"] = None if busy is None else 1e3 * busy / passes
        yield row | {"ratio": row["bf16_ms"] / row["mixed_ms"]}


def _packed_layers(zero: jax.Array, weights: Any, inputs: Any, depths: Any) -> list[jax.Array]:
    at = jax.tree.map(lambda depth: depth + zero, depths)
    return [
        sliced_matmul(inputs[name], weight, at[name], layer=layer, dtype=jnp.bfloat16)
        for layer in range(next(iter(weights.values())).layers)
        for name, weight in weights.items()
    ]


def _dense_layers(zero: jax.Array, kernels: Any, inputs: Any) -> list[jax.Array]:
    # An addition of nothing to the inputs, once for all layers, keeps the products in the loop.
    x = jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), inputs)
    layers = len(next(iter(kernels.values())))
    return [jnp.matmul(x[name], stack[layer]) for layer in range(layers) for name, stack in kernels.items()]


def _inputs(tokens: int, features: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (tokens, features), jnp.bfloat16)


def _depths(segments: int, tokens: int) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (segments, tokens), 1, 5)
