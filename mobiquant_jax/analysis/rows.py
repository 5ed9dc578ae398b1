"""Perplexities of many ways to run a model, collected window by window."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from mobiquant_jax.analysis.steps import Score
from mobiquant_jax.evaluation import perplexity_of


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
        window_nll: mean negative log-likelihood of each window's predictions, in nats.
    """

    name: str
    asked: float
    bits: float
    window_nll: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """On all windows."""
        return perplexity_of(float(np.mean(self.window_nll)))


def excess(row: Row, other: Row) -> tuple[float, float]:
    """By how much a row's perplexity exceeds another's on the same windows, with its standard error.

    The windows are paired: what makes one hard for both does not count.

    Returns:
        Both as fractions, ``exp(mean difference of nll) - 1``; the error is infinite with one window.
    """
    difference = np.subtract(row.window_nll, other.window_nll)
    ratio = perplexity_of(float(difference.mean()))
    count = len(difference)
    return ratio - 1, ratio * float(difference.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf


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
            nll = tuple(float(score.nll) / self._predictions for score in scores)
            yield Row(case.name, case.asked, float(np.mean([score.bits for score in scores])), nll)
