"""The folder of an analysis: it appears once it is complete, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NUMBERS = "numbers.json"  # by which a folder is known as an analysis


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Makes a folder under a temporary name and, if the block succeeds, gives it its own.

    Args:
        path: the folder.
        overwrite: replace the analysis that is there, if any, once the new one is complete.

    Yields:
        The folder to write into.

    Raises:
        ValueError: a file, a folder that holds something else, or an analysis in the way without ``overwrite``.
        OSError: the folder cannot be made; nothing is left behind.
    """
    target = Path(path).resolve()  # where a link leads, so that an analysis can lie on another disk
    if target.is_file():
        raise ValueError(f"'{path}' is a file, not a folder: choose another --output")
    if target.is_dir() and any(target.iterdir()):
        if not (target / NUMBERS).is_file():
            raise ValueError(f"'{path}' holds files but no analysis: choose another --output")
        if not overwrite:
            raise ValueError(f"'{path}' holds an analysis: --overwrite replaces it")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # one that was killed may have had the same process id
        partial.mkdir(parents=True)
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
