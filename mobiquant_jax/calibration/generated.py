"""Calibration text that the unquantized model writes itself (the idea of LLM-QAT, arXiv 2305.17888).

A few hundred windows of text are soon learned by heart when all weights are trained. The model that is to be matched
is also a source of text without end, and on its own text there is exactly its own distribution to match.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from mobiquant_jax import distributed
from mobiquant_jax.calibration.linears import Params
from mobiquant_jax.models import KVCache, LlamaConfig
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.serving import SamplingConfig, generate

PIECE_LENGTH = 256  # tokens of a generated text; the work of a token grows with the length of what precedes it
PROMPT_LENGTH = 16  # of which are the beginning, cut from the calibration text

BATCH_BYTES = 8e9  # most that all texts written at once take: their caches, and the logits of their beginnings


def write_windows(
    config: LlamaConfig,
    params: Params,
    windows: Int[np.ndarray, "W T"],
    count: int,
    *,
    seed: int,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int[np.ndarray, "count T"]:
    """Lets the unquantized model continue snippets of the calibration text, sampled at temperature 1.

    Args:
        config: architecture.
        params: the unquantized model's parameters, on their devices; several processes write the same together.
        windows: calibration tokens, whose snippets the texts start from.
        count: windows to write; each holds several texts one after the other.
        seed: of the snippets and of sampling.
        dtype: type of the activations and the cache.
        progress: called with (texts written, texts in all) after each batch.

    Raises:
        ValueError: windows shorter than a snippet and one token.
    """
    length = windows.shape[1]
    piece = min(PIECE_LENGTH, length)
    if piece <= PROMPT_LENGTH:
        raise ValueError(f"windows of {length} tokens are too short to generate: more than {PROMPT_LENGTH} are needed")
    pieces = -(-count * length // piece)
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, piece, dtype))
    logits = 4 * PROMPT_LENGTH * config.vocab_size
    text_bytes = logits + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    at_once = max(1, int(BATCH_BYTES / text_bytes))
    batch_size = -(-pieces // -(-pieces // at_once))  # as even as can be
    model = ElasticModel(config=config, variables={"params": params}, dtype=dtype)
    rng = np.random.default_rng([seed, 2])
    text = windows.ravel()
    written: list[np.ndarray] = []
    for first in range(0, pieces, batch_size):
        starts = rng.integers(0, text.size - PROMPT_LENGTH, batch_size)
        prompts = text[starts[:, None] + np.arange(PROMPT_LENGTH)]  # [batch, PROMPT_LENGTH]
        tokens = generate(
            model.decode,
            model.variables,
            config,
            prompts,
            np.full(batch_size, PROMPT_LENGTH),
            max_new_tokens=piece - PROMPT_LENGTH,
            key=jax.random.fold_in(jax.random.key(seed), first),
            bits=8.0,
            sampling=SamplingConfig(temperature=1.0),
            eos_token_ids=(),
            cache_dtype=dtype,
        ).tokens
        written.append(np.concatenate([prompts, distributed.fetch(tokens)], axis=1))
        progress(min(first + batch_size, pieces), pieces)
    return np.concatenate(written).astype(np.int32).ravel()[: count * length].reshape(count, length)
