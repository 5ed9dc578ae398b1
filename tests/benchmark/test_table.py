"""The file of figures: rows are there after each addition, and only the same model and device continue it."""

import json

import pytest

from mobiquant_jax.benchmark import open_table, read_table

IDENTITY = {"architecture": {"hidden_size": 64, "ends": (1, 2)}, "device": "chip"}


def reopen(path, identity=IDENTITY, session=None, resume=True, overwrite=False):
    return open_table(path, identity, session or {"command": "again"}, resume=resume, overwrite=overwrite)


def test_rows_are_saved_one_by_one_and_resumed(tmp_path):
    path = tmp_path / "folder" / "figures.json"
    first = reopen(path, session={"command": "first"}, resume=False)
    keys = [{"batch": batch, "bits": bits} for batch in (1, 4) for bits in (2.0, 16.0)]
    assert first.missing("decode", keys) == keys and first.missing("switch", [{}]) == [{}]
    assert not path.exists()
    first.add("decode", keys[2] | {"ms": 0.5}, alone=False)
    assert json.loads(path.read_text())["decode"] == [{"batch": 4, "bits": 2.0, "ms": 0.5, "session": 0}]
    first.add("switch", {"programs": 1}, alone=True)

    second = reopen(path)
    assert second.missing("decode", keys) == [keys[0], keys[1], keys[3]] and second.missing("switch", [{}]) == []
    second.add("decode", keys[0] | {"ms": 0.2}, alone=False)
    content = read_table(path)
    assert [row["session"] for row in content["decode"]] == [0, 1]
    assert [session["command"] for session in content["sessions"]] == ["first", "again"]
    assert content["switch"] == {"programs": 1, "session": 0}


def test_a_file_in_the_way_is_kept(tmp_path):
    path = tmp_path / "figures.json"
    reopen(path).add("switch", {"programs": 1}, alone=True)
    before = path.read_text()
    with pytest.raises(ValueError, match="exists: --resume adds what is missing, --overwrite starts over"):
        reopen(path, resume=False)
    with pytest.raises(ValueError, match="was made with device='chip', not 'other'"):
        reopen(path, IDENTITY | {"device": "other"})
    with pytest.raises(ValueError, match="give one of --resume and --overwrite"):
        reopen(path, overwrite=True)
    over = reopen(path, IDENTITY | {"device": "other"}, resume=False, overwrite=True)
    assert path.read_text() == before and over.missing("switch", [{}])
    over.add("switch", {"programs": 2}, alone=True)
    assert read_table(path)["identity"]["device"] == "other"


@pytest.mark.parametrize(("text", "message"), [("{}", "holds no figures"), ("[", "is not JSON"), ("[]", "no JSON obj")])
def test_another_file_is_refused(tmp_path, text, message):
    path = tmp_path / "figures.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        reopen(path)
