"""Models in and out: Hugging Face folders and GGUF files, their tokenizers, and the names that tie them together."""

from mobiquant_jax.io.disk_leaf import DiskLeaf, layer, materialize
from mobiquant_jax.io.gguf import GGUFFile, load_gguf, open_gguf, open_gguf_params, read_gguf_config
from mobiquant_jax.io.hf import load_hf, open_hf, read_config, save_hf
from mobiquant_jax.io.names import Params, TensorSpec, check_tensors, tensor_specs
from mobiquant_jax.io.source import load_dense, open_dense, resolve
from mobiquant_jax.io.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DiskLeaf",
    "GGUFFile",
    "Params",
    "TensorSpec",
    "Tokenizer",
    "check_tensors",
    "layer",
    "load_dense",
    "load_gguf",
    "load_hf",
    "load_tokenizer",
    "materialize",
    "open_dense",
    "open_gguf",
    "open_gguf_params",
    "open_hf",
    "read_config",
    "read_gguf_config",
    "resolve",
    "save_hf",
    "tensor_specs",
]
