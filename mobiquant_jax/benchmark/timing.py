"""Time on the device, of something too short to be timed alone.

A matmul of a decoding step takes microseconds, its launch by the host as long, and XLA records its device graph again
whenever an output lies elsewhere: timed call by call, the host is measured. So the work is repeated inside one program,
in a loop whose length the compiler knows and which therefore never waits for the host: `looped_seconds`. It contains
what a model pays too, the gaps between kernels. `busy_seconds` leaves the gaps out: the profiler's record of when the
device ran anything. Not every platform has one, so it stands beside the first and never replaces it.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData


def call_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call until its results are there; two calls before that are not counted."""
    for _ in range(2):  # compiles; then records the device graph
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def looped(step: Callable[..., Any], loops: int) -> Callable[..., Any]:
    """A jitted program that runs a step many times over.

    Args:
        step: ``(zero, *operands) -> outputs``. Work that must happen in each pass has to depend on ``zero``, an int32
            scalar that is 0 without the compiler's knowing.
        loops: passes.

    Returns:
        ``(*operands) -> outputs`` of the last pass.
    """

    @jax.jit
    def program(*operands: Any) -> Any:
        unwritten = jax.eval_shape(step, jnp.int32(0), *operands)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), unwritten)
        return jax.lax.fori_loop(0, loops, lambda i, _: step(jnp.minimum(i, 0), *operands), start)

    return program


def busy_seconds(call: Callable[[], Any]) -> float | None:
    """Time for which the device ran anything at all during a warm call, or None where the profiler does not say."""
    jax.block_until_ready(call())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        records = [ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
    spans = [span for record in records for span in device_spans(record)]
    return union_length(spans) / 1e9 if spans else None


def device_spans(record: ProfileData) -> list[tuple[float, float]]:
    """Start and end, in ns, of everything that ran on a GPU's streams or as a TPU's operations.

    A device has other lines, such as whole programs, that hold the same time again.
    """
    return [
        (event.start_ns, event.end_ns)
        for plane in record.planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if line.name.startswith("Stream") or line.name == "XLA Ops"
        for event in line.events
    ]


def union_length(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what spans of (start, end) cover; kernels that overlap do not count twice."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return float(total)
