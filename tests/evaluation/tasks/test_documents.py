"""Documents of the local tasks: what is read, what is refused, and that every definition has its file."""

import json
import re
from pathlib import Path

import pytest

from mobiquant_jax.evaluation.tasks.documents import DEFINITIONS, LOCAL_TASKS, load_documents

ONE_CONTEXT = {"ctx": "a b", "choices": ["c", "d", "e"], "label": 2}
ONE_TARGET = {"ctxs": ["a b", "a c"], "target": "d.", "choices": ["b", "c"], "label": 1}
COUNTS = {
    "local_arc_challenge": 1172,
    "local_arc_easy": 2376,
    "local_hellaswag": 2000,
    "local_openbookqa": 500,
    "local_piqa": 1838,
    "local_winogrande": 1267,
}


def read(folder: Path, *documents) -> list[dict]:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in documents]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return list(load_documents(file="a.jsonl", task_data=str(folder), unrelated="metadata")["test"])


def test_both_kinds_of_document_are_read(tmp_path):
    # Fields beyond the named ones, which may differ from line to line, stay out.
    assert read(tmp_path, ONE_CONTEXT | {"id": 3}, ONE_CONTEXT | {"id": "x", "ctx": "é"}) == [
        ONE_CONTEXT,
        ONE_CONTEXT | {"ctx": "é"},
    ]
    assert read(tmp_path, ONE_TARGET | {"sentence": "a _ d."}) == [ONE_TARGET]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not valid JSON"),
        ("[1]", "a.jsonl:2: a JSON object is needed, not list"),
        ({"choices": ["c", "d"], "label": 0}, "a.jsonl:2: the field 'ctx' is missing"),
        ({"ctxs": ["a", "b"], "choices": ["c", "d"], "label": 0}, "a.jsonl:2: the field 'target' is missing"),
        (ONE_CONTEXT | {"ctx": None}, "a.jsonl:2: the field 'ctx' is None"),
        (ONE_CONTEXT | {"choices": ["c"]}, r"a.jsonl:2: the field 'choices' is \['c'\]"),
        (ONE_CONTEXT | {"choices": ["c", ""]}, r"a.jsonl:2: the field 'choices' is \['c', ''\]"),
        (ONE_CONTEXT | {"label": "2"}, "a.jsonl:2: the field 'label' is '2'"),
        (ONE_CONTEXT | {"label": True}, "a.jsonl:2: the field 'label' is True"),
        (ONE_CONTEXT | {"label": 3}, "a.jsonl:2: label 3 is none of 3 choices"),
        (ONE_CONTEXT | {"label": -1}, "a.jsonl:2: label -1 is none of 3 choices"),
        (ONE_TARGET | {"label": 2}, "a.jsonl:2: label 2 is none of 2 choices"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message: str):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, ONE_CONTEXT, line)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="give --task_data=FOLDER, a folder with a.jsonl"):
        load_documents(file="a.jsonl")
    with pytest.raises(FileNotFoundError, match="no file '.*a.jsonl'"):
        load_documents(file="a.jsonl", task_data=str(tmp_path))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="a.jsonl is empty"):
        load_documents(file="a.jsonl", task_data=str(tmp_path))


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_every_definition_finds_its_documents(shared_data, task: str):
    definition = (DEFINITIONS / f"{task}.yaml").read_text()
    assert f"task: {task}\n" in definition
    (file,) = re.findall(r"file: (\S+)", definition)
    documents = load_documents(file=file, task_data=str(shared_data / "tasks"))["test"]
    assert len(documents) == COUNTS[task]
    assert ("ctxs" in documents.column_names) == (task == "local_winogrande")
    assert len(set(documents["label"])) > 1


def test_the_group_lists_every_task():
    group = (DEFINITIONS / "local_zero_shot.yaml").read_text()
    assert tuple(re.findall(r"- (local_\w+)", group)) == LOCAL_TASKS
