"""Writes the tables of README.md from results/*.json, between its markers; --check only says whether they agree.

python experiments/readme_tables.py
"""

import json
import re
from pathlib import Path

from absl import flags

from mobiquant_jax.config_flags import run
from mobiquant_jax.markdown import fill

CHECK = flags.DEFINE_boolean("check", False, "change nothing; fail if a table is not what its results say")

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def main(_: list[str]) -> None:
    """Replaces what stands between ``<!-- results/NAME.json -->`` and ``<!-- end -->``."""
    old = README.read_text()
    names = re.findall(r"<!-- (results/\S+) -->", old)
    new = fill(old, {name: json.loads((ROOT / name).read_text()) for name in names})
    if CHECK.value and new != old:
        raise ValueError("README.md differs from results/: run python experiments/readme_tables.py")
    if new != old:
        README.write_text(new)


if __name__ == "__main__":
    run(main)
