"""Compiles calibration and serving for TPUs that are not there; fails where a chip's memory is too small.

    python experiments/aot_check.py --config=configs/llama3_8b.py --topology=v5e:2x4 --tp=8
    python experiments/aot_check.py --config=configs/llama3_70b.py --topology=v5p:4x4x4 --tp=8 --output=results/aot.json

Needs no accelerator, but the TPU compiler: pip install 'mobiquant_jax[tpu]'. Training runs the recipe's windows a step
(--config.calibration.batch_size, end_batch_size, fit_batch_size): fewer than data x fsdp leave chips without windows
of their own. Tuning, by width, routed and of slices alone, and fitting are part of the recipe where
--config.calibration.end_epochs, routed_epochs, slice_epochs or fine_epochs, and fit_epochs are positive.
"""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from mobiquant_jax.aot import (
    CHIPS,
    GIB,
    KEY,
    DoesNotFit,
    Program,
    compile_for,
    render_table,
    serving_programs,
    tpu_mesh,
    training_programs,
)
from mobiquant_jax.config_flags import define_config, run
from mobiquant_jax.experiment import load_architecture, load_calibration, load_elastic
from mobiquant_jax.files import RecordFile
from mobiquant_jax.provenance import provenance

CONFIG = define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "generation and shape, e.g. v5e:2x4, v6e:2x4, v5p:4x4x4")
TP = flags.DEFINE_integer("tp", 1, "chips that share each head and feed-forward channel split (mesh axis model)")
FSDP = flags.DEFINE_integer("fsdp", 1, "chips that share the parameters otherwise (mesh axis fsdp)")
BATCH = flags.DEFINE_integer("batch", 8, "sequences of prefill and decoding")
CONTEXT = flags.DEFINE_integer("context", 2048, "tokens of each sequence")
ONLY = flags.DEFINE_list(
    "programs",
    None,
    "which to compile of calibration, tuning, routed, slices, fitting, prefill, decode; all of the recipe if not given",
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file whose records of these programs on this mesh are replaced")


def main(_: list[str]) -> None:
    """Compiles, prints a line a program, and records; those that do not fit are recorded too, and fail at the end."""
    jax.config.update("jax_platforms", "cpu")
    if TOPOLOGY.value is None:
        raise ValueError("--topology=KIND:SHAPE is required, e.g. --topology=v5e:2x4")
    output = RecordFile(path=Path(OUTPUT.value), name="compiled", key=KEY) if OUTPUT.value else None
    if output:
        output.read()  # a mistaken file is found before minutes of compilation, not after
    name = Path(CONFIG.value.run_dir).name
    mesh = tpu_mesh(TOPOLOGY.value, tp=TP.value, fsdp=FSDP.value)
    chip = CHIPS[TOPOLOGY.value.partition(":")[0]]
    programs = _programs(mesh)
    print(f"{name} on {mesh.size} chips of {TOPOLOGY.value}: " + ", ".join(f"{a}={n}" for a, n in mesh.shape.items()))
    origin = {**provenance(), "libtpu": importlib.metadata.version("libtpu")}
    records, refused = [], []
    for program in programs:
        try:
            found = _compile(program, mesh, chip.memory)
        except DoesNotFit as error:
            print(error, flush=True)
            refused.append(str(error))
            found = {"memory": error.needed} | dict.fromkeys(("flops", "bytes_accessed", "seconds"))
        record = {
            "model": name,
            "topology": TOPOLOGY.value,
            "mesh": list(mesh.shape.values()),
            "program": program.name,
            "batch": program.batch,
            "tokens": program.tokens,
            "chip_memory": chip.memory,
            **found,
            "provenance": origin,
        }
        records.append(record)
        if output:  # each program is kept once it is known
            output.save(record)
    print(render_table(records))
    if refused:
        raise ValueError("; ".join(refused))


def _programs(mesh: Mesh) -> list[Program]:
    """Those of the recipe and of serving, or the ones that were asked for."""
    config = CONFIG.value
    model = (load_architecture(config), load_elastic(config))
    programs = [
        *training_programs(*model, load_calibration(config), mesh),
        *serving_programs(*model, mesh, batch=BATCH.value, context=CONTEXT.value),
    ]
    names = [program.name for program in programs]
    wanted = names if ONLY.value is None else ONLY.value
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"--programs: {unknown[0]!r} is none of this recipe's, {', '.join(names)}")
    return [program for program in programs if program.name in wanted]


def _compile(program: Program, mesh: Mesh, memory: int) -> dict[str, Any]:
    """Compiles a program and prints a line."""
    found = compile_for(program, mesh, memory)
    print(
        f"{program.name:12s} {found.memory / GIB:6.2f} of {memory / GIB:.0f} GiB a chip, "
        f"{found.flops / 1e12:8.3f} TFLOP, {found.bytes_accessed / 1e9:8.2f} GB moved, "
        f"compiled in {found.seconds:.1f} s",
        flush=True,
    )
    return dataclasses.asdict(found)


if __name__ == "__main__":
    run(main)
