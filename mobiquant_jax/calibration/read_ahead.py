"""Reading what is needed next while what is there is used."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(read: Callable[[int], T], count: int) -> Iterator[T]:
    """``read(0)``, ``read(1)``, ... in order, each begun in a background thread when the one before it is handed out.

    An error is raised where its value would have come.

    Args:
        read: reads one; called in one thread, never twice at once.
        count: how many.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_ahead") as thread:
        coming = thread.submit(read, 0)
        for index in range(count):
            current = coming.result()
            if index + 1 < count:
                coming = thread.submit(read, index + 1)
            yield current
