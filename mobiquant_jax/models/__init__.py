"""The LLaMA model: its configuration, rotary embedding, key-value cache and Linen modules."""

from mobiquant_jax.models.attention import attention, self_attention
from mobiquant_jax.models.config import LlamaConfig, RopeScaling
from mobiquant_jax.models.kv_cache import KVCache, LayerCache
from mobiquant_jax.models.layers import DenseLinear, RMSNorm, rms_norm, swiglu
from mobiquant_jax.models.llama import Block, Llama
from mobiquant_jax.models.rope import apply_rope, inverse_frequencies

__all__ = [
    "Block",
    "DenseLinear",
    "KVCache",
    "LayerCache",
    "Llama",
    "LlamaConfig",
    "RMSNorm",
    "RopeScaling",
    "apply_rope",
    "attention",
    "inverse_frequencies",
    "rms_norm",
    "self_attention",
    "swiglu",
]
