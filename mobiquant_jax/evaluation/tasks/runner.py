"""The local tasks at several average bits of one model, with one compilation a length of text."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval.api.registry import register_model
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from mobiquant_jax.evaluation.perplexity import check_bits
from mobiquant_jax.evaluation.tasks.documents import DEFINITIONS, LOCAL_TASKS, check_task
from mobiquant_jax.evaluation.tasks.language_model import NAME, MobiquantLM
from mobiquant_jax.evaluation.tasks.scoring import ContinuationStep, continuation_step
from mobiquant_jax.models.elastic import ElasticModel


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task at one width.

    Attributes:
        task: its name.
        bits: the average bits asked for; None for an unquantized model.
        measured_bits: the average bits the tokens really used.
        accuracy: part of the documents whose right choice has the highest log-probability.
        accuracy_norm: the same per character of the choice (lm-eval's ``acc_norm``); None where a task has none.
        documents: number of documents.
        seconds: wall time, compilation included.
    """

    task: str
    bits: float | None
    measured_bits: float
    accuracy: float
    accuracy_norm: float | None
    documents: int
    seconds: float


def register() -> None:
    """Makes ``MobiquantLM`` known to lm-eval, which finds no plug-ins by itself."""
    register_model(NAME)(MobiquantLM)


def evaluate_tasks(
    model: ElasticModel,
    bits_list: Iterable[float | None],
    folder: str | Path,
    *,
    tasks: Sequence[str] = LOCAL_TASKS,
    batch_size: int = 8,
    limit: int | None = None,
    step: ContinuationStep | None = None,
    progress: Callable[[TaskResult], None] | None = None,
) -> list[TaskResult]:
    """Scores local tasks, zero-shot, by lm-eval's evaluator.

    Args:
        model: with its tokenizer.
        bits_list: average bits, each in [2, 8]; [None] for an unquantized model. All are checked before the first run.
        folder: holds the tasks' JSON lines.
        tasks: names from `LOCAL_TASKS`.
        batch_size: rows a step.
        limit: most documents of a task; all if None.
        step: a step of `continuation_step` for a model like this one, to share its compilations.
        progress: called with each result as it is ready.

    Returns:
        The results, bits by bits.

    Raises:
        ValueError: an unknown task, bits out of range, a limit below 1, or a broken file.
        FileNotFoundError: the folder lacks a task's file.
    """
    for task in tasks:
        check_task(task)
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1 document, got {limit}")
    bits_list = [None if bits is None else check_bits(bits) for bits in bits_list]
    manager = TaskManager(include_path=str(DEFINITIONS), include_defaults=False, metadata={"task_data": str(folder)})
    loaded = {task: manager.load([task]) for task in tasks}
    step = step or continuation_step(model)
    results = []
    for bits in bits_list:
        for task in tasks:
            start = time.perf_counter()
            lm = MobiquantLM(model, bits=bits, batch_size=batch_size, step=step)
            outcome = evaluate(lm=lm, task_dict=loaded[task], limit=limit, bootstrap_iters=0, log_samples=False)
            assert outcome is not None and lm.measured_bits is not None, "a single process scores every document"
            metrics = outcome["results"][task]
            result = TaskResult(
                task=task,
                bits=bits,
                measured_bits=lm.measured_bits,
                accuracy=float(metrics["acc,none"]),
                accuracy_norm=float(metrics["acc_norm,none"]) if "acc_norm,none" in metrics else None,
                documents=outcome["n-samples"][task]["effective"],
                seconds=time.perf_counter() - start,
            )
            results.append(result)
            if progress is not None:
                progress(result)
    return results
