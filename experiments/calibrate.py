r"""Calibrates a model into one elastic checkpoint and shows its perplexity at every average bit width.

python experiments/calibrate.py --config=configs/smollm2_135m.py
python experiments/calibrate.py --config=configs/smollm2_135m.py --resume
python experiments/calibrate.py --config=configs/smollm2_135m.py --config.quant.group_size=32 --overwrite
python experiments/calibrate.py --config=configs/llama3_8b.py --config.mesh.data=2 --config.mesh.model=4 \
    --config.calibration.batch_size=2 --config.calibration.fit_batch_size=2

On several hosts, start the same command on each: Slurm, Kubernetes and TPU pods say which one it is, or --coordinator,
--processes and --process do.
"""

import dataclasses
import json
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mobiquant_jax import distributed
from mobiquant_jax.calibration import CalibrationConfig, Calibrator, ConsoleObserver, RunDir, open_run
from mobiquant_jax.calibration.flops import peak_flops
from mobiquant_jax.compilation import prefer_library_matmuls
from mobiquant_jax.config_flags import define_config, flatten, run
from mobiquant_jax.evaluation import (
    PerplexityResult,
    check_bits,
    curve_rows,
    format_table,
    format_token_bits,
    measure_token_bits,
    perplexity_curve,
    plot_curve,
    plot_token_bits,
    print_result,
    write_json,
)
from mobiquant_jax.experiment import (
    load_architecture,
    load_calibration,
    load_elastic,
    load_mesh,
    load_windows,
    open_dense_model,
)
from mobiquant_jax.files import save_json
from mobiquant_jax.io.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from mobiquant_jax.io.tokenizer import Tokenizer
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.provenance import fingerprint, job_peak_memory, provenance
from mobiquant_jax.serving import SamplingConfig, generate

CONFIG = define_config()
RESUME = flags.DEFINE_boolean("resume", False, "continue the run in run_dir from what it saved last")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "delete the run in run_dir and start over")

PROFILE_BLOCK = flags.DEFINE_integer("profile_block", None, "trace the training of this block, from 1, into run_dir")
TENSORBOARD = flags.DEFINE_boolean("tensorboard", False, "write the metrics to an event file in run_dir as well")
JOIN_JOB = distributed.define_flags()

# Fields that may change when a run is resumed.
_OUTCOME = ("evaluation.", "mesh.", "run_dir", "calibration.streams", "calibration.end_save_seconds")
SENTENCE = (
    "The capital of France is Paris, and a list comprehension such as [x**2 for x in range(10)] returns ten squares."
)
PROMPT = "A class definition in Python"


def main(_: list[str]) -> None:
    """Calibrates, saves, evaluates and draws."""
    prefer_library_matmuls()
    start = time.perf_counter()
    JOIN_JOB()
    config = CONFIG.value
    elastic = load_elastic(config)
    calibration = load_calibration(config)
    calibration.check_slices(elastic.slice_bits, elastic.budget_grid)
    _check_evaluation(config.evaluation, elastic)
    elastic.check_model(load_architecture(config))  # before the weights are read
    mesh = load_mesh(config)
    blocks = config.model.architecture.num_hidden_layers
    if PROFILE_BLOCK.value is not None and not 1 <= PROFILE_BLOCK.value <= blocks:
        raise ValueError(f"--profile_block={PROFILE_BLOCK.value} is outside 1..{blocks}")
    dense = open_dense_model(config)
    elastic.check_model(dense.config)
    windows, heldout = (load_windows(config, dense, split) for split in ("calibration", "heldout"))
    asked = {k: v for k, v in flatten(config).items() if not k.startswith(_OUTCOME)}
    record = {
        "config": asked,
        "model": fingerprint(dense.variables),
        "data": fingerprint(windows),
        "mesh": dict(mesh.shape),
        "provenance": provenance(),
    }
    flags_given = dict(resume=RESUME.value, overwrite=OVERWRITE.value, tensorboard=TENSORBOARD.value)
    run_dir = open_run(config.run_dir, record, **flags_given)
    if distributed.from_main(int(is_checkpoint(run_dir.checkpoint))):
        print(f"'{run_dir.checkpoint}' is complete already")
        model = load_checkpoint(run_dir.checkpoint, mesh)
    else:
        model = _calibrate(dense, elastic, calibration, windows, mesh, run_dir, record)
        print(f"calibrated in {time.perf_counter() - start:.0f} s")
    calibrated = time.perf_counter()
    run_dir.remove_intermediate()
    print(f"measuring on {heldout.size} held-out tokens", flush=True)
    with jax.set_mesh(mesh):
        results = _show(model, dense, heldout, config, run_dir)
    seconds, peaks = time.perf_counter() - start, job_peak_memory()
    result = {
        "provenance": record["provenance"],
        "mesh": record["mesh"],
        "processes": jax.process_count(),
        # A continued run's seconds are not all of them.
        "seconds": None if run_dir.continued else round(seconds, 1),
        "calibration_seconds": None if run_dir.continued else round(calibrated - start, 1),
        **peaks,
        "curve": curve_rows(results),
    }
    if distributed.is_main():
        save_json(run_dir.path / "result.json", result)
    distributed.barrier("end")  # a process that has ended waits only so long for the others
    device = "" if peaks["peak_device_gb"] is None else f", {peaks['peak_device_gb']:.2f} GB of a device"
    print(
        f"checkpoint: {run_dir.checkpoint}    total {seconds:.0f} s, {peaks['peak_gb']:.2f} GB of host memory{device}"
    )


