"""The figures in one JSON file, rewritten after each row: a run that is stopped loses nothing and is resumed.

identity   what all rows have in common: model, device, versions, settings
sessions   where the rows came from: command, commit, versions, peak memory; a row's ``session`` is an index
SECTION    a list of rows, or the only row of a section whose rows have no key
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobiquant_jax.files import check_same, continues, read_json_object, save_json

Row = dict[str, Any]


@dataclass(kw_only=True)
class Table:
    """Figures under construction.

    Attributes:
        path: their file, or None to keep them in memory.
        identity: what all rows have in common, JSON-ready.
        sessions: provenance of each process that added rows; the last is this one's.
        sections: rows by the name of their section.
    """

    path: Path | None
    identity: dict[str, Any]
    sessions: list[Row]
    sections: dict[str, Any] = field(default_factory=dict)

    def missing(self, section: str, keys: Iterable[Row]) -> list[Row]:
        """Those of ``keys`` (fields that tell a section's rows apart) that have no row."""
        rows = self.sections.get(section, [])
        rows = [rows] if isinstance(rows, dict) else rows
        return [key for key in keys if not any(row.items() >= key.items() for row in rows)]

    def add(self, section: str, row: Row, *, alone: bool) -> None:
        """Adds a row and rewrites the file.

        Args:
            section: where to.
            row: JSON-ready figures.
            alone: it is the only row of its section.
        """
        row = row | {"session": len(self.sessions) - 1}
        if alone:
            self.sections[section] = row
        else:
            self.sections.setdefault(section, []).append(row)
        if self.path is not None:
            save_json(self.path, self.content())

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {"identity": self.identity, "sessions": self.sessions, **self.sections}


def open_table(path: str | Path | None, identity: Row, session: Row, *, resume: bool, overwrite: bool) -> Table:
    """A new table, or one to be continued.

    Args:
        path: its file; None to keep the table in memory.
        identity: what all rows have in common.
        session: provenance of this process.
        resume: continue the table that is there, if any.
        overwrite: replace the table that is there, if any, once the first row is complete.

    Raises:
        ValueError: both flags; a file in the way without a flag; a file that is no such table, or one of another
            identity, naming what differs.
    """
    identity = json.loads(json.dumps(identity))
    path = None if path is None else Path(path)
    if path is None or not continues(path, resume=resume, overwrite=overwrite):
        return Table(path=path, identity=identity, sessions=[session])
    content = read_table(path)
    old, sessions = content.pop("identity"), content.pop("sessions")
    for name in sorted(identity.keys() | old.keys()):
        check_same(path, name, old.get(name), identity.get(name))
    return Table(path=path, identity=identity, sessions=[*sessions, session], sections=content)


def read_table(path: str | Path) -> dict[str, Any]:
    """The content of a table's file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    content = read_json_object(path)
    if not content.keys() >= {"identity", "sessions"}:
        raise ValueError(f"'{path}' holds no figures of benchmark.py")
    return content
