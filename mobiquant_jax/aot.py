"""Compiles the large programs for a TPU that is not there, and says what they need of each chip.

The compiler is the one a TPU host runs (PyPI's ``libtpu``), so what it refuses would be refused there. Memory is its
own account of one chip: arguments, results and temporaries. FLOPs and bytes are its estimates for one chip; it counts
the body of a loop once, so a program with a loop over layers or steps is reported per iteration.
"""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from mobiquant_jax.calibration import BlockTrainer, CalibrationConfig
from mobiquant_jax.calibration.config import stages
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.io.checkpoint import abstract_variables
from mobiquant_jax.models import KVCache, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.provenance import short_commit
from mobiquant_jax.sharding import Placement, make_mesh

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU generation.

    Attributes:
        accelerator: what the runtime calls a host of it; the compiler needs one named.
        memory: bytes of HBM a chip.

    Source of the sizes: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
    """

    accelerator: str
    memory: int


CHIPS = {
    "v4": Chip(accelerator="v4-8", memory=32 * GIB),
    "v5e": Chip(accelerator="v5litepod-4", memory=16 * GIB),
    "v5p": Chip(accelerator="v5p-8", memory=95 * GIB),
    "v6e": Chip(accelerator="v6e-4", memory=32 * GIB),
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """Something to compile.

    Attributes:
        name: for the report.
        function: jitted.
        arguments: shapes with shardings.
    """

    name: str
    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]


class DoesNotFit(ValueError):
    """A program that needs more memory than a chip has.

    Attributes:
        needed: bytes, as the compiler counts them.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one program needs of one chip.

    Attributes:
        program: its name.
        memory: bytes of arguments, results and temporaries.
        flops: floating-point operations, a loop's body counted once.
        bytes_accessed: memory traffic, a loop's body counted once.
        seconds: time to compile.
    """

    program: str
    memory: int
    flops: float
    bytes_accessed: float
    seconds: float


def tpu_mesh(topology: str, *, tp: int, fsdp: int = 1) -> Mesh:
    """A mesh over a TPU topology; no TPU is needed.

    Args:
        topology: generation and shape, e.g. ``"v5p:4x4x4"``.
        tp: size of the axis that splits heads and channels.
        fsdp: size of the axis that splits parameters and batch.

    Raises:
        ValueError: a topology that does not exist, sizes that do not fit it, or no ``libtpu``.
    """
    kind = topology.partition(":")[0]
    if not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", topology) or kind not in CHIPS:
        raise ValueError(f"topology {topology!r} is not KIND:AxB or KIND:AxBxC with KIND one of {', '.join(CHIPS)}")
    # Without these the library looks for the metadata server of a TPU host.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", CHIPS[kind].accelerator)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the compiler raises its own types
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"topology {topology!r}: {reason} (is libtpu installed: pip install 'jax[tpu]'?)") from error
    return make_mesh(data=-1, fsdp=fsdp, model=tp, devices=described.devices)


def calibration_program(
    config: LlamaConfig, elastic: ElasticConfig, calibration: CalibrationConfig, mesh: Mesh
) -> Program:
    """An epoch of the last stage of one block's training, in bfloat16 with float32 parameters and streams."""
    samples = Samples.create(calibration)
    trainer = BlockTrainer(
        config=config, elastic=elastic, calibration=calibration, samples=samples, dtype=jnp.bfloat16, mesh=mesh
    )
    params, placement = trainer.abstract_trained, trainer.placement
    stage = stages(calibration)[-1]
    state = jax.eval_shape(trainer.optimizer(stage).init, params)

    def stream(count: int) -> jax.ShapeDtypeStruct:
        shape = (count, calibration.window_length, config.hidden_size)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placement.batched(shape))

    def whole(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placement.replicated)

    ids, bits = samples.steps(calibration.batch_size)
    streams = (stream(len(samples.window)), stream(calibration.windows), whole(samples.window.astype(np.int32)))
    plan = (whole(ids.astype(np.int32)), whole(bits), whole(bits))
    return Program(
        name="calibration",
        function=trainer.epochs[stage],
        arguments=(params, placement.abstract(state), trainer.abstract_dense, streams, plan),
    )


