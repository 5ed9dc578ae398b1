"""The table of perplexities: a line a method and width, seeds together, the best of a width first."""

from mobiquant_jax.baselines import perplexity_table


def row(method, bits, text, perplexity, seed=None, calibrated=None, tried=None, seconds=0.0, used=None):
    return {
        "method": method,
        "bits": bits,
        "calibrated_bits": calibrated,
        "seed": seed,
        "measured_bits": used or bits,
        "text": text,
        "perplexity": perplexity,
        "settings_tried": tried,
        "seconds": seconds,
    }


def session(commit, device):
    return {"commit": commit, "devices": [device], "versions": {"jax": "1.2"}}


def test_seeds_stand_together_and_the_best_of_a_width_comes_first():
    rows = [
        row("rtn", 3, "a", 100.07, calibrated=3),
        row("rtn", 3, "b", 50.0, calibrated=3),
        *(
            row("qat", 3, text, value + seed, seed=seed, calibrated=3, tried=5, seconds=30.0 + seed)
            for seed in range(3)
            for text, value in (("a", 37.0), ("b", 90.0))
        ),
        row("omniquant", 3, "a", 20.0, seed=0, calibrated=4, tried=2, seconds=9.0),
        row("elastic", 3, "a", 30.0, seed=0, seconds=500.0),
        row("elastic", 3, "a", 32.0, seed=1, seconds=None, used=2.915),
        row("gptq", 2, "a", None, calibrated=2, tried=1, seconds=4.4),
        row("rtn", 2, "a", 736872.5, calibrated=2),
        row("later", 2, "b", 9.0, calibrated=2),  # not the best: it was not scored on the first text
        row("unquantized", None, "a", 28.7213),
    ]
    found = perplexity_table(
        {"rows": rows, "sessions": [session("0123456789", "X"), session("0123456789", "X"), session("fedcba98", "Y")]}
    )
    assert found.split("\n") == [
        "| bits | used | method | a | b | seeds | settings tried | seconds |",
        "|---|---|---|---|---|---|---|---|",
        "| - | - | unquantized | 28.72 | not measured | - | - | - |",
        "| 2 | 2.00 | rtn | 7.369e+05 | not measured | - | - | - |",
        "| 2 | 2.00 | gptq | not finite | not measured | - | 1 | 4 |",
        "| 2 | 2.00 | later | not measured | 9 | - | - | - |",
        "| 3 | 2.92 to 3.00 | elastic | 31 (30 to 32) | not measured | 2 | - | 500 |",
        "| 3 | 3.00 | qat | 38 (37 to 39) | 91 (90 to 92) | 3 | 5 | 31 |",
        "| 3 | 3.00 | rtn | 100.1 | 50 | - | - | - |",
        "| 3 | 3.00 | omniquant, made at 4 bits | 20 | not measured | 1 | 2 | 9 |",
        "",
        "Perplexities, mean (least to greatest); at 0123456, fedcba9: X, Y; jax 1.2. The file has every command.",
    ]
