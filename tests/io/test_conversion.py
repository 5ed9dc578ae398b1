"""What a conversion took, as figures and as a table."""

from mobiquant_jax.io.conversion import conversions_table, measured


def test_figures_follow_from_the_shapes(small_config):
    config = small_config(vocab_size=1000, num_hidden_layers=3, tie_word_embeddings=True)
    found = measured(config, 2, 1.26, 123)
    attention, mlp = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96
    assert found == {
        "layers": 3,
        "tensors": 2 + 3 * 9,
        "bytes": 2 * (1000 * 64 + 64 + 3 * (attention + mlp + 2 * 64)),
        "largest_tensor": 2 * 1000 * 64,
        "seconds": 1.3,
        "peak_host_bytes": 123,
        "bound": 4 * 1000 * 64 + 10**9,
    }


def test_the_table_says_each_origin_once():
    origin = {"commit": "0123456789", "devices": ["cpu"], "cores": 2, "versions": {"jax": "1.2"}}
    row = {"source": "GGUF", "dtype": "bfloat16", "layers": 2, "tensors": 3, "bytes": 16_060_000_000, "seconds": 95.5}
    row |= {"largest_tensor": 1_050_000_000, "peak_host_bytes": 2_420_000_000, "bound": 3_100_000_000}
    records = [row | {"provenance": origin}, row | {"source": "Hugging Face", "provenance": origin}]
    assert conversions_table(records).splitlines()[2:] == [
        "| GGUF | bfloat16 | 2 | 16.06 | 1.05 | 2.42 | 3.10 | 96 |",
        "| Hugging Face | bfloat16 | 2 | 16.06 | 1.05 | 2.42 | 3.10 | 96 |",
        "",
        "`experiments/convert.py` at 0123456: cpu, 2 cores; jax 1.2.",
    ]
