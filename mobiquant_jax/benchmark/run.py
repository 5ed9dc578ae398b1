"""Measuring what a plan lists, row by row, until it is done or time is up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from mobiquant_jax.benchmark.memory import peak_memory
from mobiquant_jax.benchmark.plan import Group
from mobiquant_jax.benchmark.table import Row, Table
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.serving import PackedModel
from mobiquant_jax.serving.random_weights import random_dense, random_packed


class OutOfTime(Exception):
    """The next row might not be finished in time."""


@dataclass(kw_only=True)
class Models:
    """Makes the random models, one at a time: the device may not hold two."""

    config: LlamaConfig
    elastic: ElasticConfig
    _held: tuple[str, PackedModel] | None = None
    _only_packed: bool = True

    def get(self, weights: str | None) -> PackedModel | None:
        """The packed or the dense model, or none; the one held before is dropped."""
        if self._held is None or self._held[0] != weights:
            self._held = None
            self._only_packed &= weights == "packed"
            if weights == "packed":
                self._held = weights, random_packed(self.config, self.elastic, jax.random.key(0))
            elif weights == "dense":
                self._held = weights, random_dense(self.config, jax.random.key(0))
        return None if self._held is None else self._held[1]

    def peaks(self) -> Row:
        """Most memory used so far, in GB, under the name it goes by."""
        return {"memory_packed_GB" if self._only_packed else "memory_peak_GB": peak_memory()}


class Clock:
    """Stops a run before its time is up: as soon as a row as slow as the slowest so far would not fit."""

    def __init__(self, limit: float | None) -> None:
        """Starts.

        Args:
            limit: seconds, or None.
        """
        self._limit = limit
        self._started = self._row_started = time.monotonic()
        self._slowest = 0.0

    def row_done(self) -> None:
        """A row, with all that it needed, is complete."""
        now = time.monotonic()
        self._slowest = max(self._slowest, now - self._row_started)
        self._row_started = now

    def check(self) -> None:
        """Raises OutOfTime if the next row might end too late."""
        elapsed = time.monotonic() - self._started
        if self._limit is not None and elapsed + self._slowest >= self._limit:
            raise OutOfTime(f"stopped after {elapsed:.0f} of {self._limit:.0f} s")


def missing_rows(groups: Sequence[Group], table: Table) -> list[str]:
    """Names of the rows that are still to be measured."""
    return [
        " ".join([group.section, *(f"{name}={value}" for name, value in key.items())])
        for group in groups
        for key in table.missing(group.section, group.keys)
    ]


def measure(
    groups: Sequence[Group],
    table: Table,
    models: Models,
    clock: Clock,
    show: Callable[[str, Row], None],
) -> None:
    """Measures the rows that the table lacks; each is shown and saved as soon as it is there.

    Args:
        groups: what to measure, see `plan`.
        table: where the rows go.
        models: makes the models.
        clock: says when to stop.
        show: called with the section and row.

    Raises:
        OutOfTime: before a row that might not be finished in time.
    """
    for group in groups:
        missing = table.missing(group.section, group.keys)
        if not missing:
            continue
        clock.check()
        for row in group.rows(models.get(group.weights), missing):
            table.sessions[-1] |= models.peaks()
            table.add(group.section, row, alone=group.keys == ({},))
            show(group.section, row)
            clock.row_done()
            if table.missing(group.section, group.keys):
                clock.check()
