"""The local multiple-choice tasks: their definitions, and their documents, JSON lines in a folder the user names."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

DEFINITIONS = Path(__file__).parent / "definitions"
LOCAL_TASKS = (
    "local_arc_challenge",
    "local_arc_easy",
    "local_hellaswag",
    "local_openbookqa",
    "local_piqa",
    "local_winogrande",
)


def load_documents(*, file: str, task_data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Reads the documents of one task, for ``custom_dataset`` of its definition.

    A line is either ``{"ctx": ..., "choices": [...], "label": ...}``, choices that end one context, or
    ``{"ctxs": [...], "target": ..., "choices": [...], "label": ...}``, contexts that the same target ends.

    Args:
        file: name of the file.
        task_data: the folder it lies in, from the ``metadata`` of the run.
        **_: the rest of that metadata.

    Returns:
        The split ``test``, held in memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no folder was named, or a line is not such a document; names file and line.
    """
    if task_data is None:
        raise ValueError(f"the task needs its data: give --task_data=FOLDER, a folder with {file}")
    path = Path(task_data).expanduser() / file
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}'")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} is empty")
    return {"test": datasets.Dataset.from_list([_document(line, f"{path}:{i}") for i, line in enumerate(lines, 1)])}


def check_documents(tasks: Sequence[str], folder: str | Path) -> dict[str, str]:
    """Reads the documents of local tasks, and says which they are.

    Args:
        tasks: names from `LOCAL_TASKS`.
        folder: holds their files.

    Returns:
        SHA-256 of each task's file.

    Raises:
        ValueError: an unknown task, or a broken file.
        FileNotFoundError: the folder lacks a task's file.
    """
    digests = {}
    for task in tasks:
        check_task(task)
        found = re.search(r"^  file: (\S+)$", (DEFINITIONS / f"{task}.yaml").read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None, "every local task names its file"
        load_documents(file=found[1], task_data=str(folder))
        digests[task] = hashlib.sha256((Path(folder).expanduser() / found[1]).read_bytes()).hexdigest()
    return digests


def check_task(task: str) -> None:
    """Raises ValueError unless a task is one of `LOCAL_TASKS`."""
    if task not in LOCAL_TASKS:
        raise ValueError(f"unknown task '{task}': the local tasks are {', '.join(LOCAL_TASKS)}")


def _document(line: str, place: str) -> dict[str, Any]:
    """The checked fields of one line."""
    try:
        document = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{place}: a JSON object is needed, not {type(document).__name__}")
    fields = ("ctxs", "target", "choices", "label") if "ctxs" in document else ("ctx", "choices", "label")
    for field in fields:
        if field not in document:
            raise ValueError(f"{place}: the field '{field}' is missing")
        value = document[field]
        if field in ("ctxs", "choices"):
            fits = isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) and text for text in value)
        else:
            fits = type(value) is (int if field == "label" else str)  # true is no label, though it is an int
        if not fits:
            raise ValueError(f"{place}: the field '{field}' is {value!r}")
    choices = document["ctxs" if "ctxs" in document else "choices"]
    if not 0 <= document["label"] < len(choices):
        raise ValueError(f"{place}: label {document['label']} is none of {len(choices)} choices")
    return {field: document[field] for field in fields}
