"""What it costs to ask for other bits between two decoding steps."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobiquant_jax.benchmark.table import Row
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.serving import PackedModel

_RUNS = 20


def switch_rows(model: PackedModel) -> Iterator[Row]:
    """Yields the times of single steps whose bits stay, and of those whose bits change, at the same average bits.

    ``stay_ms``, ``change_ms`` and their difference ``switch_ms`` are wall times that begin at the host; ``programs`` is
    how many were compiled.
    """
    step: Any = jax.jit(model.decode)
    cache = KVCache.create(model.config, 1, 8, jnp.bfloat16)
    tokens = jnp.ones((1, 1), jnp.int32)

    def milliseconds(sequence: Sequence[float]) -> list[float]:
        times = []
        for bits in sequence:
            start = time.perf_counter()
            jax.block_until_ready(step(model.variables, tokens, cache, np.float32(bits))[0])
            times.append(1e3 * (time.perf_counter() - start))
        return times

    milliseconds([2.0, 8.0, 2.0])  # compiles
    stay = np.median([milliseconds([bits] * _RUNS) for bits in (2.0, 8.0)], axis=1)
    change = np.median(np.reshape(milliseconds([2.0, 8.0] * _RUNS), (_RUNS, 2)), axis=0)
    result = {"stay_ms": float(stay.mean()), "change_ms": float(change.mean())}
    yield result | {"switch_ms": result["change_ms"] - result["stay_ms"], "programs": step._cache_size()}
