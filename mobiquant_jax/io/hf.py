"""Hugging Face folders (config.json and safetensors, single or sharded), both ways, tensor by tensor, without torch."""

import contextlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from mobiquant_jax.io.names import Params, TensorSpec, check_tensors, get_leaf, stack_tensors, tensor_specs
from mobiquant_jax.io.tokenizer import Tokenizer
from mobiquant_jax.models.config import LlamaConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_NUMPY_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FILE_DTYPES = {dtype.name: name for name, dtype in _NUMPY_DTYPES.items()}

# Old exports stored this buffer; it follows from rope_theta.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; a ValueError names the file where it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads ``config.json`` of a Hugging Face folder.

    Args:
        folder: the model's folder.

    Returns:
        The file's content, for ``LlamaConfig.from_hf``.

    Raises:
        FileNotFoundError: the folder or the file does not exist.
        ValueError: the file is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json (not a Hugging Face model folder)")
    return read_json(path)


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


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index."""
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX_FILE}: no weight_map")
    return weight_map


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Opens one safetensors file; damage is a ValueError that names the file."""
    try:
        with safe_open(str(file), framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated safetensors file: {error}") from error


def read_headers(folder: str | Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Reads name, shape and dtype of every tensor in a Hugging Face folder, and no weights.

    Args:
        folder: the model's folder.

    Returns:
        Tensor name -> (shape in the file, numpy dtype), without old rotary buffers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, lacks a tensor which the index places in it, repeats one, or stores one in a type
            that is not plain floating point.
    """
    headers = {}
    for file in weight_files(folder):
        with _open(file) as handle:
            for name in handle.keys():
                if name.endswith(_IGNORED_SUFFIX):
                    continue
                if name in headers:
                    raise ValueError(f"{file}: tensor '{name}' is already in another shard")
                info = handle.get_slice(name)
                stored = info.get_dtype()
                if stored not in _NUMPY_DTYPES:
                    raise ValueError(f"{file}: tensor '{name}' is stored as {stored}, not {', '.join(_NUMPY_DTYPES)}")
                headers[name] = (tuple(info.get_shape()), _NUMPY_DTYPES[stored])
    if not (Path(folder) / SINGLE_FILE).is_file():
        for name, shard in _weight_map(Path(folder)).items():
            if name not in headers and not name.endswith(_IGNORED_SUFFIX):
                raise ValueError(f"{folder}: shard '{shard}' lacks tensor '{name}', which {INDEX_FILE} places in it")
    return headers


def iter_hf_tensors(folder: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a Hugging Face folder, one in memory at a time, file after file.

    Args:
        folder: the model's folder.

    Yields:
        (name, array as stored: ``[out, in]`` for linears, bfloat16 through ``ml_dtypes``), without old rotary buffers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    for file in weight_files(folder):
        with _open(file) as handle:
            for name in handle.keys():
                if not name.endswith(_IGNORED_SUFFIX):
                    yield name, handle.get_tensor(name)


def load_hf(folder: str | Path, dtype: DTypeLike | None = np.float32) -> tuple[LlamaConfig, Params]:
    """Loads a LLaMA model from a Hugging Face folder.

    Peak memory is the parameter tree and one tensor.

    Args:
        folder: ``config.json`` with ``model.safetensors``, or with shards and their index.
        dtype: dtype of the parameters, or None to keep the stored one.

    Returns:
        The config and the parameter tree (numpy, layers stacked, kernels ``[L, in, out]``).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the architecture is not supported, or a tensor is missing, unexpected or of the
            wrong shape; the message names the file and the tensor.
    """
    folder = Path(folder)
    fields = read_config(folder)
    try:
        config = LlamaConfig.from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    headers = read_headers(folder)
    specs = tensor_specs(config, "hf")
    shapes = {name: shape for name, (shape, _) in headers.items()}
    duplicate_head = shapes.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    check_tensors(specs, shapes, folder)

    head: list[np.ndarray] = []

    def needed() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in iter_hf_tensors(folder):
            if name in specs:
                yield name, tensor
            else:
                head.append(tensor)

    dtypes = {name: (stored if dtype is None else dtype) for name, (_, stored) in headers.items()}
    params = stack_tensors(specs, needed(), dtypes)
    embedding = params["embedder"]["embedding"]
    if duplicate_head is not None and not np.array_equal(head[0].astype(embedding.dtype), embedding):
        raise ValueError(f"{folder}: config.json ties the head, but 'lm_head.weight' differs from the embedding")
    return config, params


def save_hf(
    folder: str | Path,
    config: LlamaConfig,
    params: Mapping[str, Any],
    dtype: str = "float32",
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that ``transformers.LlamaForCausalLM.from_pretrained`` loads.

    All or nothing: the folder is written beside its place under a temporary name and then renamed. Peak memory is
    one tensor beyond the parameters.

    Args:
        folder: the new folder; it may exist only if it is empty.
        config: the model.
        params: the parameter tree, of numpy or JAX arrays.
        dtype: the dtype to store: float32, bfloat16, float16 or float64.
        tokenizer: also written, where given.
        max_shard_bytes: start another shard beyond this size.

    Raises:
        ValueError: the target is not empty, the parameters do not fit the config, or a value does not fit the dtype.
        OSError: the disk cannot take it; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder")
    if dtype not in _FILE_DTYPES:
        raise ValueError(f"dtype '{dtype}' is not one of {', '.join(_FILE_DTYPES)}")
    specs = tensor_specs(config, "hf")
    _check_params(specs, params, config)
    itemsize = _NUMPY_DTYPES[_FILE_DTYPES[dtype]].itemsize
    shards = _split(list(specs.values()), max_shard_bytes // itemsize)

    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", {**config.to_hf(), "dtype": dtype, "torch_dtype": dtype})
        if tokenizer is not None:
            tokenizer.save(temporary)
        if len(shards) == 1:
            _write_safetensors(temporary / SINGLE_FILE, shards[0], params, dtype)
        else:
            weight_map: dict[str, str] = {}
            for number, shard in enumerate(shards, start=1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                _write_safetensors(temporary / name, shard, params, dtype)
                weight_map |= {spec.name: name for spec in shard}
            total = itemsize * sum(int(np.prod(spec.shape)) for spec in specs.values())
            _write_json(temporary / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        temporary.rename(folder)
    except OSError as error:
        raise OSError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_params(specs: Mapping[str, TensorSpec], params: Mapping[str, Any], config: LlamaConfig) -> None:
    """Checks the tree against the config before anything is written."""
    for spec in specs.values():
        shape = spec.shape[::-1] if spec.transposed else spec.shape
        wanted = shape if spec.layer is None else (config.num_hidden_layers, *shape)
        found = tuple(get_leaf(params, spec.path).shape)
        if found != wanted:
            raise ValueError(f"parameter '{spec.path}' has shape {found}, its config needs {wanted}")


def _split(specs: list[TensorSpec], max_elements: int) -> list[list[TensorSpec]]:
    """Cuts the tensors into runs of at most ``max_elements`` (a single larger tensor gets a shard of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        size = int(np.prod(spec.shape))
        if shards[-1] and used + size > max_elements:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += size
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, specs: list[TensorSpec], params: Mapping[str, Any], dtype: str) -> None:
    """Writes one safetensors file, converting one tensor at a time (the library's own writer needs all at once).

    The format: the header's length as a little-endian u64, a JSON header padded to 8 bytes, then the tensors' bytes.
    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    file_dtype = _FILE_DTYPES[dtype]
    numpy_dtype = _NUMPY_DTYPES[file_dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + numpy_dtype.itemsize * int(np.prod(spec.shape))
        header[spec.name] = {"dtype": file_dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for spec in specs:
            file.write(_cast(spec, params, numpy_dtype).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _cast(spec: TensorSpec, params: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    """One tensor as the file holds it, contiguous; a value beyond float16's range is an error, not an infinity."""
    tensor = spec.from_tree(params)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor, dtype=dtype)
    if dtype == np.float16 and tensor.dtype != dtype and not np.isfinite(cast).all():
        raise ValueError(f"tensor '{spec.name}' holds values outside float16's range: use bfloat16 or float32")
    return cast
