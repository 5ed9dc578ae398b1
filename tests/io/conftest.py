"""Tiny random models as the files of other tools hold them, written without the help of mobiquant_jax.io."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 32, 48, 4, 2, 8, 67, 3


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers in every run; the seed is printed to repeat a failure."""
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def hf_config() -> dict[str, Any]:
    """config.json of a tiny untied model with grouped-query attention."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.fixture
def hf_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The tiny model's tensors by Hugging Face name, float32, linears [out, in]."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": (FFN, HIDDEN),
            prefix + "mlp.up_proj.weight": (FFN, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, FFN),
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    return {name: rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}


@pytest.fixture
def gguf_metadata() -> dict[str, Any]:
    """Metadata of a tiny tied model whose rows are whole K-quant blocks."""
    return {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 20000.0,
        "llama.rope.dimension_count": 64,
    }


@pytest.fixture
def gguf_shapes(gguf_metadata: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes [out, in] of that model's tensors, by GGUF name."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, 256), "output_norm.weight": (256,)}
    for layer in range(gguf_metadata["llama.block_count"]):
        prefix = f"blk.{layer}."
        shapes |= {
            prefix + "attn_norm.weight": (256,),
            prefix + "attn_q.weight": (256, 256),
            prefix + "attn_k.weight": (128, 256),
            prefix + "attn_v.weight": (128, 256),
            prefix + "attn_output.weight": (256, 256),
            prefix + "ffn_norm.weight": (256,),
            prefix + "ffn_gate.weight": (512, 256),
            prefix + "ffn_up.weight": (512, 256),
            prefix + "ffn_down.weight": (256, 512),
        }
    return shapes


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """A writer of GGUF files: metadata, tensors (an array, or (raw bytes, type)), architecture."""

    def write(
        path: Path, metadata: dict[str, Any], tensors: dict[str, Any], architecture: str | None = "llama"
    ) -> Path:
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, tensor in tensors.items():
            if isinstance(tensor, tuple):
                writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
            else:
                writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
