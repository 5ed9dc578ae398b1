"""How fast this device reads memory: what the kernels' reading is measured against."""

import functools
from functools import partial

import jax
import jax.numpy as jnp

from mobiquant_jax.benchmark.timing import call_seconds, looped

_WORDS = {"cpu": 2**22}  # of four bytes; accelerators read 4 GiB
_LOOPS = 10  # within one program: what a call costs is a tenth of one reading


@functools.cache
def read_bandwidth() -> float:
    """Bytes a second of reading a large array, measured once a process."""
    count = _WORDS.get(jax.default_backend(), 2**30)
    words = jnp.arange(count, dtype=jnp.uint32)
    program = looped(lambda zero, words: jnp.max(words ^ zero.astype(words.dtype)), _LOOPS)
    return _LOOPS * words.nbytes / call_seconds(partial(program, words), repeats=5)
