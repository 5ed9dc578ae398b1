"""analyze.py on a small checkpoint, as a user runs it: its numbers, its page, and mistakes."""

import json
import re

import matplotlib.image
import numpy as np
import pytest

from mobiquant_jax.evaluation import perplexity_curve

LENGTH = 24
BITS = (5.0, 6.0)


@pytest.fixture
def arguments(model, checkpoint, tmp_path):
    """Two windows to measure and one to search on, by the source's split."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(90).integers(0, model.config.vocab_size, 8 * LENGTH))
    return [
        f"--checkpoint={checkpoint}",
        f"--data=tokens:{tmp_path}/ids.npy",
        f"--window_length={LENGTH}",
        f"--search_tokens={LENGTH}",
        "--bits=5,6",
        f"--output={tmp_path}/out",
    ]


def test_report_figures_and_numbers(call_script, model, arguments, tmp_path):
    done = call_script("analyze", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/out/report.html\n"
    assert re.search(r"^ +\d:\d\d  errors, retention and rivals: window 2/2$", done.stderr, re.MULTILINE)

    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text(), parse_constant=pytest.fail)
    assert numbers["windows"] == 2 and numbers["provenance"]["versions"]["jax"]
    assert numbers["calibration"] == {"origin": "drawn at random"}
    rows = {(row["name"], row["asked_bits"]): row for row in numbers["policies"]}
    names = ["router", "random", "norm", "static", "joint norm", "token oracle", "joint oracle"]
    assert sorted(rows) == sorted((name, bits) for name in names for bits in BITS)
    assert list(dict.fromkeys(row["name"] for row in numbers["policies"])) == names
    heldout = np.load(tmp_path / "ids.npy")[-2 * LENGTH :].reshape(2, LENGTH)
    curve = {result.bits: result for result in perplexity_curve(model, heldout, [*BITS, 8.0], batch_size=2)}
    for bits, plain in list(curve.items())[:-1]:
        router = rows["router", bits]
        assert router["perplexity"] == pytest.approx(plain.perplexity, rel=1e-4)
        assert router["measured_bits"] == pytest.approx(plain.measured_bits, rel=1e-5)
        used = np.array(numbers["router_bits"][f"{bits:g}"])
        sizes = np.array([rows_ * columns for rows_, columns in model.config.linear_shapes().values()], float)
        assert used.mean(axis=0) @ sizes / sizes.sum() == pytest.approx(plain.measured_bits, rel=1e-4)
        for name in names[2:]:  # within the bits that the router used, up to a token or a linear
            assert -0.3 < rows[name, bits]["measured_bits"] - router["measured_bits"] <= 0.2, name
        assert rows["random", bits]["excess_over_random"] == 0.0
    assert numbers["full_depth"]["perplexity"] == pytest.approx(curve[8.0].perplexity, rel=1e-5)
    assert np.shape(numbers["token_errors"]["overlap"]) == (2, 7, 1, 1)

    page = (tmp_path / "out" / "report.html").read_text()
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pictures) - 1 == 8  # the page itself shows the tokens
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count(' bits" style="background:#') == LENGTH
    for name in pictures:
        image = matplotlib.image.imread(tmp_path / "out" / name)[..., :3]
        assert image.shape[1] >= 1200 and np.ptp(image) > 0.5

    again = call_script("analyze", *arguments)
    assert again.stderr == f"error: '{tmp_path}/out' holds an analysis: --overwrite replaces it\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--output=", "--checkpoint=DIR and --output=DIR are required"),
        ("--checkpoint=nowhere", "'nowhere' is no elastic checkpoint: it has no mobiquant.json"),
        ("--bits=5,9", "bits '5,9': average bits must be between 2 and 8, got 9"),
        ("--bits=5,3", "3 average bits are below the 4 bits of the first slice"),
        ("--window_length=256", "--window_length=256 exceeds the model's context of 128 tokens"),
        ("--window_length=19", "windows of 19 tokens are too short: 20 are the least"),
        ("--data=pydoc", "the model has no tokenizer for the text of 'pydoc': use tokens:PATH.npy"),
        ("--windows=0", "flag --windows=0: 0 is not a positive integer"),
    ],
)
def test_mistakes_are_one_line(call_script, arguments, tmp_path, change, message):
    done = call_script("analyze", *arguments, change)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
