"""TPU generations, and meshes of chips that are not there."""

import os
import re
from dataclasses import dataclass

from jax.experimental import topologies
from jax.sharding import Mesh

from mobiquant_jax.sharding import make_mesh

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
