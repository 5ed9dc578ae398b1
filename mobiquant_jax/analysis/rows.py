"""Perplexities of many ways to run a model, collected window by window."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from mobiquant_jax.analysis.steps import Score
from mobiquant_jax.evaluation.perplexity import perplexity_of


class Case(NamedTuple):
    """A way to run the model.

    Attributes:
        name: the policy, or the tokens that were kept.
        asked: average bits it was to have, or the bits of the tokens that were not kept.
    """

    name: str
    asked: float


class Row(NamedTuple):
    """A measured case.

    Attributes:
        name: of the case.
        asked: of the case.
        bits: average bits it used.
        perplexity: on all windows.
    """

    name: str
    asked: float
    bits: float
    perplexity: float


class Tally:
    """Adds up scores of equal windows, each case by itself.

    Args:
        predictions: of a window.
    """

    def __init__(self, predictions: int) -> None:
        self._predictions = predictions
        self._scores: dict[Case, list[Score]] = {}

    def add(self, scores: Mapping[Case, Score]) -> None:
        """Adds a window's scores, fetched together once all of them are computed."""
        for case, score in zip(scores, jax.device_get(list(scores.values())), strict=True):
            self._scores.setdefault(case, []).append(score)

    def rows(self) -> Iterator[Row]:
        """The cases in the order in which they first came."""
        for case, scores in self._scores.items():
            nll = sum(float(score.nll) for score in scores) / (len(scores) * self._predictions)
            bits = sum(float(score.bits) for score in scores) / len(scores)
            yield Row(case.name, case.asked, bits, perplexity_of(nll))