def serving_programs(
    config: LlamaConfig, elastic: ElasticConfig, mesh: Mesh, *, batch: int, context: int
) -> tuple[Program, Program]:
    """Prefill of ``batch`` prompts of ``context`` tokens, and one decoding step after as many, in bfloat16."""
    placement = Placement.create(mesh, config, elastic)
    model = ElasticModel(config=config, elastic=elastic, variables={}, dtype=jnp.bfloat16, placement=placement)
    variables = placement.abstract(abstract_variables(config, elastic))
    cache = jax.eval_shape(lambda: KVCache.create(config, batch, context + 1, jnp.bfloat16))
    cache = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        cache,
        placement.cache(cache),
    )
    bits = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=placement.batched((batch,)))

    def last_logits(variables: Any, tokens: Any, cache: KVCache, bits: Any) -> Any:
        logits, token_bits, cache = model.decode(variables, tokens, cache, bits)
        return logits[:, -1], token_bits, cache

    def program(name: str, length: int) -> Program:
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=placement.batched((batch, length)))
        return Program(
            name=name, function=jax.jit(last_logits, donate_argnums=2), arguments=(variables, tokens, cache, bits)
        )

    return program("prefill", context), program("decode", 1)


def compile_for(program: Program, mesh: Mesh, memory: int) -> Footprint:
    """Compiles a program.

    Args:
        program: what to compile.
        mesh: from `tpu_mesh`.
        memory: bytes a chip has.

    Raises:
        DoesNotFit: the program needs more memory than a chip has.
    """
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+[KMGT]) hbm", str(error))
        if used is None:
            raise
        raise DoesNotFit(
            f"{program.name} does not fit: it needs {used[1]}{used[2]}iB of a chip's {used[3]}iB that programs may use",
            round(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2])))),
        ) from error
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert stats is not None and cost is not None, "the compilers of CPUs, GPUs and TPUs give both"
    used_bytes = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    if used_bytes > memory:
        raise DoesNotFit(
            f"{program.name} does not fit: it needs {used_bytes / GIB:.1f} GiB of a chip's {memory / GIB:.0f} GiB",
            used_bytes,
        )
    return Footprint(
        program=program.name,
        memory=used_bytes,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        seconds=time.perf_counter() - start,
    )


def render_table(records: Sequence[dict[str, Any]]) -> str:
    """The records of ``results/aot.json`` as Markdown: a row a program, and a line on where they came from."""
    lines = [
        "| model | topology | data x fsdp x model | program | GiB a chip (has) | TFLOP a chip | GB moved a chip |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        head = f"| {record['model']} | {record['topology']} | {' x '.join(map(str, record['mesh']))}"
        for program in record["programs"]:
            name = f"{program['program']}, batch {_batch(record, program)}"
            memory = f"{program['memory'] / GIB:.1f} ({record['chip_memory'] / GIB:.0f})"
            if program["seconds"] is None:
                lines.append(f"{head} | {name} | {memory}: does not fit | | |")
                continue
            flops, moved = program["flops"] / 1e12, program["bytes_accessed"] / 1e9
            lines.append(f"{head} | {name} | {memory} | {flops:.3g} | {moved:.3g} |")
    return "\n".join([*lines, "", *_origins(records)])


def _batch(record: dict[str, Any], program: dict[str, Any]) -> int:
    return record["calibration_batch"] if program["program"] == "calibration" else record["batch"]


def _origins(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each commit and set of versions that records came from."""
    origins = dict.fromkeys(
        f"`experiments/aot_check.py` at {short_commit(record['provenance']['commit'])}: "
        f"{record['context']} tokens a sequence; jax {record['provenance']['versions']['jax']}, "
        f"libtpu {record['provenance']['libtpu']}."
        for record in records
    )
    return list(origins)
