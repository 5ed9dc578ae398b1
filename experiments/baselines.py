r"""Perplexity of the fixed-width baselines, each width its own quantized model, on the data of an elastic checkpoint.

Settings are chosen on one text, by naming several values of a field, ...

python experiments/baselines.py --config=configs/smollm2_135m.py --config.model.dither=true \
    --config.data.source=file:c4.txt,valid.txt \
    --config.calibration.windows=128 --config.calibration.window_length=2048 --config.evaluation.window_length=2048 \
    --methods=qat --bits=2,3,4 --set=qat.weight_lr=5e-5,1e-4,2e-4 --text=valid=file:valid.txt --json=settings.json

... and the table is made with the best of them, here the other methods with their recipes:

python experiments/baselines.py ... --recipes=settings.json --methods=rtn,gptq,awq,autoround,omniquant,qat \
    --seeds=0,1,2 --elsewhere --text=wikitext2=file:test.txt --text=wikipedia:64=file:wikipedia.txt \
    --json=baselines.json

The calibration part of config.data.source is calibrated on; all of each --text, or its first windows, is scored, in
windows of config.evaluation.window_length. Models that differ in seeds and rates only are made together. Where the
file of --json exists, --resume adds the rows it lacks.

--save=FOLDER also writes every model at its own width, and the unquantized one as it was scored, as a Hugging Face
folder: FOLDER/unquantized, FOLDER/rtn-2, FOLDER/qat-3-0 (method, bits, seed). With --resume, a model whose rows are
there but whose folder is not is made again, and its rows are kept.
"""

import ast
import dataclasses
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mobiquant_jax.baselines import (
    METHODS,
    QuantizedModel,
    QuantSpec,
    Results,
    Run,
    best_settings,
    check_bits,
    find_method,
    open_results,
    program,
    quantize_models,
    read_results,
    run_omniquant_at,
)
from mobiquant_jax.compilation import prefer_library_matmuls
from mobiquant_jax.config_flags import define_config, run, whole_numbers
from mobiquant_jax.evaluation import evaluate_perplexity, perplexity_step
from mobiquant_jax.experiment import load_dense_model, load_texts, load_windows
from mobiquant_jax.io import save_hf
from mobiquant_jax.models.elastic import DENSE_BITS, ElasticModel
from mobiquant_jax.provenance import fingerprint, provenance

CONFIG = define_config()
METHOD_NAMES = flags.DEFINE_list("methods", list(METHODS), "baselines to run")
BITS = flags.DEFINE_list("bits", ["2", "3", "4"], "widths, each 2 to 8")
SEEDS = flags.DEFINE_list("seeds", ["0"], "a model each, of the baselines that draw")
TEXTS = flags.DEFINE_multi_string("text", [], "NAME[:WINDOWS]=SOURCE to score; the option may be repeated")
SETTINGS = flags.DEFINE_multi_string(
    "set", [], "METHOD[@BITS].FIELD=VALUE[,VALUE...] instead of the recipe's, a model each; may be repeated"
)
RECIPES = flags.DEFINE_string("recipes", None, "results of one text: use the best settings of each method and width")
ELSEWHERE = flags.DEFINE_boolean("elsewhere", False, "also run OmniQuant's clipping at the widths it was not made for")
AT_ONCE = flags.DEFINE_integer("at_once", 9, "most models made together; fewer need less memory", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "type of the matmuls in training")
JSON = flags.DEFINE_string("json", None, "file for the rows, rewritten after every model")
SAVE = flags.DEFINE_string("save", None, "folder to write the models to, each a Hugging Face folder METHOD-BITS[-SEED]")
RESUME = flags.DEFINE_boolean("resume", False, "add the rows that the file lacks")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace the file")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to make: what is the same in all its rows."""

    method: str
    bits: int | None
    seed: int | None
    settings: Any
    tried: int | None

    def facts(self, bits: int | None) -> dict[str, Any]:
        """The columns that tell models apart, run at ``bits``."""
        return {
            "method": self.method,
            "bits": bits,
            "calibrated_bits": self.bits,
            "seed": self.seed,
            "settings": {} if self.settings is None else dataclasses.asdict(self.settings),
        }

    def widths(self) -> list[int | None]:
        """Where the model is run: at its own width and, for OmniQuant if asked for, at the others."""
        others = whole_numbers("bits", BITS.value) if self.method == "omniquant" and ELSEWHERE.value else []
        return [self.bits, *(bits for bits in others if bits != self.bits)]

    def folder(self) -> Path | None:
        """Where the model is to be saved, if it is."""
        if SAVE.value is None:
            return None
        name = "-".join(str(part) for part in (self.method, self.bits, self.seed) if part is not None)
        return Path(SAVE.value).expanduser() / name

    def lacks_folder(self) -> bool:
        """Whether the model is still to be saved."""
        folder = self.folder()
        return folder is not None and not _holds_something(folder)


