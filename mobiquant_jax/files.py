"""JSON and text files, written whole or not at all, and read with a word about what is wrong."""

import json
import os
from pathlib import Path
from typing import Any


def save_json(path: str | Path, content: Any, indent: int = 2) -> None:
    """Writes JSON through a file beside it, so that a reader, or a killed run, never sees half of it.

    Args:
        path: the file; missing folders are made.
        content: JSON-ready values.
        indent: spaces a level.
    """
    save_text(path, json.dumps(content, indent=indent) + "\n")


def save_text(path: str | Path, text: str) -> None:
    """Writes a text in the same way; see `save_json`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def continues(path: str | Path | None, *, resume: bool, overwrite: bool) -> bool:
    """Whether a table of results continues the file that is there, rather than start a new one.

    Args:
        path: the file; None for none.
        resume: continue what is there, if anything is.
        overwrite: replace it.

    Raises:
        ValueError: both flags, or a file in the way without a flag.
    """
    if resume and overwrite:
        raise ValueError("give one of --resume and --overwrite")
    if path is None or not Path(path).exists() or overwrite:
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
