"""Writing what is done while what comes next is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import jax


class WriteBehind:
    """A context in which writes happen in the order given, in a background thread, never two at once.

    An error is raised at the next write or at the end; what was to be written next is not written then.

    Several processes that write together write at once instead: they wait for each other in a write, and would wait
    forever where another one computes first.
    """

    def __init__(self) -> None:
        """Nothing is pending."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write_behind")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "WriteBehind":
        """Begins to accept writes."""
        return self

    def submit(self, write: Callable[[], None]) -> None:
        """Begins a write once the one before is done, whose error is raised here."""
        self._wait()
        if jax.process_count() > 1:
            write()
        else:
            self._pending = self._thread.submit(write)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the last write; its error is raised unless there is one already."""
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
