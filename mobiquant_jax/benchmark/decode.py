"""Decoding end to end: tokens a second with a full cache, and the memory that the program takes."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from mobiquant_jax.benchmark.memory import bytes_needed, program_memory
from mobiquant_jax.benchmark.settings import BenchmarkSettings
from mobiquant_jax.benchmark.table import Row
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.serving import PackedModel


def decode_rows(model: PackedModel, keys: Sequence[Row], settings: BenchmarkSettings) -> Iterator[Row]:
    """Decoding at several bits and batch sizes; one program for all bits of a batch size.

    Args:
        model: packed or dense.
        keys: ``batch`` and ``bits`` of each row.
        settings: context, steps and repeats.

    Yields:
        ``measured_bits``, ``ms`` of a step, ``tokens_per_s``, and ``needed_GB``: what a step must read at the mean
        depth. In a batch it reads more, what the deepest token needs. Of the program, its memory (`program_memory`).
    """
    for batch in dict.fromkeys(key["batch"] for key in keys):
        program, cache = compile_decoding(model, batch, settings), _cache(model, batch, settings)
        memory = program_memory(program)
        for bits in (key["bits"] for key in keys if key["batch"] == batch):
            seconds, used = decoding_seconds(model, program, batch, bits, settings)
            row = {"batch": batch, "bits": bits, "measured_bits": used, "ms": 1e3 * seconds}
            row["tokens_per_s"] = batch / seconds
            row["needed_GB"] = bytes_needed(model, cache, used) / 1e9
            yield row | memory


def compile_decoding(model: PackedModel, batch: int, settings: BenchmarkSettings) -> Compiled:
    """Greedy decoding of ``settings.steps`` tokens, compiled: no bits can compile it again."""

    def decode(variables: Any, cache: KVCache, tokens: Any, bits: Any) -> tuple[Any, ...]:
        def step(_: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            cache, tokens, used = carry
            logits, token_bits, cache = model.decode(variables, tokens, cache, bits)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), used + jnp.mean(token_bits)

        return jax.lax.fori_loop(0, settings.steps, step, (cache, tokens, jnp.zeros(())))

    cache = _cache(model, batch, settings)
    tokens, bits = _inputs(model, batch, 2.0)
    return jax.jit(decode, donate_argnums=1).lower(model.variables, cache, tokens, bits).compile()


def decoding_seconds(
    model: PackedModel, program: Compiled, batch: int, bits: float, settings: BenchmarkSettings
) -> tuple[float, float]:
    """Median time of a step, and the bits that the tokens used on average."""
    times, used = [], jnp.zeros(())
    for _ in range(settings.repeats + 1):  # the first records the device graph
        cache, (tokens, target) = jax.block_until_ready((_cache(model, batch, settings), _inputs(model, batch, bits)))
        start = time.perf_counter()
        _, _, used = jax.block_until_ready(program(model.variables, cache, tokens, target))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:])) / settings.steps, float(used) / settings.steps


def _cache(model: PackedModel, batch: int, settings: BenchmarkSettings) -> KVCache:
    empty = KVCache.create(model.config, batch, settings.context + settings.steps, jnp.bfloat16)
    k, v = _random_like(empty.k)
    return dataclasses.replace(empty, k=k, v=v, length=jnp.full(batch, settings.context, jnp.int32))


@jax.jit
def _random_like(cache: jax.Array) -> tuple[jax.Array, jax.Array]:
    k, v = (jax.random.normal(key, cache.shape, cache.dtype) for key in jax.random.split(jax.random.key(2)))
    return k, v


def _inputs(model: PackedModel, batch: int, bits: float) -> tuple[jax.Array, jax.Array]:
    """Another token for each sequence: equal ones would take equal depths, and a batch read no deeper than one."""
    tokens = jax.random.randint(jax.random.key(3), (batch, 1), 0, model.config.vocab_size, jnp.int32)
    return tokens, jnp.full(batch, bits, jnp.float32)
