"""The local tasks through lm-eval's evaluator, against choices that are scored one by one in float64."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from mobiquant_jax.evaluation.tasks.runner import LOCAL_TASKS, evaluate_tasks

BATCH = 4


@pytest.fixture
def expected(task_files, tokenizer, reference):
    """A function of (unquantized model, task, count): accuracy, per log-probability and per character."""

    def accuracies(model, task: str, count: int | None = None) -> tuple[float, float]:
        (file,) = task_files.glob(task.removeprefix("local_") + "*")
        plain, normed = [], []
        for line in file.read_text(encoding="utf-8").splitlines()[:count]:
            document = json.loads(line)
            contexts = document.get("ctxs") or [document["ctx"]] * len(document["choices"])
            endings = [document["target"]] * len(contexts) if "ctxs" in document else document["choices"]
            scores = []
            for context, ending in zip(contexts, endings, strict=True):
                whole = tokenizer.encode(f"{context} {ending}").tolist()
                scores.append(reference(model, whole, len(tokenizer.encode(context)))[0])
            plain.append(np.argmax(scores) == document["label"])
            normed.append(np.argmax(np.array(scores) / [len(e) for e in endings]) == document["label"])
        return float(np.mean(plain)), float(np.mean(normed))

    return accuracies


def test_accuracies_equal_choices_scored_one_by_one(rng, random_model, dense_step, task_files, expected):
    model = random_model(rng)
    results = evaluate_tasks(model, [None], task_files, batch_size=BATCH, step=dense_step)
    assert [result.task for result in results] == list(LOCAL_TASKS)
    for result in results:
        accuracy, accuracy_norm = expected(model, result.task)
        assert result.accuracy == pytest.approx(accuracy)
        has_norm = result.task != "local_winogrande"
        assert result.accuracy_norm == (pytest.approx(accuracy_norm) if has_norm else None)
        assert (result.bits, result.documents, result.measured_bits) == (None, 12, 32.0)


def test_every_width_is_scored_without_a_new_program(elastic_model, elastic_step, task_files):
    before = elastic_step._cache_size()
    seen: list = []
    tasks = ["local_piqa", "local_winogrande"]
    options = {"tasks": tasks, "limit": 5, "batch_size": BATCH, "step": elastic_step}
    results = evaluate_tasks(elastic_model, [2, 3.5, 8], task_files, progress=seen.append, **options)
    assert results == seen
    assert [(r.bits, r.task, r.documents) for r in results] == [(b, t, 5) for b in (2.0, 3.5, 8.0) for t in tasks]
    measured = [r.measured_bits for r in results if r.task == "local_piqa"]
    assert 2 <= measured[0] < measured[1] < measured[2] <= 8
    assert elastic_step._cache_size() <= before + 2  # the texts fill two buckets


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        ([2, 9], {}, "average bits must be between 2 and 8, got 9"),
        ([2], {"tasks": ["local_piqa", "piqa"]}, "unknown task 'piqa': the local tasks are local_arc_challenge, "),
        ([2], {"limit": 0}, "the limit must be at least 1 document, got 0"),
    ],
)
def test_mistakes_are_named_before_the_first_run(elastic_model, task_files, bits, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(elastic_model, bits, task_files, progress=pytest.fail, **options)


def test_a_missing_or_broken_file_is_named_before_the_first_run(elastic_model, task_files, tmp_path):
    for file in task_files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "piqa_valid.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="piqa_valid.jsonl:1: the field 'ctx' is missing"):
        evaluate_tasks(elastic_model, [2], tmp_path, progress=pytest.fail)
    (tmp_path / "piqa_valid.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="piqa_valid.jsonl"):
        evaluate_tasks(elastic_model, [2], tmp_path, progress=pytest.fail)
