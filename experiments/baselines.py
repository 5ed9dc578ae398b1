r"""Perplexity of the fixed-width baselines, each width its own quantized model, on the data of an elastic checkpoint.

python experiments/baselines.py --config=configs/smollm2_135m.py --config.model.dither=true \
    --config.data.source=file:c4.txt,test.txt \
    --config.calibration.windows=128 --config.calibration.window_length=2048 \
    --methods=rtn,gptq,awq,autoround,omniquant,qat --bits=2,3,4 --seeds=0,1,2 --elsewhere \
    --text=wikitext2=file:test.txt --text=wikipedia=file:wikipedia.txt \
    --set=qat.weight_lr=2e-4 --json=baselines.json

The calibration part of config.data.source is calibrated on; all of each --text is scored, in windows of
config.evaluation.window_length.
"""

import ast
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mobiquant_jax.baselines import Baseline, QuantizedModel, QuantSpec, find_method, run_omniquant_at
from mobiquant_jax.baselines.grid import check_bits
from mobiquant_jax.config_flags import define_config, run
from mobiquant_jax.data import load_token_ids, token_windows
from mobiquant_jax.evaluation import evaluate_perplexity, perplexity_step
from mobiquant_jax.io import load_dense
from mobiquant_jax.io.dither import dither
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.provenance import fingerprint, provenance

CONFIG = define_config()
METHODS = flags.DEFINE_list("methods", ["rtn", "gptq", "awq", "autoround", "omniquant", "qat"], "baselines to run")
BITS = flags.DEFINE_list("bits", ["2", "3", "4"], "widths, each 2 to 8")
SEEDS = flags.DEFINE_list("seeds", ["0"], "a run each, of the baselines that draw")
TEXTS = flags.DEFINE_multi_string("text", [], "NAME=SOURCE to score; the option may be repeated")
WINDOWS = flags.DEFINE_integer("windows", None, "most windows of each text; default: all")
SETTINGS = flags.DEFINE_multi_string(
    "set", [], "METHOD.FIELD=VALUE instead of the recipe's; the option may be repeated"
)
ELSEWHERE = flags.DEFINE_boolean("elsewhere", False, "also run OmniQuant's clipping at the widths it was not made for")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "type of the matmuls in training")
JSON = flags.DEFINE_string("json", None, "file for the rows and their provenance, rewritten after every model")

Settings = dict[str, dict[str, Any]]


def main(_: list[str]) -> None:
    """Quantizes and scores, a model at a time."""
    config = CONFIG.value
    widths, seeds = _integers("bits", BITS.value), _integers("seeds", SEEDS.value)
    for bits in widths:
        check_bits(bits)  # before anything is loaded
    changes = _changes(SETTINGS.value, METHODS.value)
    recipes = {(name, bits): _settings(name, bits, changes) for name in METHODS.value for bits in widths}
    dense = _load(config)
    section = config.calibration
    ids = load_token_ids(config.data.source, "calibration", dense.tokenizer)
    windows = token_windows(ids, section.window_length, section.windows, dense.config.vocab_size)
    if len(windows) < section.windows:
        raise ValueError(f"'{config.data.source}' has {len(windows)} windows, not {section.windows}")
    scorer = Scorer(dense, config, fingerprint(windows))
    for (name, bits), recipe in recipes.items():
        spec = QuantSpec(
            config=dense.config, bits=bits, group_size=config.quant.group_size, dtype=jnp.dtype(DTYPE.value)
        )
        baseline = Baseline.create(name, spec, recipe)
        for seed in seeds if find_method(name).seeded else [None]:
            start = time.perf_counter()
            model = baseline.quantize(dense.variables["params"], windows, seed or 0)
            jax.block_until_ready(model.params)
            facts = {
                "method": name,
                "seed": seed,
                "seconds": round(time.perf_counter() - start, 2),
                "settings": dataclasses.asdict(recipe),
            }
            scorer.score(model, facts | {"bits": bits, "calibrated_bits": bits, "block_errors": model.errors})
            if name == "omniquant" and ELSEWHERE.value:
                for other in (width for width in widths if width != bits):
                    there = dataclasses.replace(spec, bits=other)
                    moved = run_omniquant_at(there, dense.variables["params"], model)
                    scorer.score(moved, facts | {"bits": other, "calibrated_bits": bits})


