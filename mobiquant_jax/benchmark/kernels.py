"""The fused products of a decoding step, batch 1, at each depth."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mobiquant_jax.benchmark.bandwidth import read_bandwidth
from mobiquant_jax.benchmark.settings import DEPTHS, BenchmarkSettings
from mobiquant_jax.benchmark.table import Row
from mobiquant_jax.benchmark.timing import busy_seconds, call_seconds, looped
from mobiquant_jax.ops import sliced_matmul
from mobiquant_jax.serving import PackedModel
from mobiquant_jax.serving.site import SITES

ALL = "+".join(SITES)


def kernel_keys() -> tuple[Row, ...]:
    """Each fused product, then a layer's four one after the other."""
    return tuple({"product": product, "depth": depth} for product in (*SITES, ALL) for depth in DEPTHS)


def kernel_rows(model: PackedModel, keys: Sequence[Row], settings: BenchmarkSettings) -> Iterator[Row]:
    """Time of products: in a loop over all layers, so that none finds its weights in a cache, and the kernels' alone.

    Args:
        model: its weights are read.
        keys: ``product`` and ``depth`` of each row.
        settings: loops and repeats.

    Yields:
        ``us`` of a layer's product, with the gaps between kernels, ``busy_us`` without (see `timing`), and what both
        make of the bytes read, in percent of the measured read bandwidth.
    """
    bandwidth = read_bandwidth()
    passes = settings.loops * model.config.num_hidden_layers
    for product in dict.fromkeys(key["product"] for key in keys):
        weights = {name: model.variables.sites[name].weight for name in product.split("+")}
        inputs = {name: _inputs(weight.in_features) for name, weight in weights.items()}
        program = partial(looped(_layers, settings.loops), weights, inputs)
        for depth in (key["depth"] for key in keys if key["product"] == product):
            call = partial(program, jnp.int32(depth))
            read = sum(weight.bytes_read(depth) for weight in weights.values())
            took = call_seconds(call, settings.repeats) / passes
            row = {"product": product, "depth": depth, "us": 1e6 * took, "MB": read / 1e6}
            row["percent_of_read_bandwidth"] = 100 * read / took / bandwidth
            busy = busy_seconds(call)
            row["busy_us"] = None if busy is None else 1e6 * busy / passes
            row["busy_percent"] = None if busy is None else 100 * read * passes / busy / bandwidth
            yield row | {"read_bandwidth_TBps": bandwidth / 1e12}


def _layers(zero: jax.Array, weights: Any, inputs: Any, depth: jax.Array) -> list[jax.Array]:
    at, outputs = jnp.broadcast_to(depth + zero, (1,)), []
    for layer in range(next(iter(weights.values())).layers):  # unrolled: one device graph
        for name, weight in weights.items():
            outputs.append(sliced_matmul(inputs[name], weight, at, layer=layer))
    return outputs


def _inputs(features: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (1, features), jnp.bfloat16)
