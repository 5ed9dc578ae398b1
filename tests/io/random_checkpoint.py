"""Writes a model of a config's shapes with random weights, to measure conversion at a real size.

    python tests/io/random_checkpoint.py --config=configs/llama3_8b.py --kind=hf --to=runs/random_hf

A Hugging Face folder in bfloat16 (shards of 5 GB) or a GGUF file in Q8_0 is written one tensor at a time; a checkpoint
of this package is made in memory, so that --config.model.architecture.num_hidden_layers may have to be lowered.
"""

from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
from absl import flags

from mobiquant_jax.config_flags import define_config, run
from mobiquant_jax.experiment import load_architecture, load_elastic
from mobiquant_jax.io import save_hf, tensor_specs
from mobiquant_jax.io.checkpoint import abstract_variables, save_checkpoint
from mobiquant_jax.io.disk_leaf import disk_tree
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel

_Q8_BLOCK = np.dtype([("scale", np.float16), ("codes", np.int8, 32)])


def main(_: list[str]) -> None:
    """Writes what --kind says."""
    config = load_architecture(CONFIG.value)
    if KIND.value == "hf":
        write_hf(TO.value, config)
    elif KIND.value == "gguf":
        write_gguf(TO.value, config)
    else:
        write_elastic(TO.value, config, load_elastic(CONFIG.value))


def write_hf(folder: str | Path, config: LlamaConfig, seed: int = 0, max_shard_bytes: int = 5 * 10**9) -> None:
    """A Hugging Face folder in bfloat16; every value is between 2**-7 and 2**-5 in size."""
    rng = np.random.default_rng(seed)
    specs = tensor_specs(config, "hf")

    def draw(name: str) -> np.ndarray:
        bits = rng.integers(0, 2**16, specs[name].shape, np.uint16)
        return ((bits & 0x80FF) | 0x3C00).view(ml_dtypes.bfloat16)

    params = disk_tree(specs, draw, dict.fromkeys(specs, ml_dtypes.bfloat16))
    save_hf(folder, config, params, dtype="bfloat16", max_shard_bytes=max_shard_bytes)


def write_gguf(path: str | Path, config: LlamaConfig, seed: int = 0) -> None:
    """A GGUF file: matrices in Q8_0, norms in float32."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    shapes = {name: spec.shape for name, spec in tensor_specs(config, "gguf").items()}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], shape[1] // 32 * _Q8_BLOCK.itemsize)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(rng.uniform(0.5, 1.5, shape).astype(np.float32))
            continue
        blocks = np.empty((shape[0], shape[1] // 32), _Q8_BLOCK)
        blocks["scale"] = 2.0**-11
        blocks["codes"] = rng.integers(-127, 128, (*blocks.shape, 32), np.int8)
        writer.write_tensor_data(blocks.view(np.uint8).reshape(shape[0], -1))
    writer.close()


def write_elastic(path: str | Path, config: LlamaConfig, elastic: ElasticConfig, seed: int = 0) -> None:
    """A checkpoint of this package, uncalibrated."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.uint32:
            return rng.integers(0, 2**32, leaf.shape, np.uint32)
        if leaf.dtype == np.int16:
            return rng.integers(96, 160, leaf.shape, np.int16)
        return rng.random(leaf.shape, np.float32).astype(leaf.dtype)

    variables = jax.tree.map(draw, abstract_variables(config, elastic))
    model = ElasticModel(config=config, elastic=elastic, variables=variables)
    save_checkpoint(path, model, provenance={"weights": "random"})


if __name__ == "__main__":
    CONFIG = define_config()
    KIND = flags.DEFINE_enum("kind", "hf", ["hf", "gguf", "elastic"], "what to write")
    TO = flags.DEFINE_string("to", None, "the folder or file to write", required=True)
    run(main)
