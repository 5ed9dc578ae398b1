"""Where a number or a checkpoint came from: command, commit, versions, hardware, data."""

import hashlib
import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mobiquant_jax import distributed
from mobiquant_jax.io.disk_leaf import DiskLeaf

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def provenance() -> dict[str, Any]:
    """The command, git commit, versions and devices of this process, as JSON-ready values."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "device_count": jax.device_count(),
        "cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),  # they may change rounding
    }


def short_commit(commit: str | None) -> str:
    """A commit as tables show it; one of a changed checkout says so."""
    head, plus, state = (commit or "no commit").partition("+")
    return (head[:7] if commit else head) + plus + state


def origins(script: str, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line under a table for each checkout and machine that its records come from.

    Args:
        script: what made them.
        records: each with the ``provenance`` of its run.
    """
    lines = dict.fromkeys(
        f"`{script}` at {short_commit(origin['commit'])}: {', '.join(origin['devices'])}, {origin['cores']} cores; "
        f"jax {origin['versions']['jax']}."
        for origin in (record["provenance"] for record in records)
    )
    return list(lines)


def peak_host_bytes() -> int:
    """Most memory that this process has held so far, what it touched of mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: the mark of ``resource`` starts at that of the process which started this one
        marks = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return 1024 * int(marks["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def peak_device_bytes() -> int | None:
    """Most bytes in use on one of this process's devices so far; None where the backend does not say, as on CPUs."""
    marks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((mark for mark in marks if mark is not None), default=None)


def peak_memory() -> dict[str, float | None]:
    """Peak memory of this process so far, in GB: ``peak_gb`` on the host, ``peak_device_gb`` on one of its devices."""
    device = peak_device_bytes()
    return {
        "peak_gb": round(peak_host_bytes() / 1e9, 3),
        "peak_device_gb": None if device is None else round(device / 1e9, 3),
    }


def job_peak_memory() -> dict[str, float | None]:
    """`peak_memory` of the process with the most; all processes of a job call it together."""
    own = peak_memory()
    marks = distributed.fetch(np.array([[mark or 0.0 for mark in own.values()]], np.float32))  # [processes, 2]
    return {name: round(float(mark), 3) or None for name, mark in zip(own, marks.max(axis=0), strict=True)}


def fingerprint(tree: Any) -> str:
    """SHA-256 over names, shapes and a strided sample of every array: tells models and data sets apart, cheaply."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = leaf if isinstance(leaf, DiskLeaf) else np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        positions = np.arange(0, array.size, max(1, array.size // 4096))
        sample = array.sample(positions) if isinstance(array, DiskLeaf) else array.reshape(-1)[positions]
        digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with ``+dirty`` if it is changed; None outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+dirty" if changes.strip() else head


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
