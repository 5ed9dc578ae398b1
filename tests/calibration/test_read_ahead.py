"""The next one is read while this one is used, and no further ahead."""

import threading

import pytest

from mobiquant_jax.calibration.read_ahead import read_ahead


def test_the_next_is_read_in_the_background_and_only_the_next():
    begun = [threading.Event() for _ in range(4)]
    readers = set()

    def read(index):
        begun[index].set()
        readers.add(threading.get_ident())
        return 10 * index

    for index, value in enumerate(read_ahead(read, 4)):
        assert value == 10 * index
        if index < 3:
            assert begun[index + 1].wait(timeout=10)  # begun although nobody has asked for it
        assert not any(event.is_set() for event in begun[index + 2 :])
    assert len(readers) == 1 and threading.get_ident() not in readers


def test_an_error_comes_in_its_place():
    def read(index):
        if index == 2:
            raise OSError("unreadable")
        return index

    values = read_ahead(read, 5)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(OSError, match="unreadable"):
        next(values)
