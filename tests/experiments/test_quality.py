"""quality.py: rows of finished runs beside those of the baselines."""

import json

import numpy as np
import pytest

from mobiquant_jax.evaluation import evaluate_perplexity
from mobiquant_jax.io.checkpoint import save_checkpoint

WINDOWS, LENGTH = 3, 24


@pytest.fixture(scope="module")
def model(random_elastic):
    return random_elastic(71, vocab_size=61, hidden_size=32, intermediate_size=32)


@pytest.fixture
def runs(model, tmp_path):
    """Two finished runs that differ in their seed, and the text to score."""
    np.save(tmp_path / "text.npy", np.random.default_rng(72).integers(0, 61, (WINDOWS, LENGTH)).astype(np.int32))
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        config = {"quant.group_size": 32, "calibration.dtype": "float32", "calibration.seed": seed, "run_dir": "x"}
        (folder / "run.json").write_text(json.dumps({"config": config, "model": "m", "data": "d"}))
        (folder / "result.json").write_text(json.dumps({"calibration_seconds": 1.5 + seed}))
        save_checkpoint(folder / "checkpoint", model, {})
    return tmp_path


@pytest.fixture
def score(call_script, runs):
    def call(*more, folders=("0", "1")):
        chosen = ",".join(str(runs / folder) for folder in folders)
        arguments = [f"--runs={chosen}", "--bits=2,5", f"--text=random=tokens:{runs}/text.npy"]
        arguments += [f"--window_length={LENGTH}", "--batch_size=2", f"--json={runs}/rows.json"]
        return call_script("quality", *arguments, *more)

    return call


def test_a_row_for_each_run_and_average_and_a_table_that_is_continued(model, runs, score):
    assert score(folders=("0",)).returncode == 0
    result = score("--resume", f"--png={runs}/rows.png")
    assert result.returncode == 0, result.stderr
    assert (runs / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert len(result.stdout.splitlines()) == 2  # the first run's rows are there already
    rows = json.loads((runs / "rows.json").read_text())["rows"]
    assert [(row["seed"], row["bits"], row["seconds"]) for row in rows] == [
        (0, 2.0, 1.5),
        (0, 5.0, 1.5),
        (1, 2.0, 2.5),
        (1, 5.0, 2.5),
    ]
    windows = np.load(runs / "text.npy")
    for row in rows:
        expected = evaluate_perplexity(model, windows, row["bits"], batch_size=2)
        assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert (row["measured_bits"], row["tokens"]) == (expected.measured_bits, WINDOWS * (LENGTH - 1))
        assert row["settings"] == {"quant.group_size": 32, "calibration.dtype": "float32"}
        assert (row["method"], row["text"]) == ("elastic", "random")


def test_a_picture_that_cannot_be_written_ends_it_before_anything_is_scored(runs, score):
    result = score(f"--png={runs}/missing/rows.png")
    assert (result.returncode, result.stderr) == (
        2,
        f"error: --png={runs}/missing/rows.png: no folder '{runs}/missing'\n",
    )
    result = score(f"--png={runs}")
    assert (result.returncode, result.stderr) == (2, f"error: --png={runs} is a folder\n")
    assert not (runs / "rows.json").exists()


def test_runs_that_are_not_finished_or_not_alike_are_named(runs, score):
    (runs / "1" / "run.json").write_text((runs / "1" / "run.json").read_text().replace('"data": "d"', '"data": "e"'))
    result = score()
    assert result.returncode == 2
    message = f"error: --runs: '{runs}/1' is of another model, other data or another group size than the first\n"
    assert result.stderr == message and not (runs / "rows.json").exists()
    for content in ("{}", '{"config": {}, "model": "m", "data": "d"}', '{"config": 1, "model": "m", "data": "d"}'):
        (runs / "1" / "run.json").write_text(content)
        assert score().stderr == f"error: --runs: '{runs}/1/run.json' is no record of calibrate.py\n"
    (runs / "1" / "result.json").unlink()
    result = score()
    assert result.stderr == f"error: --runs: '{runs}/1' holds no finished run (no result.json)\n"
