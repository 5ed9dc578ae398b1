"""Safetensors files of a Hugging Face folder: where each tensor lies, read by mapping it, written one at a time.

The format: the header's length as a little-endian u64, a JSON header padded to 8 bytes, then the tensors' bytes.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mobiquant_jax.io.names import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

NUMPY_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
FILE_DTYPES = {dtype.name: name for name, dtype in NUMPY_DTYPES.items()}

# Old exports stored this buffer; it follows from rope_theta.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_CHUNK_BYTES = 2**26  # of a tensor that is converted while it is written


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        file: the safetensors file.
        offset: where its bytes begin.
        shape: ``[out, in]`` for a linear.
        dtype: a floating-point type.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def map(self) -> np.ndarray:
        """The tensor, mapped: pages are read when they are touched and go when the array does.

        Raises:
            ValueError: the file has become shorter than it was.
        """
        try:
            return np.memmap(self.file, self.dtype, mode="r", offset=self.offset, shape=self.shape)
        except ValueError as error:
            raise ValueError(f"{self.file}: damaged or truncated safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; a ValueError names the file where it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content


def weight_files(folder: str | Path) -> list[Path]:
    """Lists a folder's safetensors files.

    Args:
        folder: the model's folder.

    Returns:
        ``model.safetensors``, or the shards that the index names, sorted.

    Raises:
        FileNotFoundError: there are no weights, or a shard that the index names is missing.
        ValueError: the index cannot be read.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}")
    files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: shard '{file.name}' named in {INDEX_FILE} is missing")
    return files


def find_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Finds every tensor in a Hugging Face folder; reads headers and no weights.

    Args:
        folder: the model's folder.

    Returns:
        Tensor name -> where it is, without old rotary buffers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, lacks a tensor which the index places in it, repeats one, or stores one in a type
            that is not plain floating point.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, entry, start in _entries(file):
            if name.endswith(_IGNORED_SUFFIX):
                continue
            if name in found:
                raise ValueError(f"{file}: tensor '{name}' is already in another shard")
            if entry["dtype"] not in NUMPY_DTYPES:
                raise ValueError(
                    f"{file}: tensor '{name}' is stored as {entry['dtype']}, not {', '.join(NUMPY_DTYPES)}"
                )
            dtype = NUMPY_DTYPES[entry["dtype"]]
            found[name] = StoredTensor(file=file, offset=start, shape=tuple(entry["shape"]), dtype=dtype)
    if not (Path(folder) / SINGLE_FILE).is_file():
        for name, shard in _weight_map(Path(folder)).items():
            if name not in found and not name.endswith(_IGNORED_SUFFIX):
                raise ValueError(f"{folder}: shard '{shard}' lacks tensor '{name}', which {INDEX_FILE} places in it")
    return found


def write_safetensors(
    path: Path, specs: Sequence[TensorSpec], read: Callable[[TensorSpec], np.ndarray], dtype: str
) -> None:
    """Writes one file, converting a part of one tensor at a time (the library's own writer needs all at once).

    Args:
        path: the new file.
        specs: its tensors, in order.
        read: gives one tensor, in the file's orientation.
        dtype: the type to store, a name of ``FILE_DTYPES``.

    Raises:
        ValueError: a value beyond float16's range, which would become an infinity.
        OSError: the disk refuses.
    """
    numpy_dtype = NUMPY_DTYPES[FILE_DTYPES[dtype]]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + numpy_dtype.itemsize * int(np.prod(spec.shape))
        header[spec.name] = {"dtype": FILE_DTYPES[dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for spec in specs:
            tensor = read(spec)
            rows = max(1, _CHUNK_BYTES // max(1, tensor[:1].size * numpy_dtype.itemsize))
            for start in range(0, len(tensor), rows):
                file.write(_cast(spec.name, tensor[start : start + rows], numpy_dtype).view(np.uint8).data)
            del tensor  # before the next one comes
        file.flush()
        os.fsync(file.fileno())


def _cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Part of a tensor as the file holds it, contiguous."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor, dtype=dtype)
    if dtype == np.float16 and tensor.dtype != dtype and not np.isfinite(cast).all():
        raise ValueError(f"tensor '{name}' holds values outside float16's range: use bfloat16 or float32")
    return cast


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index."""
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX_FILE}: no weight_map")
    return weight_map


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Name, header entry and first byte of each tensor; the library checks the header against the file first."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(file.open("rb"))  # first: the library calls any failure to open "No such file"
        try:
            stack.enter_context(safe_open(str(file), framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or truncated safetensors file: {error}") from error
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, entry, 8 + length + entry["data_offsets"][0]