def main(_: list[str]) -> None:
    """Plans, then makes and scores, a few models at a time."""
    prefer_library_matmuls()
    config = CONFIG.value
    jobs = _plan()
    dense = load_dense_model(config)
    dtype, group_size = jnp.dtype(DTYPE.value), config.quant.group_size
    specs: dict[int | None, QuantSpec] = {
        bits: QuantSpec(config=dense.config, bits=bits, group_size=group_size, dtype=dtype)
        for bits in whole_numbers("bits", BITS.value)
    }
    windows = load_windows(config, dense, "calibration")
    texts = load_texts(TEXTS.value, config.evaluation.window_length, dense)
    identity = {
        "model": fingerprint(dense.variables),
        "calibration": fingerprint(windows),
        "group_size": group_size,
        "dtype": DTYPE.value,
        "texts": {name: fingerprint(text) for name, text in texts.items()},
    }
    results = open_results(JSON.value, identity, provenance(), resume=RESUME.value, overwrite=OVERWRITE.value)
    scorer = Scorer(dense, texts, results, config.evaluation.batch_size)
    unquantized = Job(method="unquantized", bits=None, seed=None, settings=None, tried=None)
    _check_folders([unquantized, *jobs], scorer)
    if scorer.lacks(unquantized) or unquantized.lacks_folder():
        dense_params = jax.tree.map(jnp.asarray, dense.variables["params"])
        scorer.score(unquantized, None, QuantizedModel(params=dense_params), 0.0)
        _save(unquantized, dense, QuantizedModel(params=dense_params))
    for batch in _batches([job for job in jobs if scorer.lacks(job) or job.lacks_folder()]):
        method, spec = batch[0].method, specs[batch[0].bits]
        start = time.perf_counter()
        runs = [Run(settings=job.settings, seed=job.seed or 0) for job in batch]
        models = quantize_models(method, spec, dense.variables["params"], windows, runs)
        jax.block_until_ready([model.params for model in models])
        seconds = (time.perf_counter() - start) / len(batch)
        for job, model in zip(batch, models, strict=True):
            for bits in job.widths():
                there = model
                if bits != job.bits:
                    there = run_omniquant_at(specs[bits], dense.variables["params"], model)
                scorer.score(job, bits, there, seconds)
            _save(job, dense, model)


def _check_folders(jobs: list[Job], scorer: "Scorer") -> None:
    """Raises ValueError where a model could not be saved, or where what is there may be another one's."""
    taken: set[Path] = set()
    for job in jobs:
        folder = job.folder()
        if folder is None:
            continue
        if folder in taken:
            raise ValueError(f"--save: two models would be written to '{folder}': give one value a field, not several")
        taken.add(folder)
        above = next(parent for parent in folder.parents if parent.exists())
        if not above.is_dir():
            raise ValueError(f"--save: '{above}' is no folder")
        # A folder is written whole, after its model's rows: with all rows in the table it is that model.
        kept = RESUME.value and (folder / "config.json").is_file() and not scorer.lacks(job)
        if _holds_something(folder) and not kept:
            raise ValueError(
                f"--save: '{folder}' is in the way: only --resume keeps a model, if all its rows are there"
            )


