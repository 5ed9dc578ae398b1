"""experiments/tasks.py: rows of elastic and dense models in one file, how it is continued, and mistakes before any."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from mobiquant_jax.evaluation import tasks as tasks_package
from mobiquant_jax.io import save_hf
from mobiquant_jax.io.checkpoint import save_checkpoint

# lm_eval is the optional extra `eval`, which the suite's own installation leaves out for its many dependencies. What
# the script itself does is tested without it, with a stand-in for the evaluator.
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
LIMIT = 5


@pytest.fixture
def dense(rng, random_model):
    """Two dense models of one architecture."""
    return [random_model(rng), random_model(rng)]


@pytest.fixture
def folder(elastic_model, dense, tmp_path):
    """An elastic checkpoint and two Hugging Face folders."""
    save_checkpoint(tmp_path / "elastic", elastic_model, {})
    for i, model in enumerate(dense):
        params = model.variables["params"]
        save_hf(tmp_path / f"dense-{i}", model.config, params, tokenizer=model.tokenizer)
    return tmp_path


@pytest.fixture
def score(call_script, folder, task_files):
    def call(*more, models=("elastic:0=elastic", "unquantized=dense-0", "qat@3:1=dense-1")):
        sources = [f"--model={model.replace('=', f'={folder}/')}" for model in models]
        fixed = [f"--task_data={task_files}", f"--limit={LIMIT}", "--batch_size=4", f"--json={folder}/rows.json"]
        return call_script("tasks", *sources, *fixed, *more)

    return call


@pytest.fixture
def scored(monkeypatch):
    """Calls of a stand-in for `evaluate_tasks`, which scores by task, bits and number of the call."""
    calls = []

    def evaluate_tasks(model, bits_list, folder, *, tasks, batch_size, limit, step, progress):
        (bits,) = bits_list
        precision = jax.config.jax_default_matmul_precision
        calls.append(SimpleNamespace(elastic=model.is_elastic, bits=bits, tasks=tasks, step=step, precision=precision))
        for task in tasks:
            norm = None if task == "local_winogrande" else 0.01 * len(calls)
            measured = 32.0 if bits is None else bits - 0.25
            facts = dict(task=task, bits=bits, measured_bits=measured, accuracy=0.5 + 0.01 * len(calls))
            progress(SimpleNamespace(accuracy_norm=norm, documents=limit, seconds=1.0, **facts))

    runner = ModuleType("runner")
    runner.evaluate_tasks, runner.TaskResult = evaluate_tasks, SimpleNamespace
    monkeypatch.setitem(sys.modules, "mobiquant_jax.evaluation.tasks.runner", runner)
    monkeypatch.setattr(tasks_package, "require_lm_eval", lambda: None)
    return calls


def test_every_model_is_scored_once_in_float32_at_its_bits_and_summed_up_over_seeds(score, scored, folder):
    models = ("elastic:0=elastic", "elastic:1=elastic", "unquantized=dense-0", "qat@3:1=dense-1")
    tasks = ["local_piqa", "local_winogrande"]
    first = score("--bits=2", f"--tasks={tasks[0]}", models=models[:1])
    assert first.returncode == 0, first.stderr
    result = score("--bits=2,5", f"--tasks={','.join(tasks)}", "--resume", models=models)
    assert result.returncode == 0, result.stderr
    assert [(call.elastic, call.bits, call.tasks) for call in scored] == [
        (True, 2.0, tasks[:1]),
        (True, 2.0, tasks[1:]),  # what the first run had not scored
        *((True, bits, tasks) for bits in (5.0, 2.0, 5.0)),
        (False, None, tasks),
        (False, None, tasks),
    ]
    assert {call.precision for call in scored} == {"highest"}
    steps = [call.step for call in scored[1:]]  # one for elastic models, one for dense ones
    assert all(step is steps[0] for step in steps[:4]) and steps[4] is steps[5] is not steps[0]
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    found = {(row["method"], row["seed"], row["bits"], row["task"]): row["measured_bits"] for row in rows}
    expected = {("elastic", seed, bits, task): bits - 0.25 for seed in (0, 1) for bits in (2.0, 5.0) for task in tasks}
    expected |= {("unquantized", None, None, task): 32.0 for task in tasks} | {("qat", 1, 3, task): 3 for task in tasks}
    assert found == expected and len(rows) == len(expected)
    # Calls 3 and 5 scored the two seeds at 5 bits: accuracy per character of piqa, accuracy of winogrande.
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("elastic   ") and " 5 " in line)
    assert line.split()[-2:] == ["2", f"{np.mean([0.03, 0.53, 0.05, 0.55]):.4f}"]


@needs_lm_eval
def test_rows_of_all_models_and_a_file_that_is_continued(elastic_model, dense, elastic_step, folder, task_files, score):
    from mobiquant_jax.evaluation.tasks.runner import evaluate_tasks

    first = score("--bits=2,5", "--tasks=local_piqa", models=("elastic:0=elastic", "unquantized=dense-0"))
    assert first.returncode == 0, first.stderr
    begun = json.loads((folder / "rows.json").read_text())["rows"]
    tasks = ["local_piqa", "local_winogrande"]
    result = score("--bits=2,5", f"--tasks={','.join([*tasks, tasks[0]])}", "--resume")
    assert result.returncode == 0, result.stderr
    content = json.loads((folder / "rows.json").read_text())
    rows = content["rows"]
    assert rows[: len(begun)] == begun and len(begun) == 3 and [row["session"] for row in rows[2:4]] == [0, 1]
    assert len(content["sessions"]) == 2 and content["identity"]["texts"].keys() == set(tasks)

    expected = {}
    options = {"tasks": tasks, "limit": LIMIT, "batch_size": 4}
    for found in evaluate_tasks(elastic_model, [2, 5], task_files, step=elastic_step, **options):
        expected["elastic", found.bits, 0, found.task] = (found.measured_bits, found.accuracy, found.accuracy_norm)
    for model, label, measured in ((dense[0], ("unquantized", None, None), 32.0), (dense[1], ("qat", 3, 1), 3.0)):
        for found in evaluate_tasks(model, [None], task_files, **options):
            expected[*label, found.task] = (measured, found.accuracy, found.accuracy_norm)
    values = {
        tuple(row[name] for name in ("method", "bits", "seed", "task")): (
            row["measured_bits"],
            row["accuracy"],
            row["accuracy_norm"],
        )
        for row in rows
    }
    assert values == expected and len(rows) == len(expected) == 8
    assert all(row["documents"] == LIMIT and row["seconds"] > 0 for row in rows)
    assert len({row["model"] for row in rows}) == 3

    # The summary: the mean of accuracy per character, or of accuracy where the task has none.
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("elastic   ") and " 5 " in line)
    scores = [expected["elastic", 5.0, 0, "local_piqa"][2], expected["elastic", 5.0, 0, "local_winogrande"][1]]
    assert float(line.split()[-1]) == pytest.approx(np.mean(scores), abs=1e-4)

    # All is there: nothing is scored, and the summary is shown again. Another model does not pass for this one.
    again = score("--bits=2,5", f"--tasks={','.join(tasks)}", "--resume")
    *notices, _, _, _, _, _ = lines = again.stdout.splitlines()
    assert again.returncode == 0 and lines[-5:] == result.stdout.splitlines()[-5:]
    assert len(notices) == 3 and all("all rows are there, the model was not read" in notice for notice in notices)
    swapped = score("--tasks=local_arc_easy", "--resume", models=("unquantized=dense-1",))
    assert swapped.returncode == 2 and "was made with the model of unquantized='" in swapped.stderr
    assert json.loads((folder / "rows.json").read_text())["rows"] == rows


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], [], "nothing to score: give --model=METHOD[@BITS][:SEED]=SOURCE"),
        (["foo"], [], "--model=foo is not METHOD[@BITS][:SEED]=SOURCE"),
        (["qat@2.5=dense-0"], [], "is not METHOD[@BITS][:SEED]=SOURCE"),
        (["qat@9=dense-0"], [], "a fixed-width grid has 2 to 8 bits, got 9"),
        (["elastic=elastic"], [], "an elastic checkpoint needs average bits, such as --bits=2,3,4"),
        (["elastic=elastic"], ["--bits=1"], "average bits must be between 2 and 8, got 1"),
        (["elastic@3=elastic"], ["--bits=3"], "an elastic checkpoint runs at --bits and takes no @3"),
        (["a=dense-0", "b=nowhere"], [], "no file or folder '"),
        (["a@3:0=dense-0", "a@4:0=dense-1", "a@3:0=dense-1"], [], "another model has its method, seed and bits"),
        (["a@3:0=dense-0", "a:0=elastic"], ["--bits=2"], "another model has its method, seed and bits"),
        (["a:0=elastic", "a@3:0=dense-0"], ["--bits=2"], "another model has its method, seed and bits"),
        (["a=dense-0"], ["--tasks="], "no tasks: give --tasks=NAME"),
        (["a=dense-0"], ["--tasks=local_piqa,piqa"], "unknown task 'piqa': the local tasks are local_arc_challenge"),
        (["a=dense-0"], ["--task_data=nowhere"], "no file 'nowhere/arc_challenge_test.jsonl'"),
        (["a=dense-0"], ["--limit=0"], "--limit"),
        (["a=dense-0"], ["--resume", "--overwrite"], "give one of --resume and --overwrite"),
    ],
)
def test_mistakes_are_one_line_before_the_first_model(score, folder, models, options: list[str], message: str):
    result = score(*options, models=models)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert not (folder / "rows.json").exists()


def test_files_in_the_way_and_models_without_a_tokenizer_are_named(score, folder, dense):
    (folder / "rows.json").write_text("precious")
    result = score(models=("a=dense-0",))
    assert result.returncode == 2 and "exists: --resume adds what is missing" in result.stderr
    assert (folder / "rows.json").read_text() == "precious"
    save_hf(folder / "mute", dense[0].config, dense[0].variables["params"])
    result = score(models=("a=mute",))
    assert result.returncode == 2 and result.stderr.endswith(
        "=" + str(folder / "mute") + ": the model has no tokenizer\n"
    )
