"""Files that appear whole; records of measurements in one."""

import json

import pytest

from mobiquant_jax.files import RecordFile, continues, whole_file


@pytest.fixture
def records(tmp_path):
    return RecordFile(path=tmp_path / "made" / "records.json", name="runs", key=("model", "mesh"))


def test_a_record_replaces_the_one_with_its_key(records):
    assert records.read() == []
    first, second = {"model": "a", "mesh": [1, 2], "x": 1}, {"model": "a", "mesh": [2, 1], "x": 2}
    for record in (first, second, first | {"x": 3}):
        records.save(record)
    assert records.read() == [first | {"x": 3}, second]
    assert json.loads(records.path.read_text()).keys() == {"runs"}


@pytest.mark.parametrize(
    "content", ["[]", '{"runs": 1}', '{"other": []}', '{"runs": [{"model": "a"}]}', '{"runs": [3]}']
)
def test_a_file_that_holds_something_else_is_kept(records, content):
    records.path.parent.mkdir()
    records.path.write_text(content)
    with pytest.raises(ValueError, match="records.json' holds no list 'runs' of records"):
        records.save({"model": "a", "mesh": 1})
    assert records.path.read_text() == content


@pytest.mark.parametrize("name", ["made/table.md", "made/figure.png", "made/README"])
def test_a_file_is_replaced_whole_or_kept(tmp_path, name):
    path = tmp_path / name
    with whole_file(path) as unfinished:
        assert unfinished.suffix == path.suffix or not path.suffix
        unfinished.write_text("first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_file(path) as unfinished:
        unfinished.write_text("half of the sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "reason"), [("", "is a folder"), ("table.md/more/rows.json", "table.md' is no folder")]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_path_that_no_file_can_have_is_found_before_anything_is_measured(tmp_path, name, reason, overwrite):
    (tmp_path / "table.md").write_text("kept")
    with pytest.raises(ValueError, match=reason):
        continues(tmp_path / name, resume=False, overwrite=overwrite)
    assert not continues(tmp_path / "new" / "rows.json", resume=False, overwrite=overwrite)
