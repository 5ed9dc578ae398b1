"""What a run prints."""

import re

import pytest

from mobiquant_jax.calibration import BlockReport, ConsoleObserver
from mobiquant_jax.calibration.console import clock


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (187, "3:07"), (3599.5, "1:00:00"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_line_a_block(capsys):
    observer = ConsoleObserver()
    observer.on_start(3, resumed=1)
    report = BlockReport(before=0.5, after=0.25, bits=4.25, note="")
    observer.on_damaged("'runs/x/blocks/001' cannot be read: file 'd' is missing")
    observer.on_epoch(1, "nested", 1, 2, 0.3)
    observer.on_block(1, report, 1.25)
    observer.on_block(2, BlockReport(before=0.5, after=0.5, bits=4.0, note="non-finite loss"), 1.0)
    observer.on_tuned("end to end", 1, 3, 0.125, True, 60.0)
    observer.on_tuned("end to end", 2, 3, 0.125, False, 60.0)
    observer.on_fitted(1, 2, True, 3.25)
    observer.on_budget(8.0, 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(1) == "'runs/x/blocks/001' cannot be read: file 'd' is missing; it is computed again"
    assert lines[0] == "1 of 3 blocks are on disk already; continuing with block 2"
    assert re.fullmatch(r"block  2/3  error 0.5 -> 0.25  4.25 bits  1.2 s  \|  0:00 done, 0:00 left", lines[1])
    assert lines[2].startswith("block  3/3  error 0.5 -> 0.5")
    assert lines[3] == "  block 3: non-finite loss"
    assert lines[4] == "end to end 1/3  divergence 0.1250  60.0 s  |  2:00 left"
    assert (
        lines[5]
        == "end to end 2/3  divergence 0.1250  60.0 s  |  1:00 left  (steps that were not finite were left out)"
    )
    assert lines[6] == "routers 1/2  3.2 s  |  0:03 left"
    assert len(lines) == 7  # epochs and budgets are for a terminal


def test_a_terminal_sees_epochs_and_budgets(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    observer = ConsoleObserver()
    observer.on_start(2, resumed=0)
    observer.on_epoch(0, "joint", 1, 4, 0.125)
    observer.on_budget(3.0, 1)
    observer.on_budget(2.0, 0)
    erase = "\r\x1b[K"
    lines = ("block  1/2  joint 1/4  error 0.125", "recording thresholds: 3 bits", "recording thresholds: 2 bits")
    assert capsys.readouterr().out == "".join(f"{erase}{line}" for line in lines) + "\n"


def test_a_resume_with_nothing_left_to_train(capsys):
    ConsoleObserver().on_start(5, resumed=5)
    assert capsys.readouterr().out == "5 of 5 blocks are on disk already; none is left to train\n"


def test_the_share_of_the_peak_that_training_reached(capsys):
    observer = ConsoleObserver(peak_flops=4e12)
    observer.on_start(1, resumed=0)
    observer.on_block(0, BlockReport(before=0.5, after=0.25, bits=4.0, note="", flops=2e12), 2.0)
    assert "  2.0 s  MFU 25.0%  |  " in capsys.readouterr().out
