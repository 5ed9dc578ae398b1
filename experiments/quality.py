r"""Scores finished calibration runs on texts, into the table that baselines.py fills: one file, one row a measurement.

for seed in 0 1 2; do
    python experiments/calibrate.py --config=configs/smollm2_135m_quality.py \
        --config.data.source=file:c4.txt,valid.txt --config.calibration.seed=$seed --config.run_dir=runs/quality/$seed
done
python experiments/quality.py --runs=runs/quality/0,runs/quality/1,runs/quality/2 --bits=2,2.5,3,4,5,6,8 \
    --text=wikitext2=file:test.txt --text=wikipedia:64=file:wikipedia.txt --json=results/quality.json

Where the file of --json exists, --resume adds the rows it lacks; it may be the table of the baselines.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mobiquant_jax.baselines import Results, open_results, plot_perplexities
from mobiquant_jax.compilation import prefer_library_matmuls
from mobiquant_jax.config_flags import run
from mobiquant_jax.evaluation import evaluate_perplexity, parse_bits, perplexity_step
from mobiquant_jax.experiment import load_texts
from mobiquant_jax.files import read_json_object
from mobiquant_jax.io.checkpoint import load_checkpoint
from mobiquant_jax.provenance import fingerprint, provenance

RUNS = flags.DEFINE_list("runs", [], "folders of finished runs of calibrate.py: one recipe, a seed each")
METHOD = flags.DEFINE_string("method", "elastic", "what the rows are called")
BITS = flags.DEFINE_string("bits", "2,2.5,3,4,5,6,8", "average bits, each in [2, 8]")
TEXTS = flags.DEFINE_multi_string("text", [], "NAME[:WINDOWS]=SOURCE to score; the option may be repeated")
WINDOW_LENGTH = flags.DEFINE_integer("window_length", 2048, "tokens a window")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "windows a step")
TRIED = flags.DEFINE_integer("settings_tried", None, "how many settings this recipe was chosen from")
JSON = flags.DEFINE_string("json", None, "file for the rows, rewritten after each")
PNG = flags.DEFINE_string("png", None, "file for a picture of the table's first text")
RESUME = flags.DEFINE_boolean("resume", False, "add the rows that the file lacks")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace the file")

_SETTINGS = ("calibration.", "quant.", "router.")  # sections of a run's config that tell recipes apart
_SEED = "calibration.seed"
_GROUP_SIZE = "quant.group_size"
_RECORDED, _NEEDED = {"config", "model", "data"}, {_SEED, _GROUP_SIZE}


def main(_: list[str]) -> None:
    """Scores each run at every average, on every text."""
    prefer_library_matmuls()
    bits_list = parse_bits(BITS.value)
    if BATCH_SIZE.value < 1:
        raise ValueError(f"--batch_size={BATCH_SIZE.value} must be at least 1")
    if PNG.value and not Path(PNG.value).parent.is_dir():
        raise FileNotFoundError(f"--png={PNG.value}: no folder '{Path(PNG.value).parent}'")
    if PNG.value and Path(PNG.value).is_dir():
        raise ValueError(f"--png={PNG.value} is a folder")
    records = _read_runs([Path(folder) for folder in RUNS.value])
    results: Results | None = None
    texts: dict[str, np.ndarray] = {}
    for folder, record in records.items():
        model = load_checkpoint(folder / "checkpoint")
        if results is None:
            texts = load_texts(TEXTS.value, WINDOW_LENGTH.value, model)
            identity = _identity(record) | {"texts": {name: fingerprint(text) for name, text in texts.items()}}
            results = open_results(JSON.value, identity, provenance(), resume=RESUME.value, overwrite=OVERWRITE.value)
        step = perplexity_step(model)
        for name, bits in ((name, bits) for name in texts for bits in bits_list):
            row = _facts(record) | {"bits": bits, "text": name}
            if row in results:
                continue
            scored = evaluate_perplexity(model, texts[name], bits, batch_size=BATCH_SIZE.value, step=step)
            row |= {
                "measured_bits": scored.measured_bits,
                "perplexity": scored.perplexity if np.isfinite(scored.perplexity) else None,
                "tokens": scored.tokens,
                "seconds": record["seconds"],
                "settings_tried": TRIED.value,
            }
            results.add(row)
            print(f"{METHOD.value} seed {row['seed']}  {bits:g} bits  {name} {scored.perplexity:.5g}", flush=True)
        jax.clear_caches()  # the next model is an argument of a program of its own
    if PNG.value and results is not None:
        plot_perplexities(PNG.value, results.rows)


def _read_runs(folders: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """What each run's folder says of it, and how long calibration took.

    Raises:
        FileNotFoundError: a folder holds no finished run.
        ValueError: no folders, or runs that do not belong into one table.
    """
    if not folders:
        raise ValueError("nothing to score: give --runs=FOLDER,...")
    records = {}
    for folder in folders:
        for name in ("run.json", "result.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"--runs: '{folder}' holds no finished run (no {name})")
        seconds = read_json_object(folder / "result.json").get("calibration_seconds")
        records[folder] = read_json_object(folder / "run.json") | {"seconds": seconds}
        config = records[folder].get("config")
        if not records[folder].keys() >= _RECORDED or not isinstance(config, dict) or not config.keys() >= _NEEDED:
            raise ValueError(f"--runs: '{folder / 'run.json'}' is no record of calibrate.py")
        if _identity(records[folder]) != _identity(records[folders[0]]):
            raise ValueError(f"--runs: '{folder}' is of another model, other data or another group size than the first")
    return records


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a table have in common."""
    return {
        "model": record["model"],
        "calibration": record["data"],
        "group_size": record["config"][_GROUP_SIZE],
    }


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """The columns that tell a run from others."""
    settings = {name: value for name, value in record["config"].items() if name.startswith(_SETTINGS)}
    seed = settings.pop(_SEED)
    return {"method": METHOD.value, "calibrated_bits": None, "seed": seed, "settings": settings}


if __name__ == "__main__":
    run(main)
