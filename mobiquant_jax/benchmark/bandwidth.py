"""How fast this device reads memory: what the kernels' reading is measured against."""

import functools
from functools import partial

import jax
import jax.numpy as jnp

from mobiquant_jax.benchmark.timing import call_seconds

_WORDS = {"cpu": 2**22}  # of four bytes; accelerators read 4 GiB, which hides what a call costs


@functools.cache
def read_bandwidth() -> float:
    """Bytes a second of reading a large array, measured once a process."""
    count = _WORDS.get(jax.default_backend(), 2**30)
    words = jnp.arange(count, dtype=jnp.uint32)
    return words.nbytes / call_seconds(partial(jax.jit(jnp.max), words), repeats=5)
