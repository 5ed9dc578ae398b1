"""Writing files whole or not at all."""

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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