def _check_evaluation(section: ConfigDict, elastic: ElasticConfig) -> None:
    """Finds the mistakes that would otherwise show only when calibration is done."""
    if not section.bits:
        raise ValueError("evaluation.bits is empty: give the average bits to measure, such as 2,4,8")
    for bits in section.bits:
        if check_bits(bits) < elastic.slice_bits[0]:
            raise ValueError(f"evaluation.bits: {bits:g} is below the first slice's {elastic.slice_bits[0]} bits")
    if section.batch_size < 1:
        raise ValueError(f"evaluation.batch_size={section.batch_size} must be at least 1")


def _calibrate(
    dense: ElasticModel,
    elastic: ElasticConfig,
    calibration: CalibrationConfig,
    windows: np.ndarray,
    mesh: Mesh,
    run_dir: RunDir,
    record: dict[str, Any],
) -> ElasticModel:
    calibrator = Calibrator(
        config=dense.config,
        elastic=elastic,
        calibration=calibration,
        run=run_dir,
        observer=ConsoleObserver(peak_flops(mesh.devices.ravel().tolist())),
        mesh=mesh,
        profile_block=None if PROFILE_BLOCK.value is None else PROFILE_BLOCK.value - 1,
    )
    try:
        variables = calibrator.calibrate(dense.variables["params"], windows)
    except KeyboardInterrupt:
        print(f"\n'{run_dir.path}' keeps what was saved: the same command with --resume continues", flush=True)
        raise
    model = dataclasses.replace(dense, elastic=elastic, variables=variables, placement=calibrator.placement)
    save_checkpoint(run_dir.checkpoint, model, json.loads(json.dumps(record)))
    return model


def _show(
    model: ElasticModel, dense: ElasticModel, heldout: np.ndarray, config: ConfigDict, run_dir: RunDir
) -> list[PerplexityResult]:
    """Measures and shows the curve and, where there is a tokenizer, what the model makes of a text."""
    batch_size = config.evaluation.batch_size
    assert model.placement is not None, "the model lies on the run's mesh"
    dense = dataclasses.replace(dense, variables=model.placement.put(dense.variables))
    measure = partial(perplexity_curve, windows=heldout, batch_size=batch_size, progress=print_result)
    reference = measure(dense, bits_list=[None])
    results = measure(model, bits_list=config.evaluation.bits) + reference
    print(format_table(results))
    if distributed.is_main():
        write_json(run_dir.path / "curve.json", results)
        plot_curve(run_dir.path / "curve.png", results, f"{run_dir.path.name}: one checkpoint, any average bits")
    if model.tokenizer is not None:
        _show_text(model, model.tokenizer, run_dir)
    print()
    for picture in ("curve.json", "curve.png", "tokens.png"):
        if (run_dir.path / picture).is_file():
            print(run_dir.path / picture)
    return results


def _show_text(model: ElasticModel, tokenizer: Tokenizer, run_dir: RunDir) -> None:
    """The picture of a sentence and two short continuations."""
    assert model.elastic is not None
    few = max(3.0, model.elastic.slice_bits[0])
    token_bits = measure_token_bits(model, tokenizer, SENTENCE, few)
    title = f"{run_dir.path.name}: bits each token used at {few:g} average bits"
    if distributed.is_main():
        plot_token_bits(run_dir.path / "tokens.png", token_bits, title)
    print(f"\nbits by token at {few:g} average bits:\n{format_token_bits(token_bits)}")
    prompt = tokenizer.encode(PROMPT)
    for bits in (few, 8.0):
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
        tokens, lengths = distributed.fetch((text.tokens, text.lengths))
        new = tokens[0][: int(lengths[0])]
        print(f"\nat {bits:g} bits: {PROMPT}{tokenizer.decode(new)}")


if __name__ == "__main__":
    run(main)
