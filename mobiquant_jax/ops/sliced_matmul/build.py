"""Builds the CUDA kernels where they are first used and hands them to XLA.

The library is kept in a cache folder, ``$MOBIQUANT_JAX_CACHE`` or ``~/.cache/mobiquant_jax``, under a name that depends
on the sources, the compiler's flags and XLA's headers, so that another version never meets a stale build.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import site
import subprocess
import tempfile
from pathlib import Path

import jax

_SOURCES = Path(__file__).parent / "cuda"
_HANDLERS = {"decode": "SlicedMatmulDecode", "prefill": "SlicedMatmulPrefill", "routed": "SlicedMatmulRouted"}
_ARCHITECTURE = "90a"  # Hopper: wgmma exists nowhere else
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-Xcompiler=-fPIC",
    f"-gencode=arch=compute_{_ARCHITECTURE},code=sm_{_ARCHITECTURE}",
)


def find_nvcc() -> str | None:
    """The CUDA compiler: on the path, under ``$CUDA_HOME``, or the one of PyPI's ``nvidia-cuda-nvcc``; or None."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    packaged = [Path(folder) / "nvidia" / "cu13" / "bin" for folder in site.getsitepackages()]
    candidates = [None, *(str(folder) for folder in (home / "bin", *packaged))]  # None: the path
    return next(filter(None, (shutil.which("nvcc", path=path) for path in candidates)), None)


@functools.cache
def register(groups: int) -> dict[str, str]:
    """Builds and loads the kernels for a group size, once a process.

    Args:
        groups: groups in a block of 128 inputs: 1, 2 or 4.

    Returns:
        The FFI targets ``decode``, ``prefill`` and ``routed``.

    Raises:
        NotImplementedError: no compiler, or it failed.
    """
    library = ctypes.CDLL(str(build(groups)))
    targets = {}
    for name, symbol in _HANDLERS.items():
        targets[name] = f"mobiquant_sliced_matmul_{name}_{groups}"
        jax.ffi.register_ffi_target(targets[name], jax.ffi.pycapsule(getattr(library, symbol)), platform="CUDA")
    return targets


def build(groups: int) -> Path:
    """The shared library for a group size, compiled unless the cache has it.

    Args:
        groups: groups in a block of 128 inputs: 1, 2 or 4.

    Raises:
        NotImplementedError: no compiler, or it failed.
    """
    include = Path(jax.ffi.include_dir())
    flags = (*_FLAGS, f"-DMOBIQUANT_GROUPS={groups}")
    digest = hashlib.sha256(repr(flags).encode())
    for file in (*sorted(_SOURCES.iterdir()), *sorted(include.rglob("*.h"))):
        digest.update(file.name.encode() + file.read_bytes())
    target = _cache_folder() / f"sliced_matmul_{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    nvcc = find_nvcc()
    if nvcc is None:
        raise NotImplementedError("no nvcc to build the CUDA kernels with")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        libraries = Path(nvcc).parents[1] / "lib"  # of the package; a toolkit finds its own
        command = [nvcc, *flags, f"-I{include}", f"-L{libraries}", "-o", str(made), str(_SOURCES / "ffi.cu")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise NotImplementedError(f"nvcc failed: {_first_error(result.stdout + result.stderr)}")
        made.replace(target)  # atomic: processes that build at the same time do not meet a partial file
    return target


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mobiquant_jax"
    return Path(os.environ.get("MOBIQUANT_JAX_CACHE", default))


def _first_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines()
    return lines[0] if lines else "no message"
