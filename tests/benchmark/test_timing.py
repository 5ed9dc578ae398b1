"""Loops on the device, and what counts as busy."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from mobiquant_jax.benchmark.timing import busy_seconds, call_seconds, device_spans, looped, union_length


def test_a_looped_step_runs_in_every_pass():
    seen = []

    def step(zero, x):
        jax.debug.callback(lambda value: seen.append(int(value)), zero)
        return {"y": x * 2 + zero}

    got = looped(step, 7)(jnp.arange(3))
    jax.effects_barrier()
    assert seen == [0] * 7
    np.testing.assert_array_equal(got["y"], [0, 2, 4])


def test_the_work_is_not_moved_out_of_the_loop(optimized):
    x = jnp.ones((64, 64))
    hlo = looped(lambda zero, x: x @ (x + zero), 3).lower(x).compile().as_text()
    assert "while" in hlo
    entry = hlo[hlo.index("ENTRY") :]
    assert "dot" not in entry and "dot" in hlo


def test_the_first_two_calls_do_not_count(monkeypatch):
    now, durations, calls = [0.0], iter([100.0, 50.0, 3.0, 9.0, 1.0]), []

    def call():
        now[0] += next(durations)
        calls.append(1)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert call_seconds(call, 3) == 3.0 and len(calls) == 5


def test_union_of_spans():
    rng = np.random.default_rng()
    starts = rng.integers(0, 60, 25)
    spans = [(int(start), int(start + length)) for start, length in zip(starts, rng.integers(0, 9, 25), strict=True)]
    assert union_length(spans) == len({at for start, end in spans for at in range(start, end)})
    assert union_length([]) == 0


PROFILE = """
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 9000000 } } }
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #7(Compute)" timestamp_ns: 100
    events { metadata_id: 1 offset_ps: 0 duration_ps: 30000 }
    events { metadata_id: 1 offset_ps: 50000 duration_ps: 8000 }
  }
  lines { name: "XLA Modules" timestamp_ns: 100 events { metadata_id: 1 duration_ps: 500000 } }
  lines { name: "Stream #9(MemcpyD2D)" timestamp_ns: 100 events { metadata_id: 1 offset_ps: 20000 duration_ps: 15000 } }
  event_metadata { key: 1 value { id: 1 name: "kernel" } }
}
"""


def test_only_what_the_device_ran_is_busy():
    record = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(PROFILE))
    spans = sorted(device_spans(record))
    assert spans == [(100, 130), (120, 135), (150, 158)]
    assert union_length(spans) == 35 + 8


def test_a_platform_without_a_record_says_so():
    assert busy_seconds(lambda: jnp.ones(3) + 1) is None