def _holds_something(folder: Path) -> bool:
    """Whether there is a file, or a folder that is not empty."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _save(job: Job, dense: ElasticModel, quantized: QuantizedModel) -> None:
    """Writes a model that was asked for and is not there yet."""
    folder = job.folder()
    if folder is not None and job.lacks_folder():
        save_hf(folder, dense.config, quantized.params, dtype="float32", tokenizer=dense.tokenizer)


class Scorer:
    """Scores models on all texts, prints the rows and files them."""

    def __init__(self, dense: ElasticModel, texts: dict[str, np.ndarray], results: Results, batch_size: int) -> None:
        self._dense, self._texts, self._results, self._batch_size = dense, texts, results, batch_size
        self._step = perplexity_step(dense)  # one compilation: the models differ in their arrays only

    def lacks(self, job: Job) -> bool:
        """Whether a row of a job is missing."""
        rows = ({**job.facts(bits), "text": text} for bits in job.widths() for text in self._texts)
        return any(row not in self._results for row in rows)

    def score(self, job: Job, bits: int | None, quantized: QuantizedModel, seconds: float) -> None:
        """Adds the rows of a model run at a width; ``seconds`` is its share of the time its batch took to make."""
        model = dataclasses.replace(self._dense, variables={"params": quantized.params})
        for name, windows in self._texts.items():
            row = {**job.facts(bits), "text": name}
            if row in self._results:
                continue
            with jax.default_matmul_precision("highest"):  # float32 throughout, on accelerators too
                result = evaluate_perplexity(model, windows, None, batch_size=self._batch_size, step=self._step)
            row |= {
                "measured_bits": DENSE_BITS if bits is None else float(bits),
                "perplexity": result.perplexity if np.isfinite(result.perplexity) else None,
                "tokens": result.tokens,
                "seconds": round(seconds, 2),
                "settings_tried": job.tried,
            }
            self._results.add(row)
            print(_line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    label = row["method"] + (f" (made at {row['calibrated_bits']})" if row["calibrated_bits"] != row["bits"] else "")
    bits, seed = ("-" if row[name] is None else row[name] for name in ("bits", "seed"))
    perplexity = "not finite" if row["perplexity"] is None else f"{row['perplexity']:.5g}"
    settings = " ".join(f"{name}={value:g}" for name, value in row["settings"].items() if isinstance(value, float))
    return f"{label:22s} {bits} bits  seed {seed}  {row['text']} {perplexity:>10s}  {row['seconds']:.1f} s  {settings}"


def _plan() -> list[Job]:
    """The models to make, in order; every mistake on the command line shows before any work is done."""
    widths, seeds = whole_numbers("bits", BITS.value), whole_numbers("seeds", SEEDS.value)
    changes = [_parse_change(option, widths) for option in SETTINGS.value]
    tuned = read_results(RECIPES.value)["rows"] if RECIPES.value else []
    jobs = []
    for bits in widths:
        check_bits(bits)
    for method, bits in itertools.product(METHOD_NAMES.value, widths):
        found = find_method(method)
        best, tried = best_settings(tuned, method, bits)
        recipe = found.settings.recipe(bits) if best is None else found.settings(**best)
        mine = {field: values for name, at, field, values in changes if name == method and bits in at}
        for choice in itertools.product(*mine.values()):
            settings = dataclasses.replace(recipe, **dict(zip(mine, choice, strict=True)))
            for seed in seeds if found.seeded else [None]:
                jobs.append(Job(method=method, bits=bits, seed=seed, settings=settings, tried=tried or None))
    return jobs


def _batches(jobs: list[Job]) -> Iterator[list[Job]]:
    """Jobs that one program makes together."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.method, job.bits, program(job.settings)), []).append(job)
    for group in groups.values():
        for start in range(0, len(group), AT_ONCE.value):
            yield group[start : start + AT_ONCE.value]


def _parse_change(option: str, widths: list[int]) -> tuple[str, list[int], str, list[Any]]:
    """``(method, widths, field, values)`` of a --set option."""
    target, equals, text = option.partition("=")
    label, dot, name = target.partition(".")
    method, at, bits = label.partition("@")
    if not equals or not dot or (at and not bits.isdigit()):
        raise ValueError(f"--set={option} is not METHOD.FIELD=VALUE or METHOD@BITS.FIELD=VALUE")
    if method not in METHOD_NAMES.value or (at and int(bits) not in widths):
        raise ValueError(f"--set={option}: {label} is not among the models to make")
    known = {entry.name: entry.default for entry in dataclasses.fields(find_method(method).settings)}
    if name not in known:
        raise ValueError(f"--set={option}: {method} has the fields {', '.join(known) or '(none)'}")
    values = [_parse_value(option, value, type(known[name])) for value in text.split(",")]
    return method, [int(bits)] if at else widths, name, values


def _parse_value(option: str, text: str, kind: type) -> Any:
    """A value of the type of the field's default."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"--set={option}: '{text}' is no {kind.__name__}")
    return value


if __name__ == "__main__":
    run(main)
