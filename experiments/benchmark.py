r"""Speed of the packed model on this device: kernels, decoding, prefill, switching bits, routers, memory.

python experiments/benchmark.py --config=configs/llama3_8b.py --config.model.weights=random \
    --output=results/benchmark_h100.json

Weights are random, of the config's shapes. Each row is saved as soon as it is measured, so a run may be stopped, by
--seconds or by force, and --resume adds what is missing. With torch installed, its bfloat16 and 4-bit products of the
same shapes stand beside ours.
"""

import json
import sys
from pathlib import Path

from absl import flags

from mobiquant_jax.benchmark import (
    PARTS,
    BenchmarkSettings,
    Clock,
    Models,
    OutOfTime,
    identity,
    markdown,
    measure,
    missing_rows,
    open_table,
    plan,
)
from mobiquant_jax.benchmark.table import Row
from mobiquant_jax.config_flags import define_config, run, whole_numbers
from mobiquant_jax.experiment import load_architecture, load_elastic
from mobiquant_jax.files import save_text
from mobiquant_jax.provenance import provenance
from mobiquant_jax.serving.random_weights import check_packable

CONFIG = define_config()
OUTPUT = flags.DEFINE_string("output", None, "JSON file of all figures; Markdown tables go beside it")
RESUME = flags.DEFINE_boolean("resume", False, "add the rows that the file lacks")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace the file")
ONLY = flags.DEFINE_list("only", list(PARTS), "what to measure")
SECONDS = flags.DEFINE_float("seconds", None, "stop before so many seconds and say what is missing; exit code 1")
CONTEXT = flags.DEFINE_integer("context", 1024, "tokens in the cache when decoding is timed")
STEPS = flags.DEFINE_integer("steps", 128, "decoding steps a timing")
LOOPS = flags.DEFINE_integer("loops", 100, "passes over all layers a timing of products")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "sequences decoded together")
PREFILL = flags.DEFINE_list("prefill", ["512", "2048"], "tokens of a prefill's products")


def main(_: list[str]) -> None:
    """Measures what is missing, printing and saving row by row."""
    clock = Clock(SECONDS.value)
    config = CONFIG.value
    if config.model.weights != "random":
        raise ValueError("the benchmark draws its weights: give --config.model.weights=random")
    if unknown := [part for part in ONLY.value if part not in PARTS]:
        raise ValueError(f"--only: {unknown[0]!r} is none of {', '.join(PARTS)}")
    if SECONDS.value is not None and SECONDS.value <= 0:
        raise ValueError(f"--seconds={SECONDS.value:g} must be more than 0")
    settings = BenchmarkSettings(
        context=CONTEXT.value,
        steps=STEPS.value,
        loops=LOOPS.value,
        batches=tuple(whole_numbers("batches", BATCHES.value)),
        prefill=tuple(whole_numbers("prefill", PREFILL.value)),
    )
    architecture, elastic = load_architecture(config), load_elastic(config)
    settings.check_model(architecture)
    check_packable(architecture, elastic)
    table = open_table(
        OUTPUT.value,
        identity(architecture, elastic, settings),
        provenance(),
        resume=RESUME.value,
        overwrite=OVERWRITE.value,
    )
    groups = plan(architecture, elastic, settings, ONLY.value)
    if "torch" in ONLY.value and not any(group.keys for group in groups if group.part == "torch"):
        print("no rows of torch: it is not installed, or without CUDA", file=sys.stderr)
    models = Models(config=architecture, elastic=elastic)
    try:
        measure(groups, table, models, clock, _show)
    except OutOfTime as stopped:
        missing = missing_rows(groups, table)
        print(f"{stopped}; --resume measures the {len(missing)} missing: {', '.join(missing)}", file=sys.stderr)
        sys.exit(1)
    finally:
        if OUTPUT.value and table.sections:
            save_text(Path(OUTPUT.value).with_suffix(".md"), markdown(table.content()))


def _show(section: str, row: Row) -> None:
    print(section, json.dumps(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
