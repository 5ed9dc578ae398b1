"""The table of zero-shot accuracies for people: a line for each method and width, its seeds together."""

from typing import Any

from mobiquant_jax.markdown import table_lines, where_from

_Model = tuple[float | None, str]


def accuracy(row: dict[str, Any]) -> float:
    """A row's accuracy; per character of the choice where its task has that, as is usual for it."""
    found = row["accuracy"] if row["accuracy_norm"] is None else row["accuracy_norm"]
    return float(found)


def tasks_table(content: dict[str, Any]) -> str:
    """Markdown of results: percent right, mean over seeds, and the mean over the tasks.

    Args:
        content: of a file of results.

    Raises:
        ValueError: a model lacks a task that others have, naming both: means would be of unlike things.
    """
    tasks = sorted({row["task"] for row in content["rows"]})
    models: dict[_Model, dict[Any, dict[str, float]]] = {}
    for row in content["rows"]:
        seeds = models.setdefault((row["bits"], row["method"]), {})
        seeds.setdefault(row["seed"], {})[row["task"]] = accuracy(row)
    means = {model: _means(model, seeds, tasks) for model, seeds in models.items()}
    lines = []
    for (bits, method), found in sorted(means.items(), key=lambda item: (item[0][0] or 0, -sum(item[1]))):
        cells = [f"{100 * value:.1f}" for value in (*found, sum(found) / len(found))]
        count = len(models[bits, method].keys() - {None})
        lines.append(["-" if bits is None else f"{bits:g}", method, *cells, str(count or "-")])
    head = ["bits", "method", *(task.removeprefix("local_").replace("_", " ") for task in tasks), "mean", "seeds"]
    origin = f"Percent right, mean over seeds; {where_from(content['sessions'])}. The file has every command."
    return "\n".join([*table_lines(head, lines), "", origin])


def _means(model: _Model, seeds: dict[Any, dict[str, float]], tasks: list[str]) -> list[float]:
    """Mean over seeds of each task."""
    for seed, found in seeds.items():
        if missing := next((task for task in tasks if task not in found), None):
            bits, method = model
            raise ValueError(f"no finished table: {method} of seed {seed} at {bits} bits lacks {missing}")
    return [sum(found[task] for found in seeds.values()) / len(seeds) for task in tasks]
