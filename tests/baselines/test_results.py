"""The table of baselines on disk: whole after every row, resumed, refused where it is another's."""

import json

import pytest

from mobiquant_jax.baselines import best_settings, open_results, read_results

IDENTITY = {"model": "m", "calibration": "c", "texts": {"valid": "v"}}


def row(method="qat", bits=2, seed=0, text="valid", perplexity=10.0, rate=1e-4, calibrated=None):
    return {
        "method": method,
        "bits": bits,
        "calibrated_bits": bits if calibrated is None else calibrated,
        "seed": seed,
        "settings": {"weight_lr": rate, "epochs": 20},
        "text": text,
        "perplexity": perplexity,
    }


def opened(path, session="first", identity=IDENTITY, resume=False, overwrite=False):
    return open_results(path, identity, {"command": session}, resume=resume, overwrite=overwrite)


def test_rows_survive_and_are_continued(tmp_path):
    path = tmp_path / "new" / "rows.json"
    results = opened(path)
    results.add(row(seed=0))
    assert [r["seed"] for r in read_results(path)["rows"]] == [0]
    results.add(row(seed=1))
    more = opened(path, "second", {**IDENTITY, "texts": {"test": "t"}}, resume=True)
    assert row(seed=1, perplexity=99.0) in more  # another value of the same row
    assert row(seed=2) not in more and row(seed=1, rate=2e-4) not in more and row(seed=1, text="test") not in more
    more.add(row(seed=2))
    content = json.loads(path.read_text())
    assert [r["session"] for r in content["rows"]] == [0, 0, 1]
    assert [s["command"] for s in content["sessions"]] == ["first", "second"]
    assert content["identity"]["texts"] == {"valid": "v", "test": "t"}
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


def test_a_table_is_neither_overwritten_nor_mixed_by_mistake(tmp_path):
    path = tmp_path / "rows.json"
    opened(path).add(row())
    before = path.read_text()
    with pytest.raises(ValueError, match="exists: --resume adds what is missing, --overwrite starts over"):
        opened(path)
    with pytest.raises(ValueError, match="was made with model='m', not 'other'"):
        opened(path, identity={**IDENTITY, "model": "other"}, resume=True)
    with pytest.raises(ValueError, match="was made with text valid='v', not 'w'"):
        opened(path, identity={**IDENTITY, "texts": {"valid": "w"}}, resume=True)
    with pytest.raises(ValueError, match="give one of --resume and --overwrite"):
        opened(path, resume=True, overwrite=True)
    replaced = opened(path, overwrite=True)
    assert path.read_text() == before  # until there is a first row
    replaced.add(row(seed=7))
    assert [r["seed"] for r in read_results(path)["rows"]] == [7]


def test_a_table_of_other_columns_has_its_own_key_and_is_not_mixed_with_this_one(tmp_path):
    path, key = tmp_path / "tasks.json", ("method", "task")
    results = open_results(path, IDENTITY, {}, resume=False, overwrite=False, key=key)
    results.add({"method": "qat", "task": "a", "accuracy": 0.5})
    more = open_results(path, IDENTITY, {}, resume=True, overwrite=False, key=key)
    assert {"method": "qat", "task": "a"} in more and {"method": "qat", "task": "b"} not in more
    with pytest.raises(ValueError, match="tasks.json' holds another table: its rows have no 'bits'"):
        opened(path, resume=True)


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[1]", "holds no table of results")])
def test_other_files_are_refused(tmp_path, content: str, message: str):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        opened(path, resume=True)
    path.write_text('{"identity": {}, "sessions": [], "rows": [{"method": "qat", "task": "arc"}]}')
    with pytest.raises(ValueError, match="holds another table: its rows have no 'bits'"):
        read_results(path)
    with pytest.raises(FileNotFoundError, match="no results"):
        read_results(tmp_path / "none.json")


def test_the_best_settings_have_the_lowest_mean_over_seeds():
    rows = [row(seed=seed, perplexity=p, rate=1e-4) for seed, p in ((0, 10.0), (1, 20.0))]
    rows += [row(seed=seed, perplexity=p, rate=2e-4) for seed, p in ((0, 14.0), (1, 14.0))]
    rows += [row(perplexity=None, rate=9e-4), row(bits=3, perplexity=1.0), row(bits=2, calibrated=3, perplexity=1.0)]
    assert best_settings(rows, "qat", 2) == ({"weight_lr": 2e-4, "epochs": 20}, 3)
    assert best_settings(rows, "awq", 2) == (None, 0)
    with pytest.raises(ValueError, match="chosen on one text, not on test, valid"):
        best_settings([*rows, row(text="test")], "qat", 2)
