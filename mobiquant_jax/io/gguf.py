"""LLaMA models from GGUF files: weights dequantized, rotary layout and llama3 scaling turned back to Hugging Face's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import DTypeLike

from mobiquant_jax.io.disk_leaf import disk_tree, materialize
from mobiquant_jax.io.names import Params, TensorSpec, check_tensors, tensor_specs
from mobiquant_jax.models.config import LlamaConfig, RopeScaling
from mobiquant_jax.models.rope import inverse_frequencies

_ROPE_FACTORS = "rope_freqs.weight"
_CHUNK_BYTES = 2**24  # of a tensor that is dequantized at once


class GGUFFile:
    """An open GGUF file: metadata by key, and tensors that stay on disk until they are read.

    Attributes:
        path: the file.
        tensors: tensor name -> the reader's tensor; ``shape`` lists the fastest axis first.
    """

    def __init__(self, path: Path, reader: gguf.GGUFReader):
        self.path = path
        self._reader = reader
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __contains__(self, key: str) -> bool:
        return key in self._reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of a key as a Python object, or ``default`` where the file lacks it."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        """The metadata value of a key; a ValueError names a key that the file lacks."""
        if key not in self:
            raise ValueError(f"{self.path}: no metadata '{key}'")
        return self.get(key)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantized to float32 and in numpy's axis order (``[out, in]`` for a linear).

        A few rows at a time: what is touched of the reader's map of the file would stay in memory, and the library's
        ``dequantize`` needs the result's size twice.
        """
        tensor = self.tensors[name]
        stored = np.atleast_2d(tensor.data)  # [rows, bytes or elements of a row]; not touched
        values = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
        step = max(1, _CHUNK_BYTES // stored[0].nbytes)
        try:
            for start in range(0, len(stored), step):
                part = stored[start : start + step]
                offset = int(tensor.data_offset) + start * stored[0].nbytes
                read = np.fromfile(self.path, part.dtype, part.size, offset=offset).reshape(part.shape)
                rows = values.reshape(len(stored), -1)[start : start + step]
                rows[:] = gguf.dequantize(read, tensor.tensor_type)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{self.path}: tensor '{name}' has type {tensor.tensor_type.name}, which cannot be dequantized"
            ) from error
        return values


