"""Text of several requests that grow at the same time, in an order that can be read."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mobiquant_jax.io.tokenizer import Tokenizer

_CUT = "\N{REPLACEMENT CHARACTER}"  # the rest of the character is still to come


class Transcript:
    """Requests one after the other, the first that is unfinished shown as it grows; several are numbered."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Starts with no new tokens.

        Args:
            tokenizer: of the model.
            prompts: texts that are continued.
            max_new_tokens: tokens after which a request is finished, if no end token comes before.
        """
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        numbers = [f"[{i}] " if len(prompts) > 1 else "" for i in range(1, len(prompts) + 1)]
        self._starts = [number + prompt for number, prompt in zip(numbers, prompts, strict=True)]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._current = self._shown = 0

    def add(self, tokens: Sequence[Int[np.ndarray, " n"]] = ()) -> str:
        """Takes the tokens that each request gained, and returns the text that can be shown now."""
        for mine, new in zip(self._tokens, tokens, strict=False):
            mine += [int(token) for token in new]
        fresh = ""
        while self._current < len(self._tokens):
            text = self._text(self._current)
            fresh += text[self._shown :]
            self._shown = len(text)
            if not self._finished(self._current):
                break
            fresh += "\n"
            self._current, self._shown = self._current + 1, 0
        return fresh

    def _text(self, request: int) -> str:
        kept = [token for token in self._tokens[request] if token not in self._tokenizer.eos_token_ids]
        return self._starts[request] + self._tokenizer.decode(kept).rstrip(_CUT)

    def _finished(self, request: int) -> bool:
        tokens = self._tokens[request]
        return len(tokens) >= self._max_new_tokens or tokens[-1:] != [] and tokens[-1] in self._tokenizer.eos_token_ids
