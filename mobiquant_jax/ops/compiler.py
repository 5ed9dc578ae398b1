"""Compiles CUDA sources where they are first used, for XLA's FFI.

A library is kept in a cache folder, ``$MOBIQUANT_JAX_CACHE`` or ``~/.cache/mobiquant_jax``, under a name that depends
on the sources, the compiler's flags and XLA's headers, so that another version never meets a stale build.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import site
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

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


def check_hopper() -> None:
    """Raises NotImplementedError unless JAX runs on a Hopper GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        raise NotImplementedError(f"the CUDA kernels need a Hopper GPU, not {device.device_kind}")


def register(library: Path, handlers: Mapping[str, str]) -> None:
    """Loads a library and hands its functions to XLA; at most once a process and target.

    Args:
        library: from `compile_library`.
        handlers: FFI target -> exported symbol.
    """
    loaded = ctypes.CDLL(str(library))
    for target, symbol in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="CUDA")


def compile_library(source: Path, definitions: tuple[str, ...] = ()) -> Path:
    """The shared library of a source, compiled unless the cache has it.

    Args:
        source: a ``.cu`` file; what lies beside it may be included.
        definitions: of the preprocessor, ``NAME=VALUE``.

    Raises:
        NotImplementedError: no compiler, or it failed.
    """
    outcome = _compile(source, definitions, _cache_folder(), find_nvcc())
    if isinstance(outcome, str):
        raise NotImplementedError(outcome)
    return outcome


@functools.cache  # a failure too: every trace of every layer asks again
def _compile(source: Path, definitions: tuple[str, ...], folder: Path, nvcc: str | None) -> Path | str:
    """The library, or why there is none, which is also logged."""
    try:
        return _compile_now(source, definitions, folder, nvcc)
    except NotImplementedError as reason:
        logging.getLogger(__name__).warning("%s is not used: %s", source.name, reason)
        return str(reason)


def _compile_now(source: Path, definitions: tuple[str, ...], folder: Path, nvcc: str | None) -> Path:
    include = Path(jax.ffi.include_dir())
    flags = (*_FLAGS, *(f"-D{definition}" for definition in definitions))
    digest = hashlib.sha256(repr((source.name, flags)).encode())
    for file in (*sorted(_sources(source)), *sorted(include.rglob("*.h"))):
        digest.update(file.name.encode() + file.read_bytes())
    target = folder / f"{source.stem}_{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    if nvcc is None:
        raise NotImplementedError("no nvcc to build the CUDA kernels with")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
        made = Path(unfinished) / target.name
        libraries = Path(nvcc).parents[1] / "lib"  # of the package; a toolkit finds its own
        command = [nvcc, *flags, f"-I{include}", f"-L{libraries}", "-o", str(made), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise NotImplementedError(f"nvcc failed: {_first_error(result.stdout + result.stderr)}")
        made.replace(target)  # atomic: processes that build at the same time do not meet a partial file
    return target


def _sources(source: Path) -> list[Path]:
    return [file for file in source.parent.iterdir() if file.suffix in (".cu", ".cuh")]


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mobiquant_jax"
    return Path(os.environ.get("MOBIQUANT_JAX_CACHE", default))


def _first_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines()
    return lines[0] if lines else "no message"
