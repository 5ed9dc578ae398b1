"""Token ids of one part of a source: tokenized text, or ids stored in a file."""

from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int

from mobiquant_jax.data.sources import SPLITS, heldout_start, load_text


class Encoder(Protocol):
    """What is needed of a tokenizer; ``io.tokenizer.Tokenizer`` is one."""

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """Returns the token ids of a text."""


def load_token_ids(source: str, split: str, tokenizer: Encoder | None) -> Int[np.ndarray, " N"]:
    """Loads the token ids of one part of a source.

    Args:
      source: a text source of :func:`load_text`, or ``tokens:PATH.npy``: integer ids of any shape, read in order, whose
        last quarter is held out. The latter needs no tokenizer.
      split: ``calibration``, ``heldout``, or ``all`` for both.
      tokenizer: the model's; None if it has none.

    Returns:
      The token ids, [N].

    Raises:
      ValueError: as :func:`load_text`, text for a model without a tokenizer, or a file that holds no integer ids.
      FileNotFoundError: a file does not exist.
    """
    if not source.startswith("tokens:"):
        if tokenizer is None:
            raise ValueError(f"the model has no tokenizer for the text of '{source}': use tokens:PATH.npy")
        return tokenizer.encode(load_text(source, split))
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
    path = Path(source.removeprefix("tokens:"))
    if not path.is_file():
        raise FileNotFoundError(f"no token file '{path}'")
    try:
        ids = np.load(path, allow_pickle=False).reshape(-1)
    except (ValueError, EOFError) as error:
        raise ValueError(f"token file '{path}' is not a .npy array: {error}") from error
    if not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise ValueError(f"token file '{path}' holds {ids.size} values of {ids.dtype}, not integer ids")
    cut = heldout_start(len(ids))
    return {"calibration": ids[:cut], "heldout": ids[cut:], "all": ids}[split]
