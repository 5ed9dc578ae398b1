"""Text sources: the parts are disjoint and complete, and every mistake is named."""

import os
import subprocess
import sys
import time
import types
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from mobiquant_jax.data import load_text, load_token_ids, sources

ROOT = Path(__file__).parents[2]


def paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_pydoc_parts_share_no_paragraph():
    calibration, heldout = (paragraphs(load_text("pydoc", split)) for split in ("calibration", "heldout"))
    shared = {paragraph for paragraph in calibration & heldout if len(paragraph) > 60}
    assert not shared
    # The test means something: by topic alone the parts do overlap.
    names = sorted(topics)
    by_topic = [
        paragraphs("\n\n".join(topics[name] for name in part)) for part in (names[::4], set(names) - set(names[::4]))
    ]
    assert any(len(paragraph) > 60 for paragraph in by_topic[0] & by_topic[1])


def test_pydoc_is_complete_and_the_same_every_time():
    everything = paragraphs("\n\n".join(topics.values())) - {""}
    assert paragraphs(load_text("pydoc", "all")) == everything
    assert load_text("pydoc", "calibration") == load_text("pydoc", "calibration")
    # Enough for the demo: 24 windows of 256 tokens to calibrate on and 16 to score, of about 4 characters a token.
    assert len(load_text("pydoc", "calibration")) > 200_000
    assert len(load_text("pydoc", "heldout")) > 80_000


def test_one_file_is_split_by_position(tmp_path: Path):
    path = tmp_path / "text.txt"
    text = "".join(f"line {i} – ünïcode\n" for i in range(403))
    path.write_text(text, encoding="utf-8")
    calibration, heldout = (load_text(f"file:{path}", split) for split in ("calibration", "heldout"))
    assert calibration + heldout == text == load_text(f"file:{path}", "all")
    assert calibration.endswith("\n")
    assert len(heldout) / len(text) == pytest.approx(0.25, abs=0.01)
    path.write_text("one long line " * 100, encoding="utf-8")
    assert len(load_text(f"file:{path}", "heldout")) == 350


def test_two_files_are_one_part_each(tmp_path: Path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    source = f"file:{tmp_path}/a.txt,{tmp_path}/b.txt"
    assert [load_text(source, split) for split in sources.SPLITS] == ["first", "second", "first\n\nsecond"]


def test_a_comma_in_the_name_of_one_file(tmp_path: Path):
    (tmp_path / "a,b.txt").write_text("x\n" * 8)
    assert load_text(f"file:{tmp_path}/a,b.txt", "calibration") == "x\n" * 6


def test_mistakes_are_named(tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n\n ")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="text of 'file:.*empty.txt' is empty"):
        load_text(f"file:{tmp_path}/empty.txt", "calibration")
    with pytest.raises(ValueError, match="latin.txt' is not UTF-8: byte 3 is 0xe9"):
        load_text(f"file:{tmp_path}/latin.txt", "all")
    with pytest.raises(FileNotFoundError, match="no text file 'nowhere.txt'"):
        load_text("file:nowhere.txt", "heldout")
    with pytest.raises(ValueError, match="unknown text source 'wikitext3'.*pydoc, file:PATH, wikitext2, c4"):
        load_text("wikitext3", "heldout")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        load_text("pydoc", "test")


@pytest.mark.parametrize(
    ("source", "split", "dataset", "part"),
    [
        ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "train"),
        ("wikitext2", "heldout", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test"),
        ("c4", "calibration", ("allenai/c4", "en/c4-train.00000-of-01024.json.gz"), "train[:5000]"),
        ("c4", "heldout", ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz"), "train[:5000]"),
    ],
)
def test_hub_rows_are_joined_by_blank_lines(monkeypatch, source: str, split: str, dataset: tuple, part: str):
    calls = []

    def load_dataset(path, name=None, *, data_files=None, split):
        calls.append(((path, name or data_files), split))
        return {"text": ["one", "", "two"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_text(source, split) == "one\n\n\n\ntwo"
    assert calls == [(dataset, part)]


@pytest.mark.parametrize("source", ["wikitext2", "c4"])
def test_offline_a_hub_source_names_the_alternatives_within_seconds(tmp_path: Path, source: str):
    script = f"from mobiquant_jax.data import load_text\nload_text({source!r}, 'heldout')"
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - start < 30
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ConnectionError: ") and source in last and "file:PATH or pydoc" in last


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(character) for character in text], np.int32)


def test_token_ids_of_text_and_of_a_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abcd\n" * 4)
    ids = load_token_ids(f"file:{tmp_path}/a.txt", "heldout", Characters())
    np.testing.assert_array_equal(ids, [97, 98, 99, 100, 10])
    windows = np.random.default_rng().integers(0, 512, (8, 6))
    np.save(tmp_path / "ids.npy", windows)
    source = f"tokens:{tmp_path}/ids.npy"
    np.testing.assert_array_equal(load_token_ids(source, "calibration", None), windows[:6].ravel())
    np.testing.assert_array_equal(load_token_ids(source, "heldout", None), windows[6:].ravel())
    np.testing.assert_array_equal(load_token_ids(source, "all", None), windows.ravel())


def test_mistakes_in_token_sources_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no tokenizer for the text of 'pydoc': use tokens:PATH.npy"):
        load_token_ids("pydoc", "heldout", None)
    with pytest.raises(FileNotFoundError, match="no token file 'nowhere.npy'"):
        load_token_ids("tokens:nowhere.npy", "heldout", None)
    np.save(tmp_path / "floats.npy", np.ones(3))
    with pytest.raises(ValueError, match="holds 3 values of float64, not integer ids"):
        load_token_ids(f"tokens:{tmp_path}/floats.npy", "all", None)
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(ValueError, match="text.npy' is not a .npy array"):
        load_token_ids(f"tokens:{tmp_path}/text.npy", "all", None)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        load_token_ids(f"tokens:{tmp_path}/floats.npy", "test", None)
