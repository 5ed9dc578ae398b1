"""Calibrates a model into one elastic checkpoint and shows its perplexity at every average bit width.

python experiments/calibrate.py --config=configs/smollm2_135m.py
python experiments/calibrate.py --config=configs/smollm2_135m.py --resume
python experiments/calibrate.py --config=configs/smollm2_135m.py --config.quant.group_size=32 --overwrite
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mobiquant_jax.calibration import CalibrationConfig, Calibrator, ConsoleObserver, RunDir, open_run
from mobiquant_jax.config_flags import define_config, flatten, run
from mobiquant_jax.evaluation import (
    check_bits,
    format_table,
    format_token_bits,
    measure_token_bits,
    perplexity_curve,
    plot_curve,
    plot_token_bits,
    write_json,
)
from mobiquant_jax.experiment import frozen, load_architecture, load_dense_model, load_windows
from mobiquant_jax.io.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.provenance import fingerprint, provenance
from mobiquant_jax.serving import SamplingConfig, generate

CONFIG = define_config()
RESUME = flags.DEFINE_boolean("resume", False, "continue the run in run_dir after its last finished block")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "delete the run in run_dir and start over")

_OUTCOME = ("evaluation.", "run_dir")  # fields that may change when a run is resumed
SENTENCE = (
    "The capital of France is Paris, and a list comprehension such as [x**2 for x in range(10)] returns ten squares."
)
PROMPT = "A class definition in Python"


def main(_: list[str]) -> None:
    """Calibrates, saves, evaluates and draws."""
    start = time.perf_counter()
    config = CONFIG.value
    elastic = ElasticConfig(
        group_size=config.quant.group_size,
        slice_bits=tuple(config.quant.slice_bits),
        router_hidden_size=config.router.hidden_size,
        budget_grid=tuple(config.router.budget_grid),
    )
    calibration = CalibrationConfig(**{k: frozen(v) for k, v in config.calibration.items()})
    for bits in config.evaluation.bits:
        check_bits(bits)
    elastic.check_model(load_architecture(config))
    dense = load_dense_model(config)
    windows, heldout = (load_windows(config, dense, split) for split in ("calibration", "heldout"))
    asked = {k: v for k, v in flatten(config).items() if not k.startswith(_OUTCOME)}
    record = {
        "config": asked,
        "model": fingerprint(dense.variables),
        "data": fingerprint(windows),
        "provenance": provenance(),
    }
    run_dir = open_run(config.run_dir, record, resume=RESUME.value, overwrite=OVERWRITE.value)
    if is_checkpoint(run_dir.checkpoint):
        print(f"'{run_dir.checkpoint}' is complete; showing it")
        model = load_checkpoint(run_dir.checkpoint)
    else:
        model = _calibrate(dense, elastic, calibration, windows, run_dir, record)
    print(f"calibrated in {time.perf_counter() - start:.0f} s; measuring on {heldout.size} held-out tokens")
    _show(model, dense, heldout, config, run_dir)
    print(f"\ncheckpoint: {run_dir.checkpoint}    total {time.perf_counter() - start:.0f} s")


def _calibrate(
    dense: ElasticModel,
    elastic: ElasticConfig,
    calibration: CalibrationConfig,
    windows: np.ndarray,
    run_dir: RunDir,
    record: dict[str, Any],
) -> ElasticModel:
    calibrator = Calibrator(
        config=dense.config, elastic=elastic, calibration=calibration, run=run_dir, observer=ConsoleObserver()
    )
    variables = calibrator.calibrate(dense.variables["params"], windows)
    model = dataclasses.replace(dense, elastic=elastic, variables=variables)
    save_checkpoint(run_dir.checkpoint, model, json.loads(json.dumps(record)))
    run_dir.remove_intermediate()
    return model


def _show(model: ElasticModel, dense: ElasticModel, heldout: np.ndarray, config: ConfigDict, run_dir: RunDir) -> None:
    """The table, the curve, the picture of a sentence and two short continuations."""
    batch_size = config.evaluation.batch_size
    reference = perplexity_curve(dense, heldout, [None], batch_size=batch_size)
    results = perplexity_curve(model, heldout, config.evaluation.bits, batch_size=batch_size) + reference
    print(format_table(results))
    write_json(run_dir.path / "curve.json", results)
    name = Path(config.run_dir).name
    plot_curve(run_dir.path / "curve.png", results, f"{name}: one checkpoint, any average bits")
    if model.tokenizer is None:
        return
    token_bits = measure_token_bits(model, model.tokenizer, SENTENCE, 4.0)
    plot_token_bits(run_dir.path / "tokens.png", token_bits, f"{name}: bits each token used at 4 average bits")
    print(f"\nbits by token at 4 average bits:\n{format_token_bits(token_bits)}")
    prompt = model.tokenizer.encode(PROMPT)
    for bits in (3.0, 8.0):
        text = generate(
            model.decode,
            model.variables,
            model.config,
            prompt[None],
            np.array([len(prompt)]),
            max_new_tokens=32,
            key=jax.random.key(0),
            bits=bits,
            sampling=SamplingConfig(temperature=0.0),
        )
        new = np.asarray(text.tokens[0])[: int(text.lengths[0])]
        print(f"\nat {bits:g} bits: {PROMPT}{model.tokenizer.decode(new)}")
    for picture in ("curve.png", "tokens.png", "curve.json"):
        print(run_dir.path / picture)


if __name__ == "__main__":
    run(main)
