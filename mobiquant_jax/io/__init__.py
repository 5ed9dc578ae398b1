"""Models in and out: Hugging Face folders and GGUF files, their tokenizers, and the names that tie them together."""

from mobiquant_jax.io.gguf import GGUFFile, load_gguf, open_gguf, read_gguf_config
from mobiquant_jax.io.hf import iter_hf_tensors, load_hf, read_config, read_headers, save_hf
from mobiquant_jax.io.names import Params, TensorSpec, check_tensors, stack_tensors, tensor_specs
from mobiquant_jax.io.source import load_dense, resolve
from mobiquant_jax.io.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "GGUFFile",
    "Params",
    "TensorSpec",
    "Tokenizer",
    "check_tensors",
    "iter_hf_tensors",
    "load_dense",
    "load_gguf",
    "load_hf",
    "load_tokenizer",
    "open_gguf",
    "read_config",
    "read_gguf_config",
    "read_headers",
    "resolve",
    "save_hf",
    "stack_tensors",
    "tensor_specs",
]
