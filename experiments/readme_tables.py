"""Writes the tables of README.md from results/*.json, between its markers; --check only says whether they agree.

Where README shows results/NAME.png beside a table of perplexities, results/NAME.json, the picture is drawn, too.

python experiments/readme_tables.py
"""

import re
from pathlib import Path
from typing import Any

from absl import flags

from mobiquant_jax.analysis import policies_table
from mobiquant_jax.aot import render_table
from mobiquant_jax.baselines import perplexity_table, plot_perplexities
from mobiquant_jax.benchmark import summary
from mobiquant_jax.config_flags import run
from mobiquant_jax.evaluation import markdown_table
from mobiquant_jax.evaluation.tasks.table import tasks_table
from mobiquant_jax.files import read_json_object, save_text
from mobiquant_jax.io.conversion import conversions_table

README = flags.DEFINE_string("readme", "README.md", "the file, in the folder that the results are named from")
CHECK = flags.DEFINE_boolean("check", False, "change nothing; fail if a table is not what its results say")


def main(_: list[str]) -> None:
    """Replaces what stands between ``<!-- results/NAME.json -->`` and ``<!-- end -->``."""
    readme = Path(README.value)
    if not readme.is_file():
        raise FileNotFoundError(f"no file '{readme}'")
    old, pictures = readme.read_text(), {}

    def section(match: re.Match[str]) -> str:
        name = match.group(1)
        result = read_json_object(readme.parent / name)
        try:
            written = f"<!-- {name} -->\n{table(result)}\n<!-- end -->"
            picture = Path(name).with_suffix(".png")
            if _is_perplexities(result) and f"({picture})" in old:
                pictures[readme.parent / picture] = result["rows"]
            return written
        except ValueError as error:
            raise ValueError(f"'{readme.parent / name}' is {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"'{readme.parent / name}' is no result that there is a table for: {error!r}") from error

    new = re.sub(r"<!-- (results/\S+) -->\n.*?<!-- end -->", section, old, flags=re.DOTALL)
    if CHECK.value and new != old:
        raise ValueError(f"'{readme}' differs from its results: run python experiments/readme_tables.py")
    if new != old:
        save_text(readme, new)
    for path, rows in {} if CHECK.value else pictures.items():
        plot_perplexities(path, rows)


def table(result: dict[str, Any]) -> str:
    """Markdown of a result, by what it holds.

    Raises:
        ValueError: a result of no known kind.
    """
    if "kernels" in result:
        return summary(result)
    if "conversions" in result:
        return conversions_table(result["conversions"])
    if _is_perplexities(result):
        return perplexity_table(result)
    if "sessions" in result:
        return tasks_table(result)
    if "compiled" in result:
        return render_table(result["compiled"])
    return policies_table(result) if "policies" in result else markdown_table(result)


def _is_perplexities(result: dict[str, Any]) -> bool:
    return "sessions" in result and all("perplexity" in row for row in result.get("rows", [{}]))


if __name__ == "__main__":
    run(main)