class Scorer:
    """Scores models on all texts and collects the rows; the unquantized model comes first."""

    def __init__(self, dense: ElasticModel, config: ConfigDict, data: str) -> None:
        self._dense = dense
        self._step = perplexity_step(dense)  # one compilation: the models differ in their arrays only
        self._batch_size = config.evaluation.batch_size
        self._texts = {}
        for text in TEXTS.value:
            name, equals, source = text.partition("=")
            if not equals:
                raise ValueError(f"--text={text} is not NAME=SOURCE")
            ids = load_token_ids(source, "all", dense.tokenizer)
            self._texts[name] = token_windows(
                ids, config.evaluation.window_length, WINDOWS.value, dense.config.vocab_size
            )
        if not self._texts:
            raise ValueError("nothing to score: give --text=NAME=SOURCE")
        self._rows: list[dict[str, Any]] = []
        self._about = {
            "provenance": provenance(),
            "model": fingerprint(dense.variables),
            "calibration": data,
            "config": json.loads(config.to_json_best_effort()),
        }
        unquantized = QuantizedModel(params=jax.tree.map(jnp.asarray, dense.variables["params"]))
        self.score(unquantized, {"method": "unquantized", "bits": None, "seed": None, "seconds": 0.0, "settings": {}})

    def score(self, quantized: QuantizedModel, facts: dict[str, Any]) -> None:
        """Adds a row a text, prints it and rewrites the file."""
        model = dataclasses.replace(self._dense, variables={"params": quantized.params})
        for text, windows in self._texts.items():
            result = evaluate_perplexity(model, windows, None, batch_size=self._batch_size, step=self._step)
            finite = result.perplexity if np.isfinite(result.perplexity) else None
            self._rows.append({**facts, "text": text, "perplexity": finite, "tokens": result.tokens})
            made = facts.get("calibrated_bits")
            label = facts["method"] + (f" (made at {made})" if made != facts["bits"] else "")
            bits = "-" if facts["bits"] is None else facts["bits"]
            seed = "-" if facts["seed"] is None else facts["seed"]
            print(
                f"{label:24s} {bits} bits  seed {seed}  {text}: {result.perplexity:.4g}  {facts['seconds']:.1f} s",
                flush=True,
            )
        if JSON.value:
            _write(Path(JSON.value), {**self._about, "rows": self._rows})


def _load(config: ConfigDict) -> ElasticModel:
    """The unquantized model, dithered if asked for."""
    found, params, tokenizer = load_dense(config.model.source)
    if config.model.dither:
        params = dither(params, found)
    return ElasticModel(config=found, variables={"params": params}, tokenizer=tokenizer)


def _integers(flag: str, entries: list[str]) -> list[int]:
    """The whole numbers of a list option."""
    for entry in entries:
        if not entry.strip().isdecimal():
            raise ValueError(f"--{flag}: {entry!r} is no whole number")
    return [int(entry) for entry in entries]


def _changes(options: list[str], methods: list[str]) -> Settings:
    """``{method: {field: value}}`` from the --set options."""
    changes: Settings = {name: {} for name in methods}
    for option in options:
        target, equals, text = option.partition("=")
        name, dot, field = target.partition(".")
        if not equals or not dot:
            raise ValueError(f"--set={option} is not METHOD.FIELD=VALUE")
        known = {entry.name: entry.default for entry in dataclasses.fields(find_method(name).settings)}
        if field not in known:
            raise ValueError(f"--set={option}: {name} has the fields {', '.join(known) or '(none)'}")
        changes.setdefault(name, {})[field] = _parse(option, text, type(known[field]))
    return changes


def _parse(option: str, text: str, kind: type) -> Any:
    """The value of a --set option, of the type of the field's default."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"--set={option}: wants a value of type {kind.__name__}")
    return value


def _settings(name: str, bits: int, changes: Settings) -> Any:
    """The recipe of a method at a width, with the changes asked for."""
    return dataclasses.replace(find_method(name).settings.recipe(bits), **changes.get(name, {}))


def _write(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


if __name__ == "__main__":
    run(main)
