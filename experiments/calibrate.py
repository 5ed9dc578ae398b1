"""Calibrates a model into one elastic checkpoint and shows its perplexity at every average bit width.

python experiments/calibrate.py --config=configs/smollm2_135m.py
python experiments/calibrate.py --config=configs/smollm2_135m.py --resume
python experiments/calibrate.py --config=configs/smollm2_135m.py --config.quant.group_size=32 --overwrite
"""

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mobiquant_jax.calibration import CalibrationConfig, Calibrator, ConsoleObserver, RunDir, open_run
from mobiquant_jax.config_flags import define_config, flatten, run
from mobiquant_jax.data import load_token_ids, token_windows
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
from mobiquant_jax.io import load_dense
from mobiquant_jax.io.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from mobiquant_jax.io.dither import dither
from mobiquant_jax.io.tokenizer import Tokenizer
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.provenance import fingerprint, provenance
from mobiquant_jax.serving import SamplingConfig, generate

CONFIG = define_config()
RESUME = flags.DEFINE_boolean("resume", False, "continue the run in run_dir after its last finished block")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "delete the run in run_dir and start over")

_OUTCOME = ("evaluation.", "run_dir")  # fields that may change when a run is resumed
_SIZES = (  # fields of model.architecture that tell models apart
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
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
    calibration = CalibrationConfig(**{k: _frozen(v) for k, v in config.calibration.items()})
    calibration.check_slices(elastic.slice_bits)
    _check_evaluation(config.evaluation, elastic)
    dense = _load_model(config, elastic)
    windows, heldout = _load_windows(config, dense)
    asked = {k: v for k, v in flatten(config).items() if not k.startswith(_OUTCOME)}
    record = {
        "config": asked,
        "model": fingerprint(dense.variables),
        "data": fingerprint(windows),
        "provenance": provenance(),
    }
    run_dir = open_run(config.run_dir, record, resume=RESUME.value, overwrite=OVERWRITE.value)
    if is_checkpoint(run_dir.checkpoint):
        print(f"'{run_dir.checkpoint}' is complete already")
        model = load_checkpoint(run_dir.checkpoint)
    else:
        model = _calibrate(dense, elastic, calibration, windows, run_dir, record)
        print(f"calibrated in {time.perf_counter() - start:.0f} s")
    run_dir.remove_intermediate()
    print(f"measuring on {heldout.size} held-out tokens", flush=True)
    _show(model, dense, heldout, config, run_dir)
    print(f"checkpoint: {run_dir.checkpoint}    total {time.perf_counter() - start:.0f} s")


def _check_evaluation(section: ConfigDict, elastic: ElasticConfig) -> None:
    """Finds the mistakes that would otherwise show only when calibration is done."""
    if not section.bits:
        raise ValueError("evaluation.bits is empty: give the average bits to measure, such as 2,4,8")
    for bits in section.bits:
        if check_bits(bits) < elastic.slice_bits[0]:
            raise ValueError(f"evaluation.bits: {bits:g} is below the first slice's {elastic.slice_bits[0]} bits")
    if section.batch_size < 1:
        raise ValueError(f"evaluation.batch_size={section.batch_size} must be at least 1")


def _load_model(config: ConfigDict, elastic: ElasticConfig) -> ElasticModel:
    """The unquantized model: from its source, dithered if asked for, or random weights of the config's architecture."""
    if config.model.weights not in ("source", "random"):
        raise ValueError(f"model.weights={config.model.weights!r} is neither source nor random")
    architecture = LlamaConfig(**{k: _frozen(v) for k, v in config.model.architecture.items()})
    elastic.check_model(architecture)
    if config.model.weights == "random":
        tokens = jnp.zeros((1, 2), jnp.int32)
        params = jax.jit(Llama(architecture).init)(jax.random.key(0), tokens)["params"]
        return ElasticModel(config=architecture, variables={"params": params})
    found, params, tokenizer = load_dense(config.model.source)
    for name in _SIZES:
        if getattr(found, name) != getattr(architecture, name):
            raise ValueError(
                f"'{config.model.source}' is another model than model.architecture describes: "
                f"its {name} is {getattr(found, name)}, not {getattr(architecture, name)}"
            )
    elastic.check_model(found)
    if config.model.dither:
        params = dither(params, found)
    return ElasticModel(config=found, variables={"params": params}, tokenizer=tokenizer)


def _load_windows(config: ConfigDict, model: ElasticModel) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and held-out windows."""

    def windows(split: str, section: ConfigDict) -> np.ndarray:
        if section.window_length > model.config.max_position_embeddings:
            raise ValueError(
                f"window_length={section.window_length} ({split}) exceeds the model's context of "
                f"{model.config.max_position_embeddings} tokens"
            )
        ids = load_token_ids(config.data.source, split, model.tokenizer)
        found = token_windows(ids, section.window_length, section.windows, model.config.vocab_size)
        if len(found) < section.windows:
            raise ValueError(
                f"'{config.data.source}' ({split}) has {len(found)} windows of {section.window_length} tokens, "
                f"not {section.windows}"
            )
        return found

    return windows("calibration", config.calibration), windows("heldout", config.evaluation)


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
    try:
        variables = calibrator.calibrate(dense.variables["params"], windows)
    except KeyboardInterrupt:
        print(f"\n'{run_dir.path}' keeps the finished blocks: the same command with --resume continues", flush=True)
        raise
    model = dataclasses.replace(dense, elastic=elastic, variables=variables)
    save_checkpoint(run_dir.checkpoint, model, json.loads(json.dumps(record)))
    return model


def _show(model: ElasticModel, dense: ElasticModel, heldout: np.ndarray, config: ConfigDict, run_dir: RunDir) -> None:
    """The table and the curve and, where there is a tokenizer, what the model makes of a text."""
    batch_size = config.evaluation.batch_size
    reference = perplexity_curve(dense, heldout, [None], batch_size=batch_size)
    results = perplexity_curve(model, heldout, config.evaluation.bits, batch_size=batch_size) + reference
    print(format_table(results))
    write_json(run_dir.path / "curve.json", results)
    plot_curve(run_dir.path / "curve.png", results, f"{run_dir.path.name}: one checkpoint, any average bits")
    if model.tokenizer is not None:
        _show_text(model, model.tokenizer, run_dir)
    print()
    for picture in ("curve.json", "curve.png", "tokens.png"):
        if (run_dir.path / picture).is_file():
            print(run_dir.path / picture)


def _show_text(model: ElasticModel, tokenizer: Tokenizer, run_dir: RunDir) -> None:
    """The picture of a sentence and two short continuations."""
    assert model.elastic is not None
    token_bits = measure_token_bits(model, tokenizer, SENTENCE, 3.0)
    title = f"{run_dir.path.name}: bits each token used at 3 average bits"
    plot_token_bits(run_dir.path / "tokens.png", token_bits, title)
    print(f"\nbits by token at 3 average bits:\n{format_token_bits(token_bits)}")
    prompt = tokenizer.encode(PROMPT)
    for bits in (max(3.0, model.elastic.slice_bits[0]), 8.0):
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
        print(f"\nat {bits:g} bits: {PROMPT}{tokenizer.decode(new)}")


def _frozen(value: Any) -> Any:
    """Lists, and sections, of a ConfigDict as the tuples and dicts that frozen configs hold."""
    return tuple(value) if isinstance(value, list) else value.to_dict() if isinstance(value, ConfigDict) else value


if __name__ == "__main__":
    run(main)
