"""Files that are written whole or not at all; JSON, read with a word about what is wrong."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives the path of a file to write, which takes its place at the end: no reader or killed run sees half of it.

    Args:
        path: the file; missing folders are made. What is written has its suffix; after an error nothing is left of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_json(path: str | Path, content: Any, indent: int = 2) -> None:
    """Writes JSON; see `whole_file`.

    Args:
        path: the file; missing folders are made.
        content: JSON-ready values.
        indent: spaces a level.
    """
    save_text(path, json.dumps(content, indent=indent) + "\n")


def save_text(path: str | Path, text: str) -> None:
    """Writes a text; see `whole_file`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def continues(path: str | Path | None, *, resume: bool, overwrite: bool) -> bool:
    """Whether a table of results continues the file that is there, rather than start a new one.

    Args:
        path: the file; None for none.
        resume: continue what is there, if anything is.
        overwrite: replace it.

    Raises:
        ValueError: both flags, a path that no file can have, or a file in the way without a flag.
    """
    if resume and overwrite:
        raise ValueError("give one of --resume and --overwrite")
    if path is None:
        return False
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder, not a file")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():  # rather than when all has been measured
            raise ValueError(f"'{path}' cannot be written: '{folder}' is no folder")
    if not path.exists() or overwrite:
        return False
    if not resume:
        raise ValueError(f"'{path}' exists: --resume adds what is missing, --overwrite starts over")
    return True


def check_same(path: str | Path, name: str, before: Any, now: Any) -> None:
    """Raises ValueError where a table cannot be continued, since what all its rows have in common has changed."""
    if before != now:
        raise ValueError(f"'{path}' was made with {name}={before!r}, not {now!r}: --overwrite starts over")


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}'")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error


def read_json_object(path: str | Path) -> dict[str, Any]:
    """`read_json` of a file that must hold an object, or it is a ValueError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds no JSON object")
    return content


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """A JSON file ``{name: [record, ...]}`` of measurements, each of which replaces the one with the same key.

    Attributes:
        path: the file.
        name: what the records are called.
        key: fields that tell one record from another.
    """

    path: Path
    name: str
    key: Sequence[str]

    def read(self) -> list[dict[str, Any]]:
        """The records so far; none where there is no file.

        Raises:
            ValueError: the file holds something else.
        """
        if not self.path.is_file():
            return []
        content = read_json(self.path)
        records = content.get(self.name) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(r, dict) and r.keys() >= set(self.key) for r in records):
            raise ValueError(f"'{self.path}' holds no list '{self.name}' of records")
        return records

    def save(self, record: dict[str, Any]) -> None:
        """Puts a record in the place of the one it supersedes, or at the end."""

        def key(entry: dict[str, Any]) -> list[Any]:
            return [entry[name] for name in self.key]

        records = self.read()
        kept = [record if key(entry) == key(record) else entry for entry in records]
        save_json(self.path, {self.name: kept if record in kept else [*kept, record]})
