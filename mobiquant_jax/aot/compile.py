"""Compiles a program for a TPU that is not there, and says what it needs of each chip.

The compiler is the one a TPU host runs (PyPI's ``libtpu``), so what it refuses would be refused there. Memory is its
own account of one chip: arguments, results and temporaries. FLOPs and bytes are its estimates for one chip; it counts
the body of a loop once, so a program with a loop over layers or steps is reported per iteration.
"""

import re
import time
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from mobiquant_jax.aot.chips import GIB
from mobiquant_jax.aot.programs import Program

# The second is a first estimate, given early; what it calls temporaries includes the arguments.
_OUT_OF_MEMORY = (
    r"Used ([\d.]+)([KMGT]) of ([\d.]+[KMGT]) hbm",
    r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)",
)


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
        memory: bytes of arguments, results and temporaries.
        flops: floating-point operations, a loop's body counted once.
        bytes_accessed: memory traffic, a loop's body counted once.
        seconds: time to compile.
    """

    memory: int
    flops: float
    bytes_accessed: float
    seconds: float


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
        refused = _refusal(program, str(error))
        if refused is None:
            raise
        raise refused from error
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
        memory=used_bytes,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        seconds=time.perf_counter() - start,
    )


def _refusal(program: Program, error: str) -> DoesNotFit | None:
    """What the compiler says when it runs out of a chip's memory, or None where its error is another."""
    for pattern in _OUT_OF_MEMORY:
        if used := re.search(pattern, error):
            return DoesNotFit(
                f"{program.name} does not fit: it needs {used[1]}{used[2]}iB of a chip's {used[3]}iB that programs may "
                "use",
                round(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2])))),
            )
    return None
