"""Writing what is done while what comes next is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import jax


class WriteBehind:
    """A context in which writes happen in the order given, in a background thread, never two at once.

    An error is raised where the write is waited for: at `wait`, the next write or the end.

    Several processes that write together write at once instead: they wait for each other in a write, and would wait
    forever where another one computes first.
    """

    def __init__(self) -> None:
        """Nothing is pending."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write_behind")
        self._pending: tuple[Future[None], Callable[[], None]] | None = None

    def __enter__(self) -> "WriteBehind":
        """Begins to accept writes."""
        return self

    def submit(self, write: Callable[[], None], then: Callable[[], None] = lambda: None) -> None:
        """Begins a write once the one before is done.

        Args:
            write: runs in the thread.
            then: runs in the caller's, once it is known that all is written.
        """
        self.wait()
        if jax.process_count() > 1:
            write()
            then()
        else:
            self._pending = self._thread.submit(write), then

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the last write and what follows it; an error of theirs is raised unless there is one already."""
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise
        finally:
            self._thread.shutdown()

    def wait(self) -> None:
        """Waits for the last write, and raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            written, then = pending
            written.result()
            then()
