"""The Markdown of complete and of incomplete figures."""

import pytest

from mobiquant_jax.benchmark import markdown, summary

SESSION = {"command": "python b.py", "commit": "0123456789", "devices": ["chip"], "versions": {"jax": "1.2"}}


def decode(batch, bits, ms):
    figures = {"measured_bits": bits, "ms": ms, "tokens_per_s": 1e3 * batch / ms}
    return {"batch": batch, "bits": bits, **figures, "needed_GB": 2.0, "memory_GB": 3.0, "temp_MB": 4.0}


def test_speedups_are_of_the_same_batch_and_missing_ones_are_dashes():
    rows = [decode(4, 2.0, 4.0), decode(1, 2.0, 1.0), decode(1, 16.0, 5.0)]
    lines = markdown({"identity": {}, "sessions": [SESSION], "decode": rows}).splitlines()
    assert lines[0] == "`python b.py` at 0123456: chip; jax 1.2."
    assert [line for line in lines if line.startswith("| 1") or line.startswith("| 4")] == [
        "| 1 | 2 | 2.00 | 1.00 | 1000 | 5.00 | 2.00 | 3.00 | 4.0 |",
        "| 1 | 16 | 16.00 | 5.00 | 200 | 1.00 | 2.00 | 3.00 | 4.0 |",
        "| 4 | 2 | 2.00 | 4.00 | 1000 | - | 2.00 | 3.00 | 4.0 |",
    ]


def test_our_kernel_stands_beside_torchs():
    kernel = {"product": "o", "us": 7.0, "percent_of_read_bandwidth": 80.0, "read_bandwidth_TBps": 3.0}
    kernels = [kernel | {"depth": depth, "us": 7.0 + depth, "busy_us": None, "busy_percent": None} for depth in (1, 2)]
    torch = [{"product": "o", "bf16_us": 20.0, "int4_us": 11.0}, {"product": "qkv", "bf16_us": 30.0, "int4_us": 12.0}]
    text = markdown({"identity": {}, "sessions": [SESSION, SESSION], "kernels": kernels, "torch": torch})
    assert text.count("python b.py") == 1
    assert "| o | 20.0 | 11.0 | 9.0 |\n| qkv | 30.0 | 12.0 | - |\n" in text
    assert "| o | 1 | 8.0 | 80 | - | - |" in text


def test_the_summary_has_speed_beside_bfloat16_and_a_layers_products():
    rows = [decode(1, 4.0, 2.0), decode(1, 2.0, 1.0), decode(1, 16.0, 5.0)]
    kernels = [{"product": name, "depth": 1, "us": 7.04, "percent_of_read_bandwidth": 81.2} for name in ("o", "o+down")]
    content = {"identity": {}, "sessions": [SESSION], "decode": rows, "kernels": kernels}
    assert summary(content).splitlines() == [
        "| batch | average bits | ms a step | tokens/s | times bf16 |",
        "|---|---|---|---|---|",
        "| 1 | 2 | 1.00 | 1000 | 5.00 |",
        "| 1 | 4 | 2.00 | 500 | 2.50 |",
        "| 1 | bf16 | 5.00 | 200 | 1.00 |",
        "",
        "| slices | us for a layer's products, batch 1 | % of read bandwidth |",
        "|---|---|---|",
        "| 1 | 7.0 | 81 |",
        "",
        "`python b.py` at 0123456: chip; jax 1.2.",
    ]
    with pytest.raises(ValueError, match="lacks kernels"):
        summary({key: value for key, value in content.items() if key != "kernels"})
