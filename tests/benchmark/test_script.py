"""benchmark.py on a tiny model on the CPU: its rows, stopping, resuming, and mistakes before any work."""

import json
from pathlib import Path

import pytest

# ml_collections loads config files in a way that Python means to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = """
from mobiquant_jax.default_config import default_config

def get_config():
    config = default_config()
    config.model.weights = "random"
    config.model.architecture = dict(
        vocab_size=48, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, tie_word_embeddings=False,
    )
    config.router.hidden_size = 4
    return config
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "tiny.py").write_text(CONFIG)
    sizes = ["--context=8", "--steps=2", "--loops=1", "--batches=2", "--prefill=4"]
    return [f"--config={tmp_path}/tiny.py", f"--output={tmp_path}/figures.json", *sizes]


def test_all_rows_in_two_sessions(call_script, arguments: list[str], tmp_path: Path):
    path = tmp_path / "figures.json"
    first = call_script("benchmark", *arguments, "--only=kernels", "--seconds=1")
    assert (first.returncode, first.stdout) == (1, "")
    *_, last = first.stderr.splitlines()
    assert "of 1 s; --resume measures the 20 missing: kernels product=qkv depth=1, " in last
    assert set(json.loads(path.read_text())) == {"identity", "sessions", "weights"}

    second = call_script("benchmark", *arguments, "--resume")
    assert second.returncode == 0, second.stderr
    content = json.loads(path.read_text())
    assert content["weights"]["session"] == 0 and len(content["sessions"]) == 2
    assert content["weights"]["bits_per_weight"] == 8 + 32 / 128  # 16 bits each of scale and zero point a group
    for row in content["kernels"]:
        seconds, read = row["us"] / 1e6, row["MB"] * 1e6
        share = read / seconds / row["read_bandwidth_TBps"] / 1e12
        assert row["percent_of_read_bandwidth"] == pytest.approx(100 * share) and row["us"] > 0
    megabytes = {(row["product"], row["depth"]): row["MB"] for row in content["kernels"]}
    assert len(megabytes) == 20
    assert megabytes["o", 3] == pytest.approx(128 * 128 * (6 + 0.25) / 8e6)
    assert megabytes["qkv+o+gate_up+down", 1] == pytest.approx(128 * (256 + 128 + 256 + 128) * 2.25 / 8e6)
    decode = {row["bits"]: row for row in content["decode"]}
    assert [decode[bits]["measured_bits"] for bits in (2.0, 8.0, 16.0)] == [2.0, 8.0, 16.0]
    assert 2 < decode[4.0]["measured_bits"] < 8 and set(decode) == {2.0, 3.0, 4.0, 6.0, 8.0, 16.0}
    weights = 128 * (256 + 128 + 256 + 128)
    assert decode[8.0]["needed_GB"] - decode[2.0]["needed_GB"] == pytest.approx(weights * 6 / 8e9)
    for row in decode.values():
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms"]) and row["temp_MB"] > 0
    assert content["switch"]["programs"] == 1
    assert content["router_share"]["without_ms"] > 0
    (prefill,) = content["prefill"]
    assert prefill["ratio"] == pytest.approx(prefill["bf16_ms"] / prefill["mixed_ms"])
    assert "| qkv+o+gate_up+down | 4 |" in path.with_suffix(".md").read_text()

    third = call_script("benchmark", *arguments, "--resume")
    assert third.returncode == 0 and "kernels" not in third.stderr
    assert json.loads(path.read_text()) == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config.model.weights=source"], "give --config.model.weights=random"),
        (["--only=decode,speed"], "--only: 'speed' is none of kernels, decode, prefill, switch, routers, torch"),
        (["--seconds=0"], "--seconds=0 must be more than 0"),
        (["--batches=1,two"], "--batches=1,two is not a list of whole numbers"),
        (["--batches=0"], "batches must be numbers from 1, got (0,)"),
        (["--context=64"], "context 64 and 2 steps exceed the model's 64 positions"),
        (["--config.quant.slice_bits=(2,2,4)"], "slice bits (2, 2, 4) have no serving layout"),
        (["--config.model.architecture.hidden_size=100"], "cannot be drawn in the serving layout"),
        (["--resume", "--overwrite"], "give one of --resume and --overwrite"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(call_script, arguments, tmp_path: Path, options, message):
    result = call_script("benchmark", *arguments, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "figures.json").exists()
