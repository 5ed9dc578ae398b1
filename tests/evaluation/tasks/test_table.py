"""The table of tasks: a line a method and width, seeds together, the best of a width first."""

import pytest

from mobiquant_jax.evaluation.tasks.table import tasks_table

SESSIONS = [
    {"commit": commit, "devices": ["X"], "versions": {"jax": "1.2"}}
    for commit in ("0123456789", "0123456789+dirty", None)
]


def row(method, bits, task, accuracy, norm=None, seed=None):
    return {"method": method, "bits": bits, "task": task, "accuracy": accuracy, "accuracy_norm": norm, "seed": seed}


def test_seeds_stand_together_and_choices_count_per_character():
    rows = [
        row("qat", 3, "local_piqa", 0.9, norm=0.6, seed=0),
        row("qat", 3, "local_winogrande", 0.5, seed=0),
        row("elastic", 3.0, "local_winogrande", 0.5, seed=0),
        row("elastic", 3.0, "local_winogrande", 0.6, seed=1),
        row("elastic", 3.0, "local_piqa", 0.1, norm=0.62, seed=0),
        row("elastic", 3.0, "local_piqa", 0.1, norm=0.64, seed=1),
        row("rtn", 2, "local_piqa", 0.5),
        row("rtn", 2, "local_winogrande", 0.5),
        row("unquantized", None, "local_piqa", 0.7),
        row("unquantized", None, "local_winogrande", 0.6),
    ]
    assert tasks_table({"rows": rows, "sessions": SESSIONS}).split("\n") == [
        "| bits | method | piqa | winogrande | mean | seeds |",
        "|---|---|---|---|---|---|",
        "| - | unquantized | 70.0 | 60.0 | 65.0 | - |",
        "| 2 | rtn | 50.0 | 50.0 | 50.0 | - |",
        "| 3 | elastic | 63.0 | 55.0 | 59.0 | 2 |",
        "| 3 | qat | 60.0 | 50.0 | 55.0 | 1 |",
        "",
        "Percent right, mean over seeds; at 0123456, 0123456+dirty, no commit: X; jax 1.2. The file has every command.",
    ]


def test_a_seed_that_lacks_a_task_is_named():
    rows = [
        row("qat", 3, "local_piqa", 0.9, seed=0),
        row("qat", 3, "other", 0.9, seed=0),
        row("qat", 3, "other", 0.9, seed=1),
    ]
    with pytest.raises(ValueError, match="no finished table: qat of seed 1 at 3 bits lacks local_piqa"):
        tasks_table({"rows": rows, "sessions": SESSIONS})
