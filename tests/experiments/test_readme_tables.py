"""README's tables are what results/ holds."""

import pytest

from mobiquant_jax.markdown import fill


@pytest.fixture
def result():
    return {
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
            {"bits": None, "measured_bits": 16.0, "perplexity": 20.0, "tokens": 9},
        ],
    }


def test_a_table_is_made_from_its_results(result):
    text = "before\n<!-- results/demo.json -->\nold\nlines\n<!-- end -->\nafter\n"
    filled = fill(text, {"results/demo.json": result})
    assert filled.startswith("before\n<!-- results/demo.json -->\n| average bits |")
    assert filled.endswith("<!-- end -->\nafter\n") and "old" not in filled
    assert "| 2 | 2.00 | 30.00 | +50.0 % |" in filled and "| unquantized | - | 20.00 | |" in filled
    assert "`python x.py --a` at 0123456: 12 s, 4.6 GB of host memory; cpu, 2 cores; Python 3.11.7" in filled
    assert fill(filled, {"results/demo.json": result}) == filled


def test_readme_agrees_with_the_results(call_script):
    found = call_script("readme_tables", "--check")
    assert (found.returncode or 0, found.stderr) == (0, "")
