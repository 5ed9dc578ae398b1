"""Hugging Face folders (config.json and safetensors, single or sharded), both ways, tensor by tensor, without torch."""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mobiquant_jax.io.disk_leaf import disk_tree, materialize
from mobiquant_jax.io.names import Params, TensorSpec, check_tensors, get_leaf, tensor_specs
from mobiquant_jax.io.safetensors import (
    FILE_DTYPES,
    INDEX_FILE,
    NUMPY_DTYPES,
    SINGLE_FILE,
    StoredTensor,
    find_tensors,
    read_json,
    write_safetensors,
)
from mobiquant_jax.io.tokenizer import Tokenizer
from mobiquant_jax.models.config import LlamaConfig


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


def open_hf(folder: str | Path, dtype: DTypeLike | None = np.float32) -> tuple[LlamaConfig, Params]:
    """Opens a LLaMA model in a Hugging Face folder; its weights stay on disk until they are indexed.

    Args:
        folder: ``config.json`` with ``model.safetensors``, or with shards and their index.
        dtype: dtype of the parameters, or None to keep the stored one.

    Returns:
        The config and the parameter tree of `DiskLeaf` (layers stacked, kernels ``[L, in, out]``).

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
    tensors = find_tensors(folder)
    specs = tensor_specs(config, "hf")
    duplicate_head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    check_tensors(specs, {name: tensor.shape for name, tensor in tensors.items()}, folder)
    if duplicate_head is not None and not _equal(duplicate_head, tensors["model.embed_tokens.weight"]):
        raise ValueError(f"{folder}: config.json ties the head, but 'lm_head.weight' differs from the embedding")
    dtypes = {name: (tensor.dtype if dtype is None else dtype) for name, tensor in tensors.items()}
    return config, disk_tree(specs, lambda name: tensors[name].map(), dtypes)


def load_hf(folder: str | Path, dtype: DTypeLike | None = np.float32) -> tuple[LlamaConfig, Params]:
    """Loads a LLaMA model from a Hugging Face folder into memory.

    Peak memory is the parameter tree and one tensor.

    Args:
        folder: as for `open_hf`.
        dtype: dtype of the parameters, or None to keep the stored one.

    Returns:
        The config and the parameter tree (numpy, layers stacked, kernels ``[L, in, out]``).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as for `open_hf`.
    """
    config, params = open_hf(folder, dtype)
    return config, materialize(params)


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
    one tensor beyond the parameters, which may be on disk (`DiskLeaf`).

    Args:
        folder: the new folder; it may exist only if it is empty.
        config: the model.
        params: the parameter tree, of numpy or JAX arrays or leaves on disk.
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
    if dtype not in FILE_DTYPES:
        raise ValueError(f"dtype '{dtype}' is not one of {', '.join(FILE_DTYPES)}")
    specs = tensor_specs(config, "hf")
    _check_params(specs, params, config)
    itemsize = NUMPY_DTYPES[FILE_DTYPES[dtype]].itemsize
    shards = _split(list(specs.values()), max_shard_bytes // itemsize)

    def read(spec: TensorSpec) -> np.ndarray:
        return spec.from_tree(params)

    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", {**config.to_hf(), "dtype": dtype, "torch_dtype": dtype})
        if tokenizer is not None:
            tokenizer.save(temporary)
        if len(shards) == 1:
            write_safetensors(temporary / SINGLE_FILE, shards[0], read, dtype)
        else:
            weight_map: dict[str, str] = {}
            for number, shard in enumerate(shards, start=1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                write_safetensors(temporary / name, shard, read, dtype)
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


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored matrices hold the same numbers; mapped a part at a time."""
    rows = max(1, 2**24 // one.shape[-1])
    return one.shape == other.shape and all(
        np.array_equal(one.map()[start : start + rows], other.map()[start : start + rows])
        for start in range(0, one.shape[0], rows)
    )
