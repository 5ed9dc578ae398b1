"""The rows of a table in one JSON file, rewritten after each: a killed run loses nothing and is resumed.

identity   what all rows have in common: fingerprints of model, calibration data and texts, and how they are used
sessions   where the rows came from: command, commit, versions, devices; a row's ``session`` is an index
rows       {method, bits, calibrated_bits, seed, settings, text, perplexity, ...}, or those of another table: the
           columns of its key, and what was measured
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobiquant_jax.files import check_same, continues, read_json, save_json

PERPLEXITY_KEY = ("method", "bits", "calibrated_bits", "seed", "settings", "text")
Row = dict[str, Any]


@dataclass(kw_only=True)
class Results:
    """A table under construction.

    Attributes:
        path: its file, or None to keep it in memory.
        identity: what all rows have in common; its ``texts`` may grow.
        sessions: provenance of each process that added rows.
        rows: the table.
        key: the columns that tell one row from another.
    """

    path: Path | None
    identity: dict[str, Any]
    sessions: list[dict[str, Any]]
    rows: list[Row] = field(default_factory=list)
    key: tuple[str, ...] = PERPLEXITY_KEY

    def __contains__(self, row: Row) -> bool:
        """Whether there is a row of the same key: in a table of perplexities, for the same model and text."""
        return self._key_of(row) in {self._key_of(other) for other in self.rows}

    def add(self, row: Row) -> None:
        """Adds a row and rewrites the file."""
        self.rows.append(json.loads(json.dumps({**row, "session": len(self.sessions) - 1})))
        if self.path is not None:
            content = {"identity": self.identity, "sessions": self.sessions, "rows": self.rows}
            save_json(self.path, content, indent=1)

    def _key_of(self, row: Row) -> str:
        return json.dumps([row[name] for name in self.key], sort_keys=True)


def open_results(
    path: str | Path | None,
    identity: dict[str, Any],
    session: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    key: tuple[str, ...] = PERPLEXITY_KEY,
) -> Results:
    """A new table, or one to be continued.

    Args:
        path: its file; None to keep the table in memory.
        identity: what all rows have in common, JSON-ready. A table may be continued with other ``texts``, and by a
            session that knows fewer or further fields.
        session: provenance of this process.
        resume: continue the table that is there, if any.
        overwrite: replace the table that is there, if any, once the first row is complete.
        key: the columns that tell one row from another.

    Raises:
        ValueError: both flags; a file in the way without a flag; a file that is no such table, or one of other columns
            or another identity, naming what differs.
    """
    identity = json.loads(json.dumps(identity))
    path = None if path is None else Path(path)
    if path is None or not continues(path, resume=resume, overwrite=overwrite):
        return Results(path=path, identity=identity, sessions=[session], key=key)
    content = read_results(path, key)
    old = content["identity"]
    for name in sorted((identity.keys() & old.keys()) - {"texts"}):
        check_same(path, name, old[name], identity[name])
    for text in old["texts"].keys() & identity["texts"].keys():
        check_same(path, f"text {text}", old["texts"][text], identity["texts"][text])
    identity = old | identity | {"texts": old["texts"] | identity["texts"]}
    sessions = [*content["sessions"], session]
    return Results(path=path, identity=identity, sessions=sessions, rows=content["rows"], key=key)


def read_results(path: str | Path, key: tuple[str, ...] = PERPLEXITY_KEY) -> dict[str, Any]:
    """The content of a table's file, whose rows have the columns of ``key``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no results '{path}'")
    content = read_json(path)
    if not isinstance(content, dict) or not content.keys() >= {"identity", "sessions", "rows"}:
        raise ValueError(f"'{path}' holds no table of results")
    for column in key:
        if any(column not in row for row in content["rows"]):
            raise ValueError(f"'{path}' holds another table: its rows have no '{column}'")
    return content


def best_settings(rows: list[Row], method: str, bits: int) -> tuple[dict[str, Any] | None, int]:
    """The settings of a method, at a width, with the lowest mean perplexity over seeds, and how many were tried.

    Args:
        rows: of one text, on which settings may be chosen.
        method: name of the baseline.
        bits: its width, for calibration and use.

    Returns:
        ``(settings, number tried)``; ``(None, 0)`` where the method has no rows at the width.

    Raises:
        ValueError: the rows are of several texts.
    """
    mine = [row for row in rows if (row["method"], row["bits"], row["calibrated_bits"]) == (method, bits, bits)]
    if len(texts := {row["text"] for row in mine}) > 1:
        raise ValueError(f"settings are chosen on one text, not on {', '.join(sorted(texts))}")
    tried: dict[str, list[float]] = defaultdict(list)
    for row in mine:
        tried[json.dumps(row["settings"])].append(math.inf if row["perplexity"] is None else row["perplexity"])
    if not tried:
        return None, 0
    return json.loads(min(tried, key=lambda settings: sum(tried[settings]) / len(tried[settings]))), len(tried)
