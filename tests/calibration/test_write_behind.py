"""Writing behind: order, overlap, and where errors come out."""

import threading

import jax
import pytest

from mobiquant_jax.calibration.write_behind import WriteBehind


def refuse():
    raise OSError("disk full")


def test_a_write_runs_beside_the_caller_and_all_are_done_at_the_end():
    caller_went_on = threading.Event()
    done = []

    def first():
        assert caller_went_on.wait(timeout=20)
        done.append(1)

    with WriteBehind() as behind:
        behind.submit(first)
        assert not done
        caller_went_on.set()
        behind.submit(lambda: done.append(2))
        assert done[0] == 1  # a write does not begin before the one before it is done
    assert done == [1, 2]


def test_what_follows_a_write_runs_in_the_caller_once_all_is_written():
    seen = []
    with WriteBehind() as behind:
        behind.submit(lambda: seen.append("written"), lambda: seen.append(threading.current_thread()))
        behind.wait()
        assert seen == ["written", threading.current_thread()]
    with pytest.raises(OSError, match="disk full"), WriteBehind() as behind:
        behind.submit(refuse, lambda: seen.append("then"))
    assert "then" not in seen


def test_an_error_comes_out_at_the_next_write_or_at_the_end():
    with pytest.raises(OSError, match="disk full"), WriteBehind() as behind:
        behind.submit(refuse)
    with pytest.raises(RuntimeError, match="mine"), WriteBehind() as behind:
        behind.submit(refuse)
        with pytest.raises(OSError, match="disk full"):
            behind.wait()
        behind.wait()
        raise RuntimeError("mine")
    reached = []
    with pytest.raises(OSError, match="disk full"), WriteBehind() as behind:
        behind.submit(refuse)
        behind.submit(lambda: reached.append(1))
    assert not reached


def test_an_error_of_the_caller_is_not_replaced_and_loses_no_write():
    done = []
    with pytest.raises(RuntimeError, match="mine"), WriteBehind() as behind:
        behind.submit(lambda: done.append("written"), lambda: done.append("reported"))
        raise RuntimeError("mine")
    assert done == ["written", "reported"]
    with pytest.raises(RuntimeError, match="mine"), WriteBehind() as behind:
        behind.submit(refuse)
        raise RuntimeError("mine")


def test_several_processes_write_at_once(monkeypatch):
    """They meet inside of a write, so that none may be somewhere else."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    seen = []
    with WriteBehind() as behind:
        behind.submit(lambda: seen.append(threading.current_thread()), lambda: seen.append("reported"))
        assert seen == [threading.current_thread(), "reported"]
