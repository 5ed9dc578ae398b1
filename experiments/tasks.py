r"""Zero-shot tasks of elastic checkpoints and of fixed-width models, into one file: one row a model, width and task.

python experiments/tasks.py --model=elastic:0=runs/quality/0/checkpoint --model=elastic:1=runs/quality/1/checkpoint \
    --model=unquantized=models/unquantized --model=rtn@3=models/rtn-3 --model=qat@3:0=models/qat-3-0 \
    --bits=2,2.5,3,4,8 --task_data=FOLDER --json=results/tasks.json

A --model is METHOD[@BITS][:SEED]=SOURCE. An elastic checkpoint is scored at every average of --bits. Any other source
(a Hugging Face folder, such as `baselines.py --save` writes, a GGUF file or package:NAME) is scored once, as it is;
its BITS and SEED are what its rows say. All is checked before the first model is scored. Where the file of --json
exists, --resume adds the rows it lacks. Needs lm_eval: pip install 'mobiquant_jax[eval]'.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mobiquant_jax.baselines import Results, check_bits, open_results
from mobiquant_jax.compilation import prefer_library_matmuls
from mobiquant_jax.config_flags import run
from mobiquant_jax.evaluation import parse_bits
from mobiquant_jax.evaluation.tasks import ContinuationStep, continuation_step, require_lm_eval
from mobiquant_jax.evaluation.tasks.documents import LOCAL_TASKS, check_documents
from mobiquant_jax.evaluation.tasks.table import accuracy
from mobiquant_jax.files import check_same
from mobiquant_jax.io import open_dense, resolve
from mobiquant_jax.io.checkpoint import is_checkpoint
from mobiquant_jax.io.load import load_model
from mobiquant_jax.io.tokenizer import has_tokenizer
from mobiquant_jax.models.elastic import DENSE_BITS, ElasticModel
from mobiquant_jax.provenance import fingerprint, provenance

MODELS = flags.DEFINE_multi_string("model", [], "METHOD[@BITS][:SEED]=SOURCE to score; the option may be repeated")
BITS = flags.DEFINE_string("bits", None, "average bits of elastic checkpoints, each in [2, 8]")
TASKS = flags.DEFINE_list("tasks", list(LOCAL_TASKS), "local tasks")
TASK_DATA = flags.DEFINE_string("task_data", None, "folder of the tasks' JSON lines")
LIMIT = flags.DEFINE_integer("limit", None, "most documents of a task; all unless given", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "texts a step", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "file for the rows, rewritten after each")
RESUME = flags.DEFINE_boolean("resume", False, "add the rows that the file lacks")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace the file")

_KEY = ("method", "bits", "seed", "task")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to score.

    Attributes:
        method: what its rows are called.
        seed: what its rows say, or None.
        path: what ``io.load.load_model`` opens.
        elastic: whether ``bits`` are averages to run it at, rather than what the rows of a dense model say.
        bits: a dense model has one entry, None where it has no width.
    """

    method: str
    seed: int | None
    path: Path
    elastic: bool
    bits: tuple[float | None, ...]

    def facts(self, bits: float | None) -> dict[str, Any]:
        """The columns of a width that all tasks share."""
        return {"method": self.method, "bits": bits, "seed": self.seed}

    def owns(self, row: dict[str, Any]) -> bool:
        """Whether a row must be this model's: an elastic one has all widths of its method and seed."""
        same = (row["method"], row["seed"]) == (self.method, self.seed)
        return same and (self.elastic or row["bits"] in self.bits)

    def meets(self, other: "Source") -> bool:
        """Whether a row of another model must be this one's."""
        return any(self.owns(other.facts(bits)) for bits in other.bits)


def main(_: list[str]) -> None:
    """Checks everything, then scores one model after the other."""
    prefer_library_matmuls()
    sources = _read_sources(MODELS.value)
    if TASK_DATA.value is None:
        raise ValueError("give the tasks' folder: --task_data=FOLDER")
    tasks, folder = list(dict.fromkeys(TASKS.value)), Path(TASK_DATA.value).expanduser()
    if not tasks:
        raise ValueError(f"no tasks: give --tasks=NAME,... of {', '.join(LOCAL_TASKS)}")
    identity = {"limit": LIMIT.value, "texts": check_documents(tasks, folder)}
    results = open_results(JSON.value, identity, provenance(), resume=RESUME.value, overwrite=OVERWRITE.value, key=_KEY)
    require_lm_eval()
    steps = Steps()
    for source in sources:
        _score(source, tasks, folder, results, steps)
    print(_summary(sources, tasks, results))


class Steps:
    """One compiled step for all models of one architecture, whose arrays are its arguments."""

    def __init__(self) -> None:
        self._steps: list[tuple[Any, ContinuationStep]] = []

    def step_of(self, model: ElasticModel) -> ContinuationStep:
        """The step of models like this one; it keeps no hold of their arrays."""
        kind = (model.config, model.elastic, model.dtype)
        for known, step in self._steps:
            if known == kind:
                return step
        bare = ElasticModel(config=model.config, variables={}, elastic=model.elastic, dtype=model.dtype)
        self._steps.append((kind, continuation_step(bare)))
        return self._steps[-1][1]


