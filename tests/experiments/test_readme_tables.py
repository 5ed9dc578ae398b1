"""README's tables are what results/ holds."""

import json

import pytest

RESULT = {
    "provenance": {
        "command": "python x.py --a",
        "commit": "0123456789abcdef",
        "python": "3.11.7",
        "versions": {"jax": "1", "flax": "2"},
        "devices": ["cpu"],
        "cores": 2,
    },
    "seconds": 12.3,
    "peak_gb": 4.56,
    "curve": [
        {"bits": 2.0, "measured_bits": 2.004, "perplexity": 30.0, "tokens": 9},
        {"bits": 3.0, "measured_bits": 3.0, "perplexity": None, "tokens": 9},
        {"bits": None, "measured_bits": 16.0, "perplexity": 20.0, "tokens": 9},
    ],
}
TASK = {"method": "x", "bits": 2, "accuracy": 1, "accuracy_norm": 1}
FILLED = """before
<!-- results/demo.json -->
| average bits | measured | perplexity | against unquantized |
|---|---|---|---|
| 2 | 2.00 | 30.00 | +50.0 % |
| 3 | 3.00 | not finite | |
| unquantized | - | 20.00 | |

`python x.py --a` at 0123456: 12 s, 4.6 GB of host memory; cpu, 2 cores; Python 3.11.7, jax 1, flax 2.
<!-- end -->
after
"""


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "demo.json").write_text(json.dumps(RESULT))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results/demo.json -->\nold\nlines\n<!-- end -->\nafter\n")
    return path


def test_tables_are_made_from_their_results(call_script, readme):
    stale = call_script("readme_tables", f"--readme={readme}", "--check")
    assert stale.returncode == 2 and "differs from its results" in stale.stderr and "old" in readme.read_text()
    for _ in range(2):  # the second time nothing changes
        assert call_script("readme_tables", f"--readme={readme}").stderr == ""
        assert readme.read_text() == FILLED
    assert call_script("readme_tables", f"--readme={readme}", "--check").stderr == ""


def test_a_table_of_perplexities_is_drawn_where_its_picture_is_shown(call_script, readme):
    session = RESULT["provenance"]
    row = dict(method="x", bits=2, calibrated_bits=2, measured_bits=2, seed=None, settings_tried=None, seconds=0)
    rows = [row | dict(text="t", perplexity=20.0)]
    (readme.parent / "results" / "demo.json").write_text(json.dumps({"sessions": [session], "rows": rows}))
    stale = call_script("readme_tables", f"--readme={readme}", "--check")
    assert stale.returncode == 2 and not (readme.parent / "results" / "demo.png").exists()
    assert call_script("readme_tables", f"--readme={readme}").stderr == ""
    assert not (readme.parent / "results" / "demo.png").exists()
    readme.write_text("![curve](results/demo.png)" + readme.read_text())
    assert call_script("readme_tables", f"--readme={readme}").stderr == ""
    assert (readme.parent / "results" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "| 2 | 2.00 | x | 20 | - | - | - |" in readme.read_text()


def test_a_table_of_tasks(call_script, readme):
    row = dict(method="x", bits=2.5, seed=0, accuracy=0.5, accuracy_norm=None, task="local_piqa")
    content = {"sessions": [RESULT["provenance"]], "rows": [row]}
    (readme.parent / "results" / "demo.json").write_text(json.dumps(content))
    assert call_script("readme_tables", f"--readme={readme}").stderr == ""
    assert "| 2.5 | x | 50.0 | 50.0 | 1 |" in readme.read_text()


@pytest.mark.parametrize(
    "content",
    [
        '{"sessions": [], "rows": [{"method": "x"}]}',
        json.dumps({"sessions": [], "rows": [TASK | {"seed": 0, "task": "a"}, TASK | {"seed": 1, "task": "b"}]}),
        '{"sessions": []}',
        '{"curve": 3}',
    ],
)
def test_damaged_results_are_named(call_script, readme, content):
    (readme.parent / "results" / "demo.json").write_text(content)
    found = call_script("readme_tables", f"--readme={readme}")
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "old" in readme.read_text()
    assert f"'{readme.parent}/results/demo.json' is no" in found.stderr


def test_missing_results_are_named(call_script, readme):
    (readme.parent / "results" / "demo.json").unlink()
    found = call_script("readme_tables", f"--readme={readme}")
    assert found.stderr == f"error: no file '{readme.parent}/results/demo.json'\n" and "old" in readme.read_text()


def test_results_of_another_kind_are_named(call_script, readme):
    (readme.parent / "results" / "demo.json").write_text(json.dumps(RESULT | {"curve": None}).replace("curve", "rows"))
    found = call_script("readme_tables", f"--readme={readme}")
    wanted = f"error: '{readme.parent}/results/demo.json' is no result of a calibration: it lacks 'curve'\n"
    assert (found.returncode, found.stderr) == (2, wanted) and "old" in readme.read_text()


def test_readme_agrees_with_the_results(call_script):
    found = call_script("readme_tables", "--check")
    assert (found.returncode or 0, found.stderr) == (0, "")
