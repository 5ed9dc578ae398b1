"""Windows of token ids: contiguous, from the start, and checked."""

import numpy as np
import pytest

from mobiquant_jax.data import token_windows


def test_windows_are_the_stream_without_its_tail():
    rng = np.random.default_rng()
    ids = rng.integers(0, 1000, 1003)
    windows = token_windows(ids, 20, vocab_size=1000)
    assert windows.shape == (50, 20) and windows.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate(list(windows)), ids[:1000])


def test_limit_keeps_the_first_windows():
    ids = np.arange(100)
    np.testing.assert_array_equal(token_windows(ids, 10, limit=3), token_windows(ids, 10)[:3])
    assert token_windows(ids, 10, limit=1000).shape == (10, 10)
    assert token_windows(ids, 100).shape == (1, 100)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (np.arange(9), {"length": 10}, "the text has 9 tokens, fewer than one window of 10"),
        (np.array([], np.int32), {"length": 2}, "the text has 0 tokens"),
        (np.array([1, 2, 512, 3]), {"length": 2, "vocab_size": 512}, "token 512 at position 2 is outside .* 512"),
        (np.array([1, -7, 0, 3]), {"length": 2, "vocab_size": 512}, "token -7 at position 1 is outside"),
        (np.arange(4), {"length": 1}, "at least 2 tokens, got window length 1"),
        (np.arange(4), {"length": 2, "limit": 0}, "at least 1, got 0"),
        (np.zeros((2, 2), int), {"length": 2}, r"got int64 of shape \(2, 2\)"),
        (np.zeros(4), {"length": 2}, "got float64 of shape"),
    ],
)
def test_mistakes_are_named(ids: np.ndarray, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        token_windows(ids, **arguments)