def _score(source: Source, tasks: list[str], folder: Path, results: Results, steps: Steps) -> None:
    """Adds the rows of a model that are missing."""
    from mobiquant_jax.evaluation.tasks.runner import TaskResult, evaluate_tasks  # lm_eval is optional

    wanted = {
        bits: [task for task in tasks if source.facts(bits) | {"task": task} not in results] for bits in source.bits
    }
    lacking = {bits: some for bits, some in wanted.items() if some}
    if not lacking:
        print(f"{_label(source.method, source.seed)}: all rows are there, the model was not read")
        return
    model = load_model(source.path)
    origin = fingerprint(model.variables)
    _check_origin(source, origin, results)

    for bits, some in lacking.items():

        def add(found: TaskResult, bits: float | None = bits) -> None:
            row = source.facts(bits) | {
                "task": found.task,
                "measured_bits": found.measured_bits if source.elastic else DENSE_BITS if bits is None else bits,
                "accuracy": found.accuracy,
                "accuracy_norm": found.accuracy_norm,
                "documents": found.documents,
                "seconds": round(found.seconds, 2),
                "model": origin,
            }
            results.add(row)
            print(_line(row), flush=True)

        with jax.default_matmul_precision("highest"):  # as perplexity is scored
            evaluate_tasks(
                model,
                [bits if source.elastic else None],
                folder,
                tasks=some,
                batch_size=BATCH_SIZE.value,
                limit=LIMIT.value,
                step=steps.step_of(model),
                progress=add,
            )


def _check_origin(source: Source, origin: str, results: Results) -> None:
    """Raises ValueError where rows that would stand beside this model's are another model's."""
    for row in results.rows:
        if source.owns(row):
            check_same(str(results.path), f"the model of {_label(source.method, source.seed)}", row["model"], origin)


def _read_sources(options: list[str]) -> list[Source]:
    """The models to score.

    Raises:
        ValueError: no options, one of another form, an elastic checkpoint without bits, a model whose rows another
            one has, or one that cannot be scored.
        FileNotFoundError: there is no such model.
    """
    if not options:
        raise ValueError("nothing to score: give --model=METHOD[@BITS][:SEED]=SOURCE")
    sources: list[Source] = []
    for option in options:
        source = _read_source(option)
        if any(source.meets(other) or other.meets(source) for other in sources):
            raise ValueError(f"--model={option}: another model has its method, seed and bits")
        sources.append(source)
    return sources


def _read_source(option: str) -> Source:
    """One --model, whose source is opened but not read."""
    label, _, source = option.partition("=")
    parts = re.fullmatch(r"([^@:]+)(?:@(\d+))?(?::(\d+))?", label)
    if parts is None or not source:
        raise ValueError(f"--model={option} is not METHOD[@BITS][:SEED]=SOURCE")
    method = parts[1]
    width, seed = (None if number is None else int(number) for number in parts.groups()[1:])
    path = resolve(source)
    elastic = is_checkpoint(path)
    bits: tuple[float | None, ...] = (width,)
    if elastic:
        if width is not None:
            raise ValueError(f"--model={option}: an elastic checkpoint runs at --bits and takes no @{width}")
        if BITS.value is None:
            raise ValueError(f"--model={option}: an elastic checkpoint needs average bits, such as --bits=2,3,4")
        bits = tuple(dict.fromkeys(parse_bits(BITS.value)))
    elif width is not None:
        check_bits(width)
    if not (has_tokenizer(path) if elastic else open_dense(path)[2]):
        raise ValueError(f"--model={option}: the model has no tokenizer")
    return Source(method=method, seed=seed, path=path, elastic=elastic, bits=bits)


def _label(method: str, seed: int | None) -> str:
    return method if seed is None else f"{method} seed {seed}"


def _line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    bits = "-" if row["bits"] is None else f"{row['bits']:g}"
    norm = "" if row["accuracy_norm"] is None else f"  per character {row['accuracy_norm']:.4f}"
    label = _label(row["method"], row["seed"])
    return f"{label:20s} {bits:>4s} bits  {row['task']:20s} {row['accuracy']:.4f}{norm}  {row['seconds']:.1f} s"


def _summary(sources: list[Source], tasks: list[str], results: Results) -> str:
    """For each method and width the mean over tasks and seeds, per character of the choice where a task has that."""
    seeds: dict[tuple[str, float | None], list[int | None]] = {}
    for source in sources:
        for bits in source.bits:
            seeds.setdefault((source.method, bits), []).append(source.seed)
    lines = [f"{'':20s} {'bits':>5s} {'models':>7s} {'mean over ' + str(len(tasks)) + ' tasks':>18s}"]
    for (method, bits), mine in seeds.items():
        scores = [
            accuracy(row)
            for row in results.rows
            if (row["method"], row["bits"]) == (method, bits) and row["seed"] in mine and row["task"] in tasks
        ]
        width = "-" if bits is None else f"{bits:g}"
        lines.append(f"{method:20s} {width:>5s} {len(mine):7d} {sum(scores) / len(scores):18.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
