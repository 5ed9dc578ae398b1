"""The command line: what is handed to lm-eval, and one line for each mistake; the whole way where lm-eval is there."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from mobiquant_jax.evaluation.tasks import require_lm_eval
from mobiquant_jax.evaluation.tasks.__main__ import lm_eval_arguments, main
from mobiquant_jax.evaluation.tasks.documents import DEFINITIONS
from mobiquant_jax.io.checkpoint import save_checkpoint

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


def test_the_definitions_are_included_and_the_folder_is_metadata(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    given = [
        "run",
        "--model",
        "mobiquant",
        "--include_path",
        "mine",
        f"--task_data={folder}",
        "--debug",
        "--limit",
        "2",
    ]
    expected = ["run", "--include_path", str(DEFINITIONS), "--model", "mobiquant", "--include_path", "mine"]
    expected += ["--limit", "2", "--metadata", json.dumps({"task_data": str(folder)})]
    assert lm_eval_arguments(given) == expected
    assert lm_eval_arguments(["ls", "tasks"]) == ["ls", "--include_path", str(DEFINITIONS), "tasks"]
    for untouched in ([], ["--help"], ["other", "--debugging"]):
        assert lm_eval_arguments(untouched) == untouched


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere' for --task_data"):
        lm_eval_arguments(["run", "--task_data", str(tmp_path / "nowhere")])
    for command in ("ls", "validate"):
        with pytest.raises(ValueError, match=f"--task_data belongs to the command 'run', not to '{command}'"):
            lm_eval_arguments([command, "--task_data", str(tmp_path)])


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mobiquant_jax\[eval\]'"):
        require_lm_eval()
    with pytest.raises(ValueError, match="the tasks need the package lm_eval"):
        main(["ls", "tasks"])


def test_a_mistake_is_one_line_and_a_failed_exit():
    command = [sys.executable, "-m", "mobiquant_jax.evaluation.tasks", "run", "--task_data", "nowhere"]
    path = os.pathsep.join(sys.path)
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    message = "no folder 'nowhere' for --task_data" if HAS_LM_EVAL else "the tasks need the package lm_eval"
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not HAS_LM_EVAL, reason="needs lm_eval")
def test_the_command_writes_what_the_evaluator_finds(elastic_model, elastic_step, task_files, tmp_path):
    from mobiquant_jax.evaluation.tasks import runner

    arguments = sys.argv
    save_checkpoint(tmp_path / "checkpoint", elastic_model, {})
    main(
        f"run --model mobiquant --model_args pretrained={tmp_path}/checkpoint,bits=2.5,max_length=64 --batch_size 4 "
        f"--tasks local_zero_shot --task_data {task_files} --output_path {tmp_path}/results --limit 3".split()
    )
    assert sys.argv is arguments
    (path,) = (tmp_path / "results").rglob("results_*.json")
    written = json.loads(path.read_text())
    found = runner.evaluate_tasks(elastic_model, [2.5], task_files, batch_size=4, limit=3, step=elastic_step)
    assert {r.task: r.accuracy for r in found} == {r.task: written["results"][r.task]["acc,none"] for r in found}
    mean = sum(result.accuracy for result in found) / len(found)
    assert written["results"]["local_zero_shot"]["acc,none"] == pytest.approx(mean)
    assert written["config"]["bits"] == 2.5
