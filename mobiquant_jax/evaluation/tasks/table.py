"""The table of zero-shot accuracies for people: a line for each method and width, its seeds together."""

from typing import Any

from mobiquant_jax.evaluation.tasks.documents import LOCAL_TASKS
from mobiquant_jax.provenance import short_commit


def accuracy(row: dict[str, Any]) -> float:
    """A row's accuracy; per character of the choice where its task has that, as is usual for it."""
    found = row["accuracy"] if row["accuracy_norm"] is None else row["accuracy_norm"]
    return float(found)


def tasks_table(content: dict[str, Any]) -> str:
    """Markdown of results: percent right, mean over seeds, and the mean over the tasks.

    Args:
        content: of a file of results.
    """
    rows = content["rows"]
    tasks = [task for task in LOCAL_TASKS if any(row["task"] == task for row in rows)]
    models: dict[tuple[float | None, str], list[dict[str, Any]]] = {}
    for row in rows:
        models.setdefault((row["bits"], row["method"]), []).append(row)
    means = {
        model: [_mean([row for row in mine if row["task"] == task]) for task in tasks] for model, mine in models.items()
    }
    head = ["bits", "method", *(task.removeprefix("local_").replace("_", " ") for task in tasks), "mean", "seeds"]
    lines = [_line(head), f"|{'---|' * len(head)}"]
    for (bits, method), found in sorted(means.items(), key=lambda item: (item[0][0] or 0, -sum(item[1]))):
        seeds = {row["seed"] for row in models[bits, method]} - {None}
        cells = [f"{100 * value:.1f}" for value in (*found, sum(found) / len(found))]
        lines.append(_line(["-" if bits is None else f"{bits:g}", method, *cells, str(len(seeds) or "-")]))
    return "\n".join([*lines, "", _sources(content["sessions"])])


def _mean(rows: list[dict[str, Any]]) -> float:
    return sum(map(accuracy, rows)) / len(rows)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sources(sessions: list[dict[str, Any]]) -> str:
    commits = ", ".join(dict.fromkeys(short_commit(session["commit"]) for session in sessions))
    devices = ", ".join(dict.fromkeys(device for session in sessions for device in session["devices"]))
    return f"Percent right, mean over seeds; at {commits}: {devices}. The file has every command."