def open_gguf(path: str | Path) -> GGUFFile:
    """Opens a GGUF file of a LLaMA model; the weights are mapped, not read.

    Args:
        path: the file.

    Returns:
        The open file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not GGUF, is truncated, or holds another architecture.
        NotImplementedError: the file is big-endian or one part of several.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file '{path}'")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: not a GGUF file, or a truncated or damaged one: {error}") from error
    file = GGUFFile(path, reader)
    if reader.byte_order != "I":
        raise NotImplementedError(f"{path}: its byte order is not this machine's")
    if (architecture := file.get("general.architecture")) != "llama":
        raise ValueError(f"{path}: architecture '{architecture}' is not supported, only 'llama'")
    if (parts := file.get("split.count", 1)) > 1:
        raise NotImplementedError(f"{path}: one of {parts} parts: merge them into one file first")
    return file


def open_gguf_params(source: str | Path | GGUFFile, dtype: DTypeLike = np.float32) -> tuple[LlamaConfig, Params]:
    """Opens the weights of a GGUF file; each is dequantized when it is indexed.

    Every type that the ``gguf`` package dequantizes is read: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, the K
    quants and more.

    Args:
        source: the file, or the file opened by :func:`open_gguf`.
        dtype: dtype of the parameters.

    Returns:
        The config and the parameter tree of `DiskLeaf` (layers stacked, kernels ``[L, in, out]``). Reading a leaf whose
        type cannot be dequantized raises a NotImplementedError.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds another architecture, or a tensor is missing, unexpected or of the wrong
            shape; the message names the file and the tensor.
    """
    file = source if isinstance(source, GGUFFile) else open_gguf(source)
    config = read_gguf_config(file)
    specs = tensor_specs(config, "gguf")
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in file.tensors.items()}
    shapes.pop(_ROPE_FACTORS, None)
    check_tensors(specs, shapes, file.path)

    def read(name: str) -> np.ndarray:
        return _undo_rotary_permutation(file.read(name), specs[name], config)

    return config, disk_tree(specs, read, {name: dtype for name in specs})


def load_gguf(source: str | Path | GGUFFile, dtype: DTypeLike = np.float32) -> tuple[LlamaConfig, Params]:
    """Loads a LLaMA model from a GGUF file into memory.

    Peak memory is the parameter tree and one float32 tensor.

    Args:
        source: as for `open_gguf_params`.
        dtype: dtype of the parameters.

    Returns:
        The config and the parameter tree (numpy, layers stacked, kernels ``[L, in, out]``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as for `open_gguf_params`.
        NotImplementedError: a tensor's type cannot be dequantized.
    """
    config, params = open_gguf_params(source, dtype)
    return config, materialize(params)


def read_gguf_config(file: GGUFFile) -> LlamaConfig:
    """Reads the architecture from a GGUF file's metadata.

    Args:
        file: an open file.

    Returns:
        The config; the head is tied where the file has no ``output.weight``.

    Raises:
        ValueError: a value is missing, or asks for what this package does not support.
    """
    if (experts := file.get("llama.expert_count", 0)) > 0:
        raise ValueError(f"{file.path}: a mixture of {experts} experts is not supported")
    hidden_size = file.require("llama.embedding_length")
    heads = file.require("llama.attention.head_count")
    if not isinstance(heads, int):
        raise ValueError(f"{file.path}: head counts that differ between layers are not supported: {heads}")
    head_dim = file.get("llama.attention.key_length", hidden_size // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if (size := file.get(key, head_dim)) != head_dim:
            raise ValueError(f"{file.path}: {key} = {size} differs from the head's {head_dim}, which is not supported")
    if (scaling := file.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{file.path}: rotary scaling of type '{scaling}' is not supported, only llama3's")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: missing tensor 'token_embd.weight'")
    ends = (file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    try:
        config = LlamaConfig(
            vocab_size=int(file.tensors["token_embd.weight"].shape[-1]),
            hidden_size=hidden_size,
            intermediate_size=file.require("llama.feed_forward_length"),
            num_hidden_layers=file.require("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=file.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=file.require("llama.context_length"),
            rms_norm_eps=_shortest(file.require("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(file.get("llama.rope.freq_base", 1e4)),
            tie_word_embeddings="output.weight" not in file.tensors,
            bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        )
        if _ROPE_FACTORS not in file.tensors:
            return config
        return _with_rope_factors(config, file.read(_ROPE_FACTORS))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to a stored float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _undo_rotary_permutation(tensor: np.ndarray, spec: TensorSpec, config: LlamaConfig) -> np.ndarray:
    """Reorders the rows of a query or key weight, head by head, for half-rotation.

    GGUF pairs rows (2i, 2i+1) of a head, Hugging Face rows (i, i + head_dim/2).

    Args:
        tensor: ``[heads * head_dim, in]``.
        spec: which tensor it is; all others pass unchanged.
        config: the model.
    """
    heads = {
        "layers/attention/q_proj/kernel": config.num_attention_heads,
        "layers/attention/k_proj/kernel": config.num_key_value_heads,
    }.get(spec.path)
    if heads is None:
        return tensor
    pairs = tensor.reshape(heads, config.head_dim // 2, 2, tensor.shape[-1])  # [H, i, which, in]
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _with_rope_factors(config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
    """Recovers the llama3 rotary scaling from the divisors of the frequencies that GGUF stores in its place.

    A divisor d of a frequency f between the slow and the fast ones obeys ``1/d = (1 - u)/factor + u`` with
    ``u = (context * f / 2pi - low) / (high - low)``, linear in f. (context, low, high) matter only up to a common
    scale, so the fit takes low = 1; LLaMA 3.1's own values are tried first. What is recovered must reproduce the
    divisors, or the file is refused.

    Args:
        config: the model without scaling.
        factors: ``[head_dim / 2]``.
    """
    factors = factors.astype(np.float64)
    if factors.shape != (config.head_dim // 2,) or not (factors >= 1).all():
        raise ValueError(f"tensor '{_ROPE_FACTORS}' of shape {factors.shape} holds no llama3 rotary scaling")
    if (factors == 1).all():
        return config
    factor = factors.max()
    candidates = [
        RopeScaling(
            factor=float(factor), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        )
    ]
    between = (factors > 1) & (factors < factor)
    if between.sum() >= 2:
        turns = inverse_frequencies(config)[between].astype(np.float64) / (2 * np.pi)
        slope, intercept = np.polyfit(turns, (1 / factors[between] - 1 / factor) / (1 - 1 / factor), 1)
        if slope > 0 and intercept < 0:
            fitted = RopeScaling(
                factor=float(factor),
                low_freq_factor=1.0,
                high_freq_factor=round(1 - 1 / intercept, 4),
                original_max_position_embeddings=max(1, round(-slope / intercept)),
            )
            candidates.append(fitted)
    frequencies = inverse_frequencies(config)
    for scaling in candidates:
        scaled = replace(config, rope_scaling=scaling)
        if np.allclose(frequencies / inverse_frequencies(scaled), factors, rtol=1e-4):
            return scaled
    raise ValueError(f"tensor '{_ROPE_FACTORS}' holds another rotary scaling than llama3's")
