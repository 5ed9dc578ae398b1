"""Fixed-length windows of token ids: the unit of calibration and of the perplexity protocol."""

import numpy as np
from jaxtyping import Int, Int32


def token_windows(
    token_ids: Int[np.ndarray, " N"], length: int, limit: int | None = None, vocab_size: int | None = None
) -> Int32[np.ndarray, "n length"]:
    """Cuts a token stream into non-overlapping windows, from the start; the tail that fills no window is dropped.

    Args:
      token_ids: the tokenized text, [N].
      length: tokens of a window, at least 2 (a window of T tokens makes T - 1 predictions).
      limit: the most windows to return; None for all.
      vocab_size: when given, every id must lie in [0, vocab_size).

    Returns:
      The windows, [n, length] with n = min(N // length, limit).

    Raises:
      ValueError: not one window fits, an id is outside the vocabulary, or an argument is out of range.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise ValueError(f"token ids must be a vector of integers, got {ids.dtype} of shape {ids.shape}")
    if length < 2:
        raise ValueError(f"a window must hold at least 2 tokens, got window length {length}")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of windows must be at least 1, got {limit}")
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    if vocab_size is not None and (ids.min() < 0 or ids.max() >= vocab_size):
        position = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise ValueError(f"token {ids[position]} at position {position} is outside the vocabulary of {vocab_size}")
    count = len(ids) // length if limit is None else min(len(ids) // length, limit)
    return ids[: count * length].reshape(count, length).astype(np.int32)
